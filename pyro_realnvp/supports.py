# SPDX-License-Identifier: Apache-2.0
"""Supports of distributions that torch and Pyro do not name, or not as the density is."""

import copy
import math

import pyro.distributions as dist
import torch
from torch import distributions as td
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from .bijections.shapes import of_entries

_ANGLES = (td.VonMises, dist.SineBivariateVonMises)
_WRAPPERS = (td.Independent, dist.MaskedDistribution, dist.ExpandedDistribution, dist.SineSkewed)


def circle_of(fn: td.Distribution) -> constraints.Constraint | None:
    """One period of a density of angles, which repeats itself on the real line, where torch and Pyro see its support.

    None for any other distribution.
    """
    if isinstance(fn, _ANGLES):
        return constraints.interval(-math.pi, math.pi)
    if isinstance(fn, _WRAPPERS):
        return circle_of(fn.base_dist)
    if isinstance(fn, td.MixtureSameFamily):
        return circle_of(fn.component_distribution)
    if isinstance(fn, dist.MaskedMixture):
        return circle_of(fn.component0) and circle_of(fn.component1)
    if isinstance(fn, dist.FoldedDistribution):
        circle = circle_of(fn.base_dist)
        is_centered = circle is not None and bool((torch.as_tensor(circle.lower_bound + circle.upper_bound) == 0).all())
        return constraints.interval(0.0, circle.upper_bound) if is_centered else None
    if isinstance(fn, td.TransformedDistribution):
        return _image(circle_of(fn.base_dist), td.ComposeTransform(fn.transforms), fn.base_dist.event_shape)
    return None


def plain(fn: td.Distribution) -> td.Distribution:
    """A distribution without the wrappers of batches, events and masks."""
    while isinstance(fn, (td.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def period_of(fn: td.Distribution) -> constraints.Constraint | None:
    """The interval of the values of an angle, or of a uniform distribution. None for other distributions."""
    return of_entries(fn.support) if isinstance(plain(fn), td.Uniform) else circle_of(fn)


def angles(fn: td.Distribution) -> torch.Tensor:
    """Which entries of a value are angles, or uniform over a full turn, in radians or degrees."""
    if not isinstance(plain(fn), td.Uniform):
        return torch.tensor(circle_of(fn) is not None and not _is_folded(fn))
    period = period_of(fn)
    length = torch.as_tensor(period.upper_bound - period.lower_bound)
    return torch.isclose(length, torch.full_like(length, 2 * math.pi)) | torch.isclose(
        length, torch.full_like(length, 360.0)
    )


def _is_folded(fn: td.Distribution | None) -> bool:
    """Whether a distribution is of angles that are reflected at the ends of half a period, and do not go round."""
    while fn is not None and not isinstance(fn, dist.FoldedDistribution):
        inner = ("base_dist", "component_distribution", "component0")
        fn = next((getattr(fn, name) for name in inner if hasattr(fn, name)), None)
    return fn is not None


def turned(fn: td.Distribution, value: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Angles that are turned by a part of their period. What leaves the interval at one end comes in at the other.

    Entries whose part is 0 stay as they are.
    """
    period = period_of(fn)
    length = period.upper_bound - period.lower_bound
    share = ((value - period.lower_bound) / length + turn.to(value)) % 1
    result = period.lower_bound + length * share.clamp(max=1 - torch.finfo(value.dtype).eps)
    return torch.where(turn.to(value.device) == 0, value, result)


def _image(
    circle: constraints.Constraint | None, transform: td.Transform, event_shape: torch.Size
) -> constraints.Constraint | None:
    """What a monotone function of each entry makes of an interval."""
    if circle is None:
        return None
    try:
        rises = torch.as_tensor(transform.sign) > 0
    except (NotImplementedError, AttributeError):
        return None
    ends = [torch.as_tensor(end, dtype=torch.get_default_dtype()) for end in (circle.lower_bound, circle.upper_bound)]
    if transform.domain.event_dim:
        ends = [end.expand(torch.broadcast_shapes(end.shape, event_shape)) for end in ends]
    first, last = map(transform, ends)
    return constraints.interval(torch.where(rises, first, last), torch.where(rises, last, first))


@biject_to.register(MixtureSameFamilyConstraint)
@transform_to.register(MixtureSameFamilyConstraint)
def _coordinates_of_mixture(support: MixtureSameFamilyConstraint) -> td.Transform:
    """The unconstrained coordinates of a mixture whose components have one support."""
    of_components = support.base_constraint
    entries, dim = of_entries(of_components), -1 - of_components.event_dim
    for name in ("lower_bound", "upper_bound"):
        bound = getattr(entries, name, None)
        if isinstance(bound, torch.Tensor) and bound.dim() >= -dim:  # it has an axis of the components
            if (bound != bound.narrow(dim, 0, 1)).any():
                raise NotImplementedError("the components of a mixture have bounds of their own")
            entries = copy.copy(entries)
            setattr(entries, name, bound.select(dim, 0))
    more = of_components.event_dim - entries.event_dim
    return biject_to(constraints.independent(entries, more) if more else entries)
