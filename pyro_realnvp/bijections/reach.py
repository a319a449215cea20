# SPDX-License-Identifier: Apache-2.0
"""The values that a composition takes, where the bounds of an inner part limit them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro.distributions.transforms import BatchNorm as PyroBatchNorm
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import AffineTransform, Transform

from .bijection import Bijection, Conditioned, Inverse
from .elementwise import Unbound
from .foreign import Foreign
from .modes import is_eager
from .normalization import BatchNorm
from .reshape import Permute
from .shapes import (
    Bounds,
    Region,
    bounds,
    covers,
    for_inner_axes,
    inner_point,
    is_limited,
    real_events,
    strictly_inside,
    sum_events,
)


class Link(NamedTuple):
    """A bijection in a chain, in the direction of the chain."""

    part: Bijection
    extra_dims: int
    """The event axes of the chain here beyond those of the part, which treats them as batch axes."""

    @property
    def event_dim(self) -> int:
        """The number of event axes after this link."""
        return self.part.codomain.event_dim + self.extra_dims


def links(parts: Sequence[Bijection], event_dim: int, *, forward: bool = True) -> list[Link]:
    """The parts as a chain, or their inverses as the chain that leads back.

    Args:
        parts: the parts, from first to last.
        event_dim: the number of event axes before the first.
        forward: the direction.
    """
    chain = []
    for part in parts:
        chain.append(Link(part, event_dim - part.domain.event_dim))
        event_dim = chain[-1].event_dim
    if any([link.extra_dims < 0 for link in chain]):
        raise ValueError(
            f"expected parts whose events have no more axes than those of the composition; got {len(parts)} parts of "
            "which one has more, after a change of the parts: build a new Compose from them"
        )
    return chain if forward else [Link(part.inv, extra_dims) for part, extra_dims in reversed(chain)]


def fixed_space(chain: Sequence[Link], event_dim: int) -> constraints.Constraint | None:
    """The values that a chain takes, None if they may change or those of a link before the last may limit them."""
    if not chain:
        return real_events(event_dim)
    last = chain[-1].part
    has_limits = any(is_limited(link.part.codomain) for link in chain[:-1])
    # A composition inside of a link may have limits that its context, or a later initialization, will show.
    may_change = any(None in getattr(module, "_spaces", ()) for link in chain for module in link.part.modules())
    if has_limits or may_change or last.codomain is not last.codomain:
        return None
    return _with_axes(last.codomain, chain[-1].extra_dims)


def reached(chain: Sequence[Link], context: Tensor | None = None) -> constraints.Constraint:
    """The values that a chain takes now.

    A link that gets fewer values than its domain has leads to fewer than its codomain has. They lie between bounds
    where it takes each entry by itself, or permutes them. Where they are not known, as with a normalization whose
    statistics are still to be found, the result is the codomain of the last link.
    """
    chain = [Link(_at(link, context), link.extra_dims) for link in chain]
    space = _with_axes(chain[-1].part.codomain, chain[-1].extra_dims)
    box: Bounds | None = None  # what the link before leads to, None for its whole codomain
    for before, (part, _) in zip(chain, chain[1:]):
        is_region = box is None and isinstance(before.part.codomain, Region)
        box = box or bounds(before.part.codomain)
        if not is_region and covers(box, bounds(part.domain)):
            box = None
            continue
        if _moves(part) or part.context_dim:
            return space
        box = None if is_region else _carried(box, part)
        if box is None:
            return _Reached(chain, space.event_dim)
    return space if box is None else _between(*box, space)


def _with_axes(space: constraints.Constraint, count: int) -> constraints.Constraint:
    """The space of events with so many more axes than those of `space`."""
    return constraints.independent(space, count) if count else space


def _at(link: Link, context: Tensor | None) -> Bijection:
    if context is None or not link.part.context_dim:
        return link.part
    return link.part.condition(for_inner_axes(context, link.extra_dims))


def _moves(module: nn.Module) -> bool:
    """Whether an evaluation changes a part, or the next one will."""
    if isinstance(module, Bijection) and module.needs_data:
        return True
    if module.training and isinstance(module, (BatchNorm, PyroBatchNorm)):
        return True
    return any(_moves(child) for child in module._modules.values() if child is not None)  # torch compiles this


def _carried(box: Bounds, part: Bijection) -> Bounds | None:
    """The bounds after a part, None if they are not known to be bounds of the entries."""
    inner, forward = part, True
    while isinstance(inner, (Inverse, Conditioned)):
        forward ^= isinstance(inner, Inverse)
        inner = inner.bijection
    like = next(bound for bound in box if bound is not None)
    like = like if isinstance(like, Tensor) else torch.tensor(like, dtype=torch.get_default_dtype())
    ends = _as_tensors(box, like)
    if None not in part.event_shape and isinstance(inner, Permute):
        return tuple(part.forward_and_ladj(_expanded(end, part.event_shape))[0] for end in ends)
    if isinstance(inner, Foreign) and isinstance(inner.transform, AffineTransform):
        loc, scale = inner.transform.loc, inner.transform.scale
        images = [loc + scale * end if forward else (end - loc) / scale for end in ends]
        sign = torch.as_tensor(scale).sign()
    elif None not in part.event_shape and inner.elementwise and hasattr(inner, "sign"):
        lows, highs = (_as_tensors(bounds(space), like) for space in (part.domain, part.codomain))
        images, sign = [], torch.as_tensor(inner.sign)
        for k, end in enumerate(ends):
            end = end.clamp(*lows)
            is_last = end == lows[k]  # where the part leads to an end of its codomain, which rounding may hide
            image = part.forward_and_ladj(
                _expanded(torch.where(is_last, inner_point(part.domain, end), end), part.event_shape)
            )[0]
            images.append(torch.where(is_last, torch.where(sign > 0, highs[k], highs[1 - k]), image))
    else:
        return None
    return torch.where(sign > 0, *images), torch.where(sign > 0, *images[::-1])


def _as_tensors(box: Bounds, like: Tensor) -> list[Tensor]:
    return [
        torch.as_tensor(end if bound is None else bound).to(like) for bound, end in zip(box, (-torch.inf, torch.inf))
    ]


def _expanded(end: Tensor, shape: tuple[int, ...]) -> Tensor:
    return end if end.dim() > len(shape) else end.expand(shape)


def _between(low: Tensor, high: Tensor, codomain: constraints.Constraint) -> constraints.Constraint:
    if not is_eager(low, high):
        space = constraints.interval(low, high)
    elif (low == -torch.inf).all() and (high == torch.inf).all():
        return codomain
    elif (high == torch.inf).all():
        space = constraints.greater_than(low)
    elif (low == -torch.inf).all():
        space = constraints.less_than(high)
    elif low.dim() == codomain.event_dim == 1 and (low.isinf() | high.isinf()).any():
        return Unbound(low.detach(), high.detach()).domain  # of which, unlike of torch's, an end may be infinite
    else:
        space = constraints.interval(low, high)
    return _with_axes(space, codomain.event_dim)


class _Reached(Region):
    """The values from which each link of a chain leads back to a value between the bounds of the one before it."""

    def __init__(self, chain: list[Link], event_dim: int):
        self.chain = chain
        self.event_dim = event_dim

    def __repr__(self) -> str:
        return f"Reached({' -> '.join(', '.join(link.part._kinds()) for link in self.chain)})"

    def check(self, value: Tensor) -> Tensor:
        """Which events are such values."""
        result = torch.ones(value.shape[: value.dim() - self.event_dim], dtype=torch.bool, device=value.device)
        for link in reversed(self.chain):
            inside = strictly_inside(link.part.codomain, value)
            if inside is not None:
                result = result & (inside.flatten(inside.dim() - link.event_dim).all(-1) if link.event_dim else inside)
                value = torch.where(inside, value, inner_point(link.part.codomain, value))
            try:
                value = link.part._evaluate(value, forward=False, remember=False)[0]
            except (KeyError, NotImplementedError):
                # A transform of Pyro's that has no inverse has densities of its own draws only, which lie inside.
                return result
        return result

    def point(self, like: Tensor) -> Tensor:
        """A value in the region for each of others."""
        chain = _Coordinates(self)
        return chain(inner_point(chain.domain, like).expand(chain.inverse_shape(like.shape)))


class _Coordinates(Transform):
    """The chain itself, which takes all real values to the region that it reaches.

    It has no memory, which would leave a value without gradients whose coordinates have been found before.
    """

    bijective = True

    def __init__(self, region: _Reached):
        super().__init__()
        first = region.chain[0]
        self.domain: constraints.Constraint = _with_axes(first.part.domain, first.extra_dims)
        self.codomain: constraints.Constraint = region

    def _call(self, x: Tensor) -> Tensor:
        return self._along(x, forward=True)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._along(y, forward=False)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._along(x, forward=True)[1]

    def _along(self, value: Tensor, *, forward: bool) -> tuple[Tensor, Tensor | float]:
        chain, total = self.codomain.chain, 0.0
        for part, extra_dims in chain if forward else reversed(chain):
            value, ladj = part._evaluate(value, forward=forward, remember=False)
            batch_dim = value.dim() - (part.codomain if forward else part.domain).event_dim
            total = total + sum_events(ladj.expand(value.shape[:batch_dim]), extra_dims)
        return value, total

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        for part, _ in self.codomain.chain:
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        for part, _ in reversed(self.codomain.chain):
            shape = part.inverse_shape(shape)
        return torch.Size(shape)


@transform_to.register(_Reached)
@biject_to.register(_Reached)
def _coordinates(region: _Reached) -> Transform:
    if is_limited(region.chain[0].part.domain):
        raise NotImplementedError(f"no unconstrained coordinates are known for {region}")
    return _Coordinates(region)
