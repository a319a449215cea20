# SPDX-License-Identifier: Apache-2.0
"""Helpers for shapes: event axes, broadcasting with a context, and squeezing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from .modes import is_eager


def real_events(event_dim: int) -> constraints.Constraint:
    """Returns the constraint of real-valued events with `event_dim` axes."""
    return constraints.independent(constraints.real, event_dim) if event_dim else constraints.real


def differs(x: Tensor, other: Tensor) -> Tensor:
    """Whether values differ by more than rounding."""
    if not x.is_floating_point():
        return x != other
    return (x - other).abs() > 8 * torch.finfo(x.dtype).eps * other.abs()


def sum_events(x: Tensor, event_dim: int) -> Tensor:
    """Returns the sum over the last `event_dim` axes."""
    return x.sum(tuple(range(-event_dim, 0))) if event_dim else x


def channel_events(channels: int, event_dim: int) -> tuple[int | None, ...]:
    """Returns the shape of events whose first axis holds the channels and whose other axes have any size."""
    if event_dim < 1:
        raise ValueError(f"expected event_dim >= 1: 1 for vectors, 3 for images; got {event_dim}")
    return (channels,) + (None,) * (event_dim - 1)


def along_channels(values: Tensor, event_dim: int) -> Tensor:
    """Reshapes a vector with one entry per channel, so that it broadcasts with events whose first axis is channels."""
    return values.reshape(-1, *(1,) * (event_dim - 1))


def positions(x: Tensor, event_dim: int) -> int:
    """Returns the number of positions of each channel of an event: H W for an image, 1 for a vector."""
    return x.shape[x.dim() - event_dim + 1 :].numel()


def broadcast_batch(x: Tensor, context: Tensor | None, event_dim: int = 1) -> Tensor:
    """Expands x to the batch shape that its own and the context's batch shape broadcast to."""
    if context is None or context.dim() == 1:
        return x
    batch_dim = x.dim() - event_dim
    batch_shape = torch.broadcast_shapes(x.shape[:batch_dim], context.shape[:-1])
    return x if batch_shape == x.shape[:batch_dim] else x.expand(batch_shape + x.shape[batch_dim:])


def for_inner_axes(context: Tensor | None, count: int) -> Tensor | None:
    """The context for a bijection that treats `count` axes of the events as batch axes: it is the same along them."""
    return context if context is None else context.reshape(context.shape[:-1] + (1,) * count + context.shape[-1:])


def squeeze(x: Tensor, factor: int = 2) -> Tensor:
    """Moves space to channels: (..., C, H, W) to (..., C f^2, H / f, W / f).

    It replaces torch.nn.functional.pixel_unshuffle, which returns a wrong shape for an empty batch.
    """
    channels, height, width = x.shape[-3:]
    x = x.reshape(x.shape[:-3] + (channels, height // factor, factor, width // factor, factor))
    return x.movedim((-3, -1), (-4, -3)).flatten(-5, -3)


def unsqueeze(x: Tensor, factor: int = 2) -> Tensor:
    """Moves channels to space, as the inverse of `squeeze`."""
    x = x.unflatten(-3, (-1, factor, factor)).movedim((-4, -3), (-3, -1))
    return x.flatten(-4, -3).flatten(-2, -1)


Bounds = tuple[Tensor | float | None, Tensor | float | None]


class Region(constraints.Constraint):
    """Events that are not all those between some bounds of their entries."""

    is_discrete = False

    def point(self, like: Tensor) -> Tensor:
        """A value in the region for each event of a tensor."""
        raise NotImplementedError


def of_entries(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint of single entries from which those of vectors and images are made."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def bounds(constraint: constraints.Constraint) -> Bounds:
    """The lower and the upper bound of the entries, None where there is none."""
    constraint = of_entries(constraint)
    if isinstance(constraint, (constraints.cat, constraints.stack)) and constraint.dim == -1:
        sizes = getattr(constraint, "lengths", [1] * len(constraint.cseq))
        lows, highs = zip(*map(bounds, constraint.cseq))
        return _joined(lows, sizes, -torch.inf), _joined(highs, sizes, torch.inf)
    return getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)


def _joined(parts: Sequence[Tensor | float | None], sizes: Sequence[int], default: float) -> Tensor | None:
    if all(bound is None for bound in parts):
        return None
    bounds = (torch.as_tensor(default if bound is None else bound) for bound in parts)
    return torch.cat([bound.expand(size) for bound, size in zip(bounds, sizes, strict=True)])


def is_limited(space: constraints.Constraint) -> bool:
    """Whether a space holds only some of the vectors of its kind."""
    return isinstance(space, Region) or any(bound is not None for bound in bounds(space))


def covers(box: Bounds, other: Bounds) -> bool:
    """Whether all numbers between other bounds lie between these, up to rounding."""
    pairs = [(sign, b, e) for sign, b, e in zip((1, -1), box, other) if b is not None]
    tensors = [end for _, *ends in pairs for end in ends if isinstance(end, Tensor)]
    if tensors and not is_eager(*tensors):
        return False  # which neither compiled nor mapped code can ask; the values are then found by the general way
    for sign, bound, end in pairs:
        end = -sign * torch.inf if end is None else end
        if isinstance(bound, Tensor) or isinstance(end, Tensor):
            bound = torch.as_tensor(bound)
            end = torch.as_tensor(end).to(bound)
            if ((sign * end < sign * bound) & differs(end, bound)).any():
                return False
        elif sign * end < sign * bound:
            return False
    return True


def strictly_inside(constraint: constraints.Constraint, value: Tensor) -> Tensor | None:
    """Which entries of a value lie between their bounds; None if the constraint has no bounds.

    Those on a bound do not, except in ``greater_than_eq``. In a region, all entries of an event do, or none.
    """
    if isinstance(constraint, Region):
        inside = constraint.check(value)
        return inside.reshape(inside.shape + (1,) * constraint.event_dim).expand_as(value)
    low, high = bounds(constraint)
    if low is None and high is None:
        return None
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        low = torch.as_tensor(low).to(value)
        is_closed = isinstance(of_entries(constraint), constraints.greater_than_eq)
        inside = inside & (value >= low if is_closed else value > low)
    if high is not None:
        inside = inside & (value < torch.as_tensor(high).to(value))
    return inside


def inner_point(constraint: constraints.Constraint, like: Tensor) -> Tensor:
    """For each entry a number between its bounds."""
    if isinstance(constraint, Region):
        return constraint.point(like)
    low, high = (torch.as_tensor(torch.nan if bound is None else bound).to(like) for bound in bounds(constraint))
    from_below, from_above = low.isfinite(), high.isfinite()
    one_sided = torch.where(from_below, low + 1, torch.where(from_above, high - 1, 0.0))
    return torch.where(from_below & from_above, (low + high) / 2, one_sided)
