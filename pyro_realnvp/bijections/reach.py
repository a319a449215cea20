# SPDX-License-Identifier: Apache-2.0
"""The values that a composition takes, where the bounds of an inner part limit them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from pyro.distributions.transforms import BatchNorm as PyroBatchNorm
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

from .bijection import Bijection, Conditioned, Inverse
from .foreign import Foreign
from .normalization import BatchNorm
from .reshape import Permute
from .shapes import Region, bounds, differs, for_inner_axes, inner_point, real_events, strictly_inside

Bounds = tuple[Tensor | float | None, Tensor | float | None]


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
    if any(_is_limited(link.part.codomain) for link in chain[:-1]) or last.codomain is not last.codomain:
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
    for before, (part, _) in pairwise(chain):
        is_region = box is None and isinstance(before.part.codomain, Region)
        box = box or bounds(before.part.codomain)
        if not is_region and _covers(box, part.domain):
            box = None
            continue
        if _moves(part) or part.context_dim:
            return space
        box = None if is_region else _carried(box, part)
        if box is None:
            return _Reached(chain, space.event_dim)
    return space if box is None else _between(*box, space)


def _is_limited(space: constraints.Constraint) -> bool:
    return isinstance(space, Region) or any(bound is not None for bound in bounds(space))


def _covers(box: Bounds, domain: constraints.Constraint) -> bool:
    """Whether all values of a domain lie between some bounds, up to rounding."""
    for sign, bound, end in zip((1, -1), box, bounds(domain)):
        if bound is not None:
            bound = torch.as_tensor(bound)
            end = torch.as_tensor(-sign * torch.inf if end is None else end).to(bound)
            if ((sign * end < sign * bound) & differs(end, bound)).any():
                return False
    return True


def _with_axes(space: constraints.Constraint, count: int) -> constraints.Constraint:
    """The space of events with so many more axes than those of `space`."""
    return constraints.independent(space, count) if count else space


def _at(link: Link, context: Tensor | None) -> Bijection:
    if context is None or not link.part.context_dim:
        return link.part
    return link.part.condition(for_inner_axes(context, link.extra_dims))


def _moves(part: Bijection) -> bool:
    """Whether an evaluation changes the part, or the next one will."""
    return any(
        (isinstance(module, Bijection) and module.needs_data)
        or (module.training and isinstance(module, (BatchNorm, PyroBatchNorm)))
        for module in part.modules()
    )


def _carried(box: Bounds, part: Bijection) -> Bounds | None:
    """The bounds after a part, None if they are not known to be bounds of the entries."""
    f = _of_entries(part)
    if f is None:
        return None
    like = next(bound for bound in box if bound is not None)
    like = like if isinstance(like, Tensor) else torch.tensor(like, dtype=torch.get_default_dtype())
    ends = [torch.as_tensor(i if b is None else b).to(like) for i, b in zip((-torch.inf, torch.inf), box)]
    one, other = (f(end) for end in ends)
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    return None if (low.isnan() | high.isnan()).any() else (low, high)


def _of_entries(part: Bijection) -> Callable[[Tensor], Tensor] | None:
    """A part as a monotone function of each entry by itself, or as a permutation of them."""
    inner, forward = part, True
    while isinstance(inner, (Inverse, Conditioned)):
        forward ^= isinstance(inner, Inverse)
        inner = inner.bijection
    if isinstance(inner, Foreign) and isinstance(inner.transform, AffineTransform):
        loc, scale = inner.transform.loc, inner.transform.scale
        return (lambda end: loc + scale * end) if forward else (lambda end: (end - loc) / scale)
    is_known = isinstance(inner, Permute) or (inner.elementwise and hasattr(inner, "sign"))
    if not is_known or None in part.event_shape:
        return None
    return lambda end: part.forward_and_ladj(_expanded(end, part.event_shape))[0]


def _expanded(end: Tensor, shape: tuple[int, ...]) -> Tensor:
    return end if end.dim() > len(shape) else end.expand(shape)


def _between(low: Tensor, high: Tensor, codomain: constraints.Constraint) -> constraints.Constraint:
    if (low == -torch.inf).all() and (high == torch.inf).all():
        return codomain
    if (high == torch.inf).all():
        space = constraints.greater_than(low)
    elif (low == -torch.inf).all():
        space = constraints.less_than(high)
    else:
        space = constraints.interval(low, high)
    return constraints.independent(space, codomain.event_dim) if codomain.event_dim else space


class _Reached(Region):
    """The values from which each link of a chain leads back to a value between the bounds of the one before it."""

    def __init__(self, chain: list[Link], event_dim: int):
        self.chain = chain
        self.event_dim = event_dim

    def __repr__(self) -> str:
        return f"Reached({' -> '.join(', '.join(link.part._kinds()) for link in self.chain)})"

    def check(self, value: Tensor) -> Tensor:
        """Which events are such values."""
        result: Tensor | bool = True
        for link in reversed(self.chain):
            inside = strictly_inside(link.part.codomain, value)
            if inside is not None:
                result = result & inside.flatten(inside.dim() - link.event_dim).all(-1)
                value = torch.where(inside, value, inner_point(link.part.codomain, value))
            value = link.part._evaluate(value, forward=False, remember=False)[0]
        return result

    def point(self, like: Tensor) -> Tensor:
        """A value in the region for each of others."""
        shape = like.shape
        for link in reversed(self.chain):
            shape = link.part.inverse_shape(shape)
        value = inner_point(self.chain[0].part.domain, like).expand(shape)
        for link in self.chain:
            value = link.part._evaluate(value, forward=True, remember=False)[0]
        return value
