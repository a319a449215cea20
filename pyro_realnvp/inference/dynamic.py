# SPDX-License-Identifier: Apache-2.0
"""Whether the supports of latents depend on other latents, on arguments or on parameters."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from .density import LogDensity

_NUM_FAR, _FAR = 8, 3.0  # how many points, and how far from the start, show where supports depend on latents


def are_dynamic(
    density: LogDensity,
    start: Tensor,
    by_prototype: Callable[[Tensor], dict[str, Tensor]],
    step: Tensor | float = 0.5,
) -> bool:
    """Whether the supports have a graph, or give other values at a point than those of the prototype.

    Args:
        density: the log-density of the model.
        start: a point, in plain unconstrained coordinates.
        by_prototype: the values of each site at a point in the supports of the prototype.
        step: the way from the start to the point.
    """
    with torch.enable_grad():
        point = start.detach().requires_grad_() + torch.as_tensor(step).to(start)
        trace, place = density.run(point, relative={})
        values = by_prototype(point)
        for name, site in density.sites.items():
            at_fixed, _ = site.constrain(name, trace.nodes[name]["fn"], place.unconstrained[name].detach())
            own = place.values[name].to(values[name])
            if at_fixed.requires_grad or not torch.allclose(values[name], own, equal_nan=True):
                return True
    return False


def are_dynamic_far_away(density: LogDensity, start: Tensor, by_prototype: Callable[[Tensor], dict]) -> bool:
    """Whether they do so at some points only: a support that one of two branches of the model chooses has no graph."""
    with torch.random.fork_rng():
        for step in _FAR * torch.randn(_NUM_FAR, len(start), generator=torch.Generator().manual_seed(0)):
            with suppress(Exception):  # of a model that cannot be evaluated so far away
                if are_dynamic(density, start, by_prototype, step):
                    return True
    return False
