# SPDX-License-Identifier: Apache-2.0
"""Where a guide starts: the best normal approximation on the way to a mode."""

import math
import warnings
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .agreement import check
from .coordinates import FromRelative
from .curvature import Surface, eigen_directions, least_curvature, newton
from .density import LogDensity
from .normals import FullNormal, Normal, isotropic
from .relative import Relative, prior_curvature
from .sites import unpack

_MAX_HALVINGS = 40
_PATIENCE = 8  # steps without a better normal after which the path is given up, since it leads into a trap
_ENOUGH = 1e-4  # nats, the least gain that a step must promise


class Start(NamedTuple):
    """Where a guide starts."""

    normal: Normal
    elbo: float
    """The ELBO of the normal, in nats."""


def warm_start(density: LogDensity, loc: Tensor, init_scale: float) -> Start | None:
    """:func:`find_start`, in double precision if the model can be evaluated in it. Returns None if it fails."""
    for dtype in dict.fromkeys((torch.float64, loc.dtype)):
        start, density.relative = loc.to(dtype), {}
        try:
            with torch.random.fork_rng():
                check(density, start + 1e-3 * torch.randn(2, len(loc)).to(start))
                return find_start(density, start, init_scale)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # mixed types, or no second derivative
            problem = error
    density.relative = {}
    warnings.warn(
        f"no warm start, since the model's log-density could not be differentiated twice ({problem}): "
        f"the guide starts at init_loc_fn with init_scale={init_scale}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def find_start(density: LogDensity, loc: Tensor, init_scale: float) -> Start:
    """Finds the normal at which a guide starts, and sets ``density.relative``, the coordinates in which it is normal.

    Args:
        density: the log-density of the model.
        loc: the point at which the search begins, in plain unconstrained coordinates.
        init_scale: the deviation of the first candidate.
    """
    names = density.relative_sites(torch.stack([loc, loc + 0.5]))
    nothing = {name: torch.zeros(density.sites[name].shape).to(loc) for name in names}
    density.relative = {name: Relative(zero, zero) for name, zero in nothing.items()}
    start = FromRelative(density).inv(loc) if names else loc
    best, elbo = best_normal(Surface(density), isotropic(start, init_scale))
    if not names:
        _warn_of_flat_directions(density, best)
        return Start(best, elbo)
    # The search in non-centered coordinates, which have no funnel, has found where the latents are. The curvature of
    # the likelihood at that point gives coordinates that suit groups with many data and groups with few.
    non_centered, found = density.relative, FromRelative(density)(best.loc)
    density.relative = pseudo_observations(density, found)
    other, others_elbo = best_normal(Surface(density), isotropic(FromRelative(density).inv(found), init_scale))
    if others_elbo > elbo:
        best, elbo = other, others_elbo
    else:
        density.relative = non_centered
    _warn_of_flat_directions(density, best)
    return Start(best, elbo)


def _warn_of_flat_directions(density: LogDensity, normal: Normal) -> None:
    """Names the latents along which the log-density does not change."""
    surface, entries = Surface(density), torch.arange(density.dim)
    if isinstance(normal, FullNormal):
        _, hessian = surface.derivatives(normal.loc, torch.eye(density.dim).to(normal.loc))
        values, directions = eigen_directions(hessian)
        flat = directions[:, values.abs() < least_curvature(values)]
    else:
        flat = torch.nn.functional.one_hot(entries[surface.diagonal(normal.loc, entries)[1] == 0], density.dim).mT
    is_flat = entries < 0
    for direction in flat.to(normal.loc).unbind(1):
        # A second derivative of 0 is not enough, since it has it too where the log-density is a straight line.
        with torch.no_grad():
            near = surface(normal.loc + torch.tensor([[-3.0], [0.0], [3.0]]).to(normal.loc) * direction)
        if (near - near[1]).abs().max() < 1e-6 * (1 + near[1].abs()):
            is_flat |= direction.abs() > 0.3 * direction.abs().max()
    if is_flat.any():
        names = [name for name, own in unpack(entries, density.sites).items() if is_flat[own].any()]
        warnings.warn(
            f"the log-density does not change along a direction of the latents {names}, so the posterior may be "
            "improper there, and the guide starts with a deviation of its own choice: give them proper priors, or drop "
            "what has no influence",
            RuntimeWarning,
            stacklevel=2,
        )


def pseudo_observations(density: LogDensity, point: Tensor) -> dict[str, Relative]:
    """Relative coordinates in which a normal stands for the likelihood of each latent.

    The likelihood is everything but the latent's own prior. The normal has its slope and its curvature at one point.

    Args:
        density: the log-density, whose relative sites are known.
        point: the point, in plain unconstrained coordinates.
    """
    plain = copy(density)
    plain.relative = {}
    offsets = unpack(torch.arange(density.dim), density.sites)
    trace, place = plain.run(point)
    surface, found = Surface(plain), {}
    for name in density.relative:
        site, entries = density.sites[name], offsets[name]
        gradient, curvature = surface.diagonal(point, entries)
        with torch.enable_grad():
            t = place.unconstrained[name].detach().requires_grad_()
            fn = trace.nodes[name]["fn"]
            value, ladj = site.constrain(name, fn, t)
            prior = fn.log_prob(value).sum() + ladj.sum()
            (slope,) = torch.autograd.grad(prior, t, create_graph=True)
            bend = prior_curvature(fn, t, slope).detach()
        precision = site.unpack(curvature + site.pack(bend)).clamp(min=0.0)
        slope = site.unpack(-gradient - site.pack(slope.detach()))
        found[name] = Relative(precision, slope + precision * t.detach())
    return found


def best_normal(
    surface: Surface, start: Normal, *, max_steps: int = 50, num_samples: int = 200
) -> tuple[Normal, float]:
    r"""The normal :math:`N(x - H^{-1} \nabla U,\, H^{-1})` with the highest ELBO, over the points x on the path of
    Newton's method that minimizes :math:`U = -\log p`.

    This is Pathfinder (Zhang et al. 2022) with exact Hessians. Newton's steps do not depend on the scales and
    correlations of the coordinates. They are halved until U falls, so that they stay inside the support. A mode that is
    a trap, such as the neck of a funnel, where the density grows without bound in an ever smaller region, loses to an
    earlier point of the path.

    Args:
        surface: the log-density, finite at the start.
        start: the first candidate, from whose loc the path starts.
        max_steps: the largest number of steps.
        num_samples: half of the number of draws for the ELBO of a candidate.

    Returns:
        The normal and its ELBO, in nats.
    """
    noise = torch.randn(num_samples, len(start.loc), dtype=start.loc.dtype, device=start.loc.device)
    # The noise is used with both signs. Its mean is then exact, which removes much of the noise of the comparison.
    noise = torch.cat([noise, -noise])

    @torch.no_grad()
    def elbo(normal: Normal) -> float:
        total = (surface(normal.draw(noise)).mean() + normal.log_det()).item()
        return total if math.isfinite(total) else -math.inf

    best, best_elbo, best_step = start, elbo(start), 0

    def consider(candidate: Normal, step: int) -> None:
        nonlocal best, best_elbo, best_step
        value = elbo(candidate)
        if value > best_elbo:
            best, best_elbo, best_step = candidate, value, step

    def potential_at(x: Tensor) -> float:
        with torch.no_grad():
            return -surface(x.unsqueeze(0)).item()

    x, potential, normal = start.loc, potential_at(start.loc), start
    for k in range(max_steps):
        if k - best_step > _PATIENCE:
            break
        found = newton(surface, x)
        if found is None:
            break
        gradient, step, normal = found
        consider(normal, k)
        consider(normal.at(x + step), k)
        decrement = -(gradient @ step).item()
        if decrement < _ENOUGH:
            break
        for halvings in range(_MAX_HALVINGS):
            size = 0.5**halvings
            new = potential_at(x + size * step)
            if new <= potential - 1e-4 * size * decrement:
                break
        else:
            break
        x, potential = x + size * step, new
    consider(normal.at(x).diagonal(), max_steps)  # in case the curvature at x misleads about the correlations
    for shrunk in (0.7, 0.5, 0.3, 0.1):  # in case the tails are lighter than the curvature says
        consider(normal.at(x).shrunk(shrunk), max_steps)
    return best, best_elbo + len(start.loc) / 2 * (1 + math.log(2 * math.pi))
