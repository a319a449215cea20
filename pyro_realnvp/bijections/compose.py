# SPDX-License-Identifier: Apache-2.0
"""The composition of bijections, including the transforms of Pyro and torch."""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import pyro.distributions.transforms as T
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform
from torch.utils.checkpoint import checkpoint

from .bijection import Bijection
from .foreign import adopted
from .inputs import check_event_shape
from .memo import InverseTransform
from .modes import is_eager
from .reach import fixed_space, links, reached
from .recompute import can_be_recomputed, from_output
from .reshape import Permute
from .runs import Run, marks, runs, shape_checkers
from .shapes import for_inner_axes, sum_events


class Compose(Bijection):
    r""":math:`y = (f_n \circ \dots \circ f_1)(x),\quad
    \log|\det \partial y / \partial x| = \sum_i \log|\det \partial f_i|`: the parts are applied from first to last.

    The parts may be bijections of this package and transforms of Pyro and torch in any mixture. Each part is evaluated
    once per pass, its parameters belong to the composition, and it never answers from a stale cache. The parts that
    take a context all get the same one. ``print(f)`` counts the parts, and ``print(f.parts)`` shows each of them.

    Args:
        parts: the transforms, in the order in which they are applied to x, or the ``parts`` of another composition.
        event_shape: the shape of the events that the first part takes, needed only if the parts do not know their
            sizes, as with images. If it has more axes than the events of the parts, one event holds several of theirs,
            and log-determinants are summed over the whole event.
        allow_unchanged: whether the stack may leave entries unchanged, like a block that is meant as a part of a larger
            stack.
        checkpoint: True, and the backward pass evaluates each coupling a second time from its input, which saves the
            memory of its intermediate values (:mod:`torch.utils.checkpoint`). ``"inverse"``, and it gets that input,
            too, from the output by the inverse (Gomez et al. 2017), so that the memory does not grow with the number of
            couplings. The gradients are then exact up to rounding, which the inverse adds up, and there are no second
            derivatives.

    Raises:
        TypeError: a part is not a transform.
        ValueError: a part is not bijective, the event shapes or contexts of the parts do not fit together, or a stack
            of two or more couplings leaves an entry unchanged.

    Example:
        >>> import pyro.distributions.transforms as T
        >>> from pyro_realnvp import real_nvp
        >>> f = Compose([real_nvp(2), T.Spline(2)])
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(f.inv(f(x)), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        parts: Iterable[Transform] | nn.ModuleList,
        *,
        event_shape: Sequence[int] | None = None,
        allow_unchanged: bool = False,
        checkpoint: bool | str = False,
    ):
        if checkpoint not in (False, True, "inverse"):
            raise ValueError(f"expected checkpoint to be True, False or 'inverse'; got {checkpoint!r}")
        parts = [_adopt(part) for part in parts]
        widths = {part.context_dim for part in parts} - {0}
        if len(widths) > 1:
            raise ValueError(
                f"expected parts with one width of context; got widths {sorted(widths)}: "
                "build the parts with the same context_dim"
            )
        chain = ComposeTransform(parts)
        event_shape = _event_shape(parts, chain.domain.event_dim, event_shape)
        super().__init__(event_shape, context_dim=max(widths, default=0))
        self.parts: nn.ModuleList = nn.ModuleList(parts)
        self.checkpoint: bool | str = checkpoint
        chains = [links(parts, len(event_shape), forward=forward) for forward in (False, True)]
        self._event_dims: list[int] = [chain[-1].event_dim if chain else len(event_shape) for chain in chains]
        self._spaces: list[constraints.Constraint | None] = [fixed_space(c, len(event_shape)) for c in chains]
        self._cached_steps: tuple[list, list[_Step]] | None = None
        if not allow_unchanged:
            self._refuse_unchanged_entries()

    @property
    def domain(self) -> constraints.Constraint:
        return self.space(forward=False)

    @property
    def codomain(self) -> constraints.Constraint:
        return self.space(forward=True)

    def space(self, *, forward: bool, context: Tensor | None = None) -> constraints.Constraint:
        return self._spaces[forward] or reached(links(self.parts, len(self.event_shape), forward=forward), context)

    @property
    def sign(self) -> int | Tensor:
        return math.prod(part.sign for part in self.parts)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._pass(x, context, forward=True)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._pass(y, context, forward=False)

    def _pass(self, x: Tensor, context: Tensor | None, *, forward: bool) -> tuple[Tensor, Tensor]:
        if self._checkpoints("inverse") and is_eager():
            return self._pass_from_output(x, context, forward)
        steps, ladjs = self._current_steps(), []
        for step in steps if forward else reversed(steps):
            x, ladj = self._evaluate_step(step, x, context, forward)
            ladjs.append(ladj)
        return x, self._total(ladjs, x, forward)

    def _pass_from_output(self, x: Tensor, context: Tensor | None, forward: bool) -> tuple[Tensor, Tensor]:
        steps, ladjs = _steps(self.parts, [(k, None) for k in range(len(self.parts))], len(self.event_shape)), []
        for again, some in groupby(steps if forward else steps[::-1], lambda step: can_be_recomputed(step.part)):
            if again:
                x, ladj = from_output(self._evaluate_step, list(some), x, context, forward=forward)
                ladjs.append(ladj)
            else:
                for step in some:
                    x, ladj = self._evaluate_step(step, x, context, forward)
                    ladjs.append(ladj)
        return x, self._total(ladjs, x, forward)

    def _total(self, ladjs: list[Tensor], y: Tensor, forward: bool) -> Tensor:
        """The sum of the log-determinants, one for each y. A part may have returned a single number for all of them."""
        batch_shape = y.shape[: y.dim() - self._event_dims[forward]]
        total = sum(ladjs[1:], ladjs[0]) if ladjs else y.new_zeros(batch_shape)
        return total.expand(batch_shape)

    def _evaluate_step(self, step: "_Step", x: Tensor, context: Tensor | None, forward: bool) -> tuple[Tensor, Tensor]:
        part, extra_dims, run = step
        context = for_inner_axes(context, extra_dims)
        call = partial(checkpoint, use_reentrant=False) if self._checkpoints(True) else None
        if run is not None:
            x, ladj = run.evaluate(x, context, forward=forward, call=call)
        else:
            evaluate = part.forward_and_ladj if forward else part.inverse_and_ladj
            args = x, context if part.context_dim else None
            # A second evaluation would, for instance, move the statistics of a normalization twice.
            x, ladj = call(evaluate, *args) if call and part.can_be_recomputed else evaluate(*args)
        if extra_dims:  # as many terms are summed as there are, even where a part has returned one number for all
            ladj = ladj.expand(x.shape[: x.dim() - (part.codomain if forward else part.domain).event_dim])
        return x, sum_events(ladj, extra_dims)

    def _checkpoints(self, how: bool | str) -> bool:
        """Whether this pass is to be checkpointed in the given way, which torch.func cannot do."""
        return self.checkpoint == how and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()

    def _current_steps(self) -> "list[_Step]":
        """What is evaluated, one after the other. This is found anew only after a part or a mask has changed."""
        now, cached = marks(self.parts), self._cached_steps
        if cached is None or len(now) != len(cached[0]) or not all(map(operator.is_, now, cached[0])):
            # One assignment, since another thread may read in between.
            self._cached_steps = cached = now, _steps(self.parts, runs(self.parts), len(self.event_shape))
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cached_steps": None}

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        shape = check_event_shape(self, shape, self.event_shape)
        for part in shape_checkers(self.parts):
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        for part in reversed(shape_checkers(self.parts)):
            shape = part.inverse_shape(shape)
        return check_event_shape(self, shape, self.event_shape)

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        for part in self.parts if forward else reversed(self.parts):
            changed = part.changed_entries(changed, forward=forward)
        return changed

    def __repr__(self) -> str:
        # The parts with their networks take a dozen lines each. `print(f.parts)` shows them.
        return f"Compose({', '.join(f'{n} x {kind}' if n > 1 else kind for kind, n in self._kinds().items())})"

    def _kinds(self) -> Counter[str]:
        return sum((part._kinds() for part in self.parts), Counter())

    def _refuse_unchanged_entries(self) -> None:
        modules = (module for _, module in self.named_modules(remove_duplicate=False))
        couplings = [module for module in modules if isinstance(module, Bijection) and module.is_partial]
        # A single coupling leaves entries unchanged by design: it is meant as a part of a larger stack.
        if len(couplings) < 2 or None in self.event_shape:
            return
        changed = self.changed_entries(torch.zeros(self.event_shape, dtype=torch.bool))
        if not changed.all():
            entries = (~changed).nonzero().squeeze(-1).tolist()
            more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
            raise ValueError(
                f"the stack of {len(couplings)} couplings never changes entries {entries[:10]}{more} of its output: "
                "alternate the masks (mask, ~mask, ...), put a Permute between the couplings, or pass "
                "allow_unchanged=True for a part of a larger stack"
            )


class _Step(NamedTuple):
    """A part of a composition, or a run of couplings that begins with it."""

    part: Bijection
    extra_dims: int
    """The event axes that the composition has here beyond those of the part, which treats them as batch axes."""
    run: Run | None


def _steps(parts: Sequence[Bijection], found: list[tuple[int, Run | None]], event_dim: int) -> list[_Step]:
    chain = links(parts, event_dim)
    return [_Step(*chain[k], run) for k, run in found]


def _adopt(part: Transform) -> Bijection:
    """Returns `part` as a bijection.

    Torch's compositions, wrappers and views of inverses, and Pyro's permutations, are not modules, so that what they
    hold would be missing in `parameters()` and `state_dict`. They are rebuilt from bijections of this package.
    """
    if isinstance(part, Bijection):
        return part
    if not isinstance(part, Transform):
        remedy = ": give it a context first, part.condition(context)" if isinstance(part, ConditionalTransform) else ""
        raise TypeError(f"expected transforms; got {type(part).__name__}{remedy}")
    if not part.bijective:
        raise ValueError(f"expected bijective transforms; got {type(part).__name__}, which has no inverse")
    if isinstance(part, ComposeTransform):
        return Compose(part.parts)
    if isinstance(part, IndependentTransform):
        inner = _adopt(part.base_transform)
        event_shape = (None,) * part.reinterpreted_batch_ndims + inner.event_shape
        return Compose([inner], event_shape=event_shape, allow_unchanged=True)
    if isinstance(part, T.Permute) and part.dim == -1:
        return Permute(part.permutation)
    if isinstance(part, InverseTransform):
        return _adopt(part.inv).inv
    return adopted(part, _adopt)


def _event_shape(parts: list[Bijection], event_dim: int, given: Sequence[int] | None) -> tuple[int | None, ...]:
    """Returns the shape of the first part's input events, in which None stands for a size that no part knows.

    Without a given shape, the first part that knows its sizes determines it. All parts must agree with the result.
    """
    event_shape = None if given is None else tuple(given)
    for k, part in enumerate(parts):
        shape = part.event_shape
        if event_shape is None and shape and None not in shape:
            for earlier in reversed(parts[:k]):
                shape = earlier.inverse_shape(shape)
            event_shape = tuple(shape) if len(shape) == event_dim else None
    if event_shape is None:
        return (None,) * event_dim
    if None in event_shape:  # The parts check what they know in each evaluation.
        return event_shape
    shape = event_shape
    for k, part in enumerate(parts):
        try:
            shape = part.forward_shape(shape)
        except ValueError as error:
            raise ValueError(f"part {k} does not fit the parts before it: {error}") from None
    return event_shape
