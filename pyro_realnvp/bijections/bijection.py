# SPDX-License-Identifier: Apache-2.0
"""The base class of all bijections: each direction returns its value together with the log-determinant."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from .inputs import check_bounds, check_context, check_event_shape, check_value
from .memo import Memo, forget_param_store
from .shapes import real_events

DIRECTIONS = ("forward_and_ladj", "inverse_and_ladj")


class Bijection(TransformModule):
    r"""An invertible, differentiable map :math:`y = f(x)` with :math:`\log|\det \partial y / \partial x|`.

    A subclass writes only :meth:`forward_and_ladj` and :meth:`inverse_and_ladj`. The base class provides all else that
    :class:`torch.distributions.Transform` asks for (``f(x)``, ``f.inv``, ``f.log_abs_det_jacobian(x, y)``,
    ``f.forward_shape``, ...), so that a bijection works in a :class:`~pyro.distributions.TransformedDistribution`, in
    SVI guides and between Pyro's own transforms.

    A bijection remembers its last evaluation for as long as the output lives. So ``log_prob`` evaluates it only once,
    and ``log_prob`` of a sample that it has just made does not evaluate it again. It forgets the evaluation as soon as
    a parameter, a buffer, the grad mode or the train mode has changed, so you need not call :meth:`clear_cache`. It
    cannot notice one kind of change: code outside of an optimizer that writes into a parameter in place through
    ``.data``. Write under ``torch.no_grad()`` instead.

    Args:
        event_shape: the shape of one event, in which ``None`` stands for any size.
        context_dim: the width of the context that the bijection requires, 0 for none.

    Example:
        >>> class Shift(Bijection):
        ...     def forward_and_ladj(self, x, context=None):
        ...         return x + 1.0, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_ladj(self, y, context=None):
        ...         return y - 1.0, y.new_zeros(y.shape[:-1])
        >>> f = Shift(event_shape=(2,))
        >>> f.inv(f(torch.zeros(3, 2))).shape
        torch.Size([3, 2])
    """

    bijective = True

    elementwise = False
    """Whether each entry of the output depends only on the same entry of the input."""

    is_partial = False
    """Whether the bijection leaves some entries unchanged, so that a stack needs another one that changes them."""

    can_be_recomputed = False
    """Whether ``Compose(checkpoint=)`` may evaluate the bijection or its inverse again in the backward pass."""

    needs_data = False
    """Whether the next training pass in the data direction initializes the bijection from its batch. If so,
    :func:`fit` evaluates the first batch once in eager mode before it compiles or takes a step."""

    @property
    def sign(self) -> int | Tensor:
        """Whether an increasing (1) or a decreasing (-1) function maps each entry, from which torch gets a ``cdf``.

        Only a bijection of entries has a sign. A subclass of that kind sets the attribute.

        Raises:
            AttributeError: the bijection maps several entries together, or does not declare its sign.
        """
        raise AttributeError(f"{type(self).__name__} declares no sign: it is no monotone function of single entries")

    def __init__(self, event_shape: Sequence[int | None], *, context_dim: int = 0):
        super().__init__()
        self.event_shape: tuple[int | None, ...] = tuple(event_shape)
        self.context_dim = context_dim
        for name in ("domain", "codomain"):
            if not hasattr(type(self), name):  # A subclass may declare its own, as an attribute or a property.
                setattr(self, name, real_events(len(self.event_shape)))
        self._memo = Memo()

    # -- what a subclass writes --------------------------------------------------------------------------------------

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y = f(x) and log|det dy/dx|; the log-determinant is shaped like the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_and_ladj")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns x = f^{-1}(y) and log|det dx/dy|; the log-determinant is shaped like the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse_and_ladj")

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        """Returns which entries of the output have been changed, given which entries of the input already were.

        Both are boolean tensors of the shape of one event. :class:`Compose` uses this method to refuse a stack that
        leaves an entry unchanged. By default, an :attr:`elementwise` bijection returns `changed`, and any other
        bijection counts as changing all entries.
        """
        return changed if self.elementwise else torch.ones_like(changed)

    def space(self, *, forward: bool, context: Tensor | None = None) -> Constraint:
        """The outputs in the given direction, which in a composition may depend on the context."""
        return self.codomain if forward else self.domain

    # -- what torch and Pyro ask for ---------------------------------------------------------------------------------

    @property
    def inv(self) -> "Bijection":
        """The inverse, as a module that shares the parameters of f; ``f.inv.inv is f``."""
        if self._inv is None:
            # nn.Module's __setattr__ would register the inverse as a submodule, and f would then contain itself.
            self.__dict__["_inv"] = Inverse(self)
        return self._inv

    def __call__(self, x: Tensor) -> Tensor:
        return self._evaluate(x, forward=True)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._evaluate(y, forward=False)[0]

    def _call(self, x: Tensor) -> Tensor:
        return self(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inv_call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log|det dy/dx| at x, in nats, shaped like the batch."""
        ladj = self._memo.ladj(self, x, y)
        return self._evaluate(x, forward=True)[1] if ladj is None else ladj

    def _evaluate(self, value: Tensor, *, forward: bool, remember: bool = True) -> tuple[Tensor, Tensor]:
        """Checks the value and returns its output and log-determinant in the given direction.

        If the value is the remembered output of the opposite direction, the memory answers and nothing is evaluated.
        """
        self._check(value, forward=forward)
        if remember:  # otherwise a FlowDistribution calls, which has its own answer to values beyond the support
            check_bounds(self, value, self.domain if forward else self.codomain)
        remembered = self._memo.back(self, value, forward=forward)
        if remembered is not None:
            return remembered
        output, ladj = self.forward_and_ladj(value) if forward else self.inverse_and_ladj(value)
        if remember:
            output = self._memo.store(self, value, output, ladj, forward=forward)
        return output, ladj

    def _check(self, value: Tensor, *, forward: bool) -> None:
        """Raises an error if the shape, dtype or device of `value` does not fit, or if a context is missing."""
        check_value(self, value, self.forward_shape if forward else self.inverse_shape)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of f(x), given the shape of x."""
        return check_event_shape(self, shape, self.event_shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of f^{-1}(y), given the shape of y."""
        return check_event_shape(self, shape, self.event_shape)

    def with_cache(self, cache_size: int = 1) -> "Bijection":
        """Returns the bijection itself, which always remembers its last evaluation."""
        return self

    def clear_cache(self) -> None:
        """Forgets the last evaluation. You never need this, because a bijection notices when its memory is stale."""
        self._memo.clear()

    def condition(self, context: Tensor) -> "Bijection":
        """Returns the bijection at a fixed context of shape ``batch_shape + (context_dim,)``.

        A bijection that takes no context returns itself.
        """
        return Conditioned(self, context) if self.context_dim else self

    def compile(self, **options: Any) -> None:
        """Compiles each direction as one graph, by :func:`torch.compile` with ``fullgraph=True`` and the options.

        All later evaluations of this bijection use the compiled graphs; its copies and pickles are not compiled.
        Initialize layers that start from data, such as ActNorm, before you compile.

        Warns:
            RuntimeWarning: a part is a spline of Pyro's, of which torch's compiler has made wrong gradients.
        """
        if any(type(module).__module__.startswith("pyro.distributions.transforms.spline") for module in self.modules()):
            warnings.warn(
                "torch's compiler has made wrong gradients of Pyro's splines on CPUs: compare them with those of the "
                "uncompiled bijection, or use Spline and SplineCoupling of pyro_realnvp",
                RuntimeWarning,
                stacklevel=2,
            )
        for name in DIRECTIONS:
            method = getattr(type(self), name).__get__(self)
            self.__dict__[name] = torch.compile(method, fullgraph=True, **options)

    def _replicate_for_data_parallel(self) -> "Bijection":
        # A shallow copy would share the memory, and the view of the inverse with the parameters of another device.
        replica = super()._replicate_for_data_parallel()
        replica.__dict__ |= {"_inv": None, "_memo": Memo()}
        return replica

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self.parameters())
        state = super().__getstate__() | {"_inv": None, "_memo": Memo()}
        # Compiled directions lie in the state under these names and can be neither copied nor pickled.
        return {name: value for name, value in state.items() if name not in DIRECTIONS}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def _kinds(self) -> Counter[str]:
        """How many bijections of each kind this one consists of, for the repr of a stack."""
        return Counter([type(self).__name__])


# Pyro's ConditionalTransformedDistribution passes its context on to the transforms that are ConditionalTransforms.
ConditionalTransform.register(Bijection)


class Inverse(Bijection):
    r""":math:`y = f^{-1}(x)`, a view of f that shares its parameters and its memory. ``f.inv`` makes it."""

    def __init__(self, bijection: Bijection):
        event_shape = bijection.event_shape
        if None not in event_shape:
            # The events of the inverse are the outputs of f, whose shape may differ from that of its inputs.
            shape = bijection.forward_shape(event_shape)
            event_shape = shape[len(shape) - bijection.codomain.event_dim :]
        super().__init__(event_shape, context_dim=bijection.context_dim)
        self.bijection = bijection

    @property
    def domain(self) -> Constraint:
        return self.bijection.codomain

    @property
    def codomain(self) -> Constraint:
        return self.bijection.domain

    def space(self, *, forward: bool, context: Tensor | None = None) -> Constraint:
        return self.bijection.space(forward=not forward, context=context)

    @property
    def inv(self) -> Bijection:
        return self.bijection

    @property
    def can_be_recomputed(self) -> bool:
        return self.bijection.can_be_recomputed

    @property
    def sign(self) -> int | Tensor:
        return self.bijection.sign

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_ladj(y, context)

    def _evaluate(self, value, *, forward, remember=True):
        return self.bijection._evaluate(value, forward=not forward, remember=remember)

    def compile(self, **options: Any) -> None:
        self.bijection.compile(**options)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        ladj = self.bijection._memo.ladj(self.bijection, y, x)
        return self._evaluate(x, forward=True)[1] if ladj is None else -ladj

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        return self.bijection.changed_entries(changed, forward=not forward)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.bijection.forward_shape(shape)

    def __repr__(self) -> str:
        return f"{self.bijection!r}.inv"

    def _kinds(self) -> Counter[str]:
        return Counter({f"{kind}.inv": n for kind, n in self.bijection._kinds().items()})


class Conditioned(Bijection):
    """y = f(x; c) at a fixed context c. ``f.condition(context)`` makes it.

    The batch shape of the context broadcasts with that of x.

    Args:
        bijection: a bijection with ``context_dim > 0``.
        context: the context c, of shape ``batch_shape + (context_dim,)``.
    """

    def __init__(self, bijection: Bijection, context: Tensor):
        super().__init__(bijection.event_shape)
        check_context(bijection, context)
        self.bijection = bijection
        # The context moves with the module, but it is data and does not belong in a state_dict.
        self.register_buffer("context", context, persistent=False)

    @property
    def domain(self) -> Constraint:
        return self.bijection.space(forward=False, context=self.context)

    @property
    def codomain(self) -> Constraint:
        return self.bijection.space(forward=True, context=self.context)

    @property
    def sign(self) -> int | Tensor:
        return self.bijection.sign

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_ladj(y, self.context)

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        return self.bijection.changed_entries(changed, forward=forward)

    def _kinds(self) -> Counter[str]:
        return self.bijection._kinds()

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return self._broadcast(self.bijection.forward_shape(shape), self.codomain.event_dim)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return self._broadcast(self.bijection.inverse_shape(shape), self.domain.event_dim)

    def _broadcast(self, shape: torch.Size, event_dim: int) -> torch.Size:
        batch_shape = shape[: len(shape) - event_dim]
        try:
            batch_shape = torch.broadcast_shapes(batch_shape, self.context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"expected a batch shape that broadcasts with the context's {tuple(self.context.shape[:-1])}; "
                f"got {tuple(batch_shape)}: add axes of size 1 to one of them"
            ) from None
        return batch_shape + shape[len(shape) - event_dim :]

    def __getstate__(self) -> dict[str, Any]:
        # A context that comes out of an encoder carries a graph, and such a tensor can be neither copied nor pickled.
        state = super().__getstate__()
        return state | {"_buffers": state["_buffers"] | {"context": self.context.detach()}}
