# SPDX-License-Identifier: Apache-2.0
"""An adapter that makes a bijection of a transform of Pyro or torch."""

import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from pyro.distributions.transforms import ELUTransform
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, CatTransform, ReshapeTransform, StackTransform, Transform

from .bijection import Bijection
from .memo import own_attributes
from .shapes import sum_events


class _OneThread:
    """A lock. After a fork the child has a new one, since no thread of the child would open the parent's."""

    def __init__(self):
        self.lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: setattr(self, "lock", threading.RLock()))


_ONE_THREAD = _OneThread()


class Foreign(Bijection):
    """A transform of Pyro or torch, wrapped so that it can be a part of a :class:`Compose`."""

    def __init__(self, transform: Transform):
        super().__init__((None,) * transform.domain.event_dim)
        self.transform = transform
        self._held: list[tuple[object, str, str]] = []
        """Where a transform that is no module holds parameters of this module: an object, its attribute, our name."""
        for holder, attribute, name in _held_tensors(transform, "transform"):
            value = getattr(holder, attribute)
            if isinstance(value, nn.Parameter):
                self._held.append((holder, attribute, name))
                self.register_parameter(name, value)
        if isinstance(transform, (CatTransform, StackTransform)):
            self.parts: nn.ModuleList = nn.ModuleList(transform.transforms)
        self.elementwise: bool = not self.event_shape
        self.domain: Constraint = transform.domain
        # Pyro declares the positive numbers as the values of an ELU.
        is_elu = isinstance(transform, ELUTransform)
        self.codomain: Constraint = constraints.greater_than(-1.0) if is_elu else transform.codomain
        if self.event_shape and isinstance(transform, CatTransform):
            self.domain, self.codomain = _JoinedEvents(self.domain), _JoinedEvents(self.codomain)

    @property
    def sign(self) -> int | Tensor:
        try:
            sign = self._current().sign
        except NotImplementedError:
            return super().sign
        vars(self.transform).pop("sign", None)  # a lazy property would keep that of the parameters it has now
        return sign

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, forward=True)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(y, forward=False)

    def _run(self, value: Tensor, *, forward: bool) -> tuple[Tensor, Tensor]:
        # Pyro's transforms keep on themselves what their log-determinant needs, where another thread would replace it.
        with nullcontext() if torch.compiler.is_compiling() else _ONE_THREAD.lock:
            transform = self._current()
            _drop_cache(transform)  # The cache may be stale.
            output = (transform if forward else transform.inv)(value)
            ladj = self._log_det(value, output) if forward else -self._log_det(output, value)
            # A filled cache would keep the graph alive, and the transform could not be copied.
            _drop_cache(transform)
        return output, ladj

    def _current(self) -> Transform:
        """The transform, with the parameters that this module has now: `functional_call` replaces them."""
        for holder, attribute, name in self._held:
            setattr(holder, attribute, getattr(self, name))
        return self.transform

    def _log_det(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| of each event, where torch's own is wrong, too.

        Its AffineTransform of events counts a scale of one number once, and not for each entry. Its StackTransform has
        events of one axis, but returns a log-determinant for each of their entries.
        """
        transform = self.transform
        if isinstance(transform, AffineTransform):
            transform = AffineTransform(transform.loc, transform.scale)
            x, y = torch.broadcast_tensors(x, y)  # of which one may have no batch axes
        ladj = transform.log_abs_det_jacobian(x, y).to(y.dtype)
        return sum_events(ladj, max(0, ladj.dim() - x.dim() + self.domain.event_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Foreign":
        """Moves the constants of the transform, too, which no module knows of."""
        super()._apply(fn, recurse)
        for holder, attribute, _ in _held_tensors(self.transform, "transform"):
            value = vars(holder)[attribute]
            if not isinstance(value, nn.Parameter):
                vars(holder)[attribute] = fn(value)
        return self

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size(self.transform.forward_shape(shape))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size(self.transform.inverse_shape(shape))

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        shape = (self.forward_shape if forward else self.inverse_shape)(changed.shape)
        if type(self.transform) is ReshapeTransform:
            return changed.reshape(shape)
        return super().changed_entries(changed if shape == changed.shape else changed.new_ones(shape), forward=forward)

    def architecture_repr(self) -> str:
        """The options of the transform, which no state_dict holds."""
        return _describe(self.transform)

    def _kinds(self) -> Counter[str]:
        return Counter([type(self.transform).__name__])


def adopted(transform: Transform, adopt: Callable[[Transform], Bijection]) -> Foreign:
    """A bijection of a transform, of which everything that it trains is a part, although torch's are no modules.

    Raises:
        ValueError: it is a StackTransform of transforms with events, whose log-determinants torch lays out wrongly.
    """
    if isinstance(transform, CatTransform):
        transform = CatTransform(list(map(adopt, transform.transforms)), transform.dim, transform.lengths)
    elif isinstance(transform, StackTransform):
        transform = StackTransform(list(map(adopt, transform.transforms)), transform.dim)
        if any(part.domain.event_dim for part in transform.transforms):
            raise ValueError(
                "expected a StackTransform of elementwise transforms; got one of transforms with events, for which "
                "torch's log-determinant is wrong: use CatTransform"
            )
    return Foreign(transform)


def _held_tensors(holder: object, path: str) -> Iterator[tuple[object, str, str]]:
    """Where a transform, and the transforms and distributions in it, have tensors as plain attributes."""
    for name, value in own_attributes(holder).items():
        if isinstance(value, Tensor):
            yield holder, name, f"{path}_{name}"
        elif isinstance(value, (Transform, Distribution)):
            yield from _held_tensors(value, f"{path}_{name}")


class _JoinedEvents(Constraint):
    """The space of a CatTransform of transforms with events. Torch's cannot check it."""

    def __init__(self, cat: constraints.cat):
        self.base_constraint = cat
        self.event_dim = cat.event_dim

    def check(self, value: Tensor) -> Tensor:
        dim = self.base_constraint.dim % value.dim() - value.dim()
        parts = zip(self.base_constraint.cseq, value.split(self.base_constraint.lengths, dim), strict=True)
        batch_dim = value.dim() - self.event_dim
        checks = [space.check(part) for space, part in parts]
        checks = [check.flatten(batch_dim).all(-1) if check.dim() > batch_dim else check for check in checks]
        return torch.stack(checks).all(0) if dim >= -self.event_dim else torch.cat(checks, dim + self.event_dim)


def _describe(value: object) -> str:
    """The class and the plain options of a transform and of its parts, such as the distribution whose cdf it is."""
    if isinstance(value, nn.Parameter):  # of which the state_dict holds the values
        return f"Parameter({tuple(value.shape)})"
    if isinstance(value, Tensor):
        values = value.detach().double().cpu().contiguous().numpy()
        return f"{tuple(value.shape)} with checksum {zlib.crc32(values.tobytes())}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, Bijection):
        return value.architecture_repr()
    if not isinstance(value, (Transform, Distribution)):
        return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
    parts = own_attributes(value) | (value._modules if isinstance(value, nn.Module) else {})
    kinds = (bool, int, float, str, list, tuple, Transform, Distribution, Tensor)
    options = {
        name: part
        for name, part in parts.items()
        # A lazy property, whose value is there only once it has been used, is an attribute of the class.
        if isinstance(part, kinds) and not hasattr(type(value), name) and name not in ("training", "_validate_args")
    }
    return f"{type(value).__name__}({', '.join(f'{name}={_describe(part)}' for name, part in options.items())})"


def _drop_cache(transform: Transform) -> None:
    for name in [name for name in vars(transform) if name.startswith("_cache") and name != "_cache_size"]:
        setattr(transform, name, (None, None) if name == "_cached_x_y" else None)
