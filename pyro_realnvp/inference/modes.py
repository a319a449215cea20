# SPDX-License-Identifier: Apache-2.0
"""Several modes of a posterior: the distinct normals to which different starts lead, and their mixture."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..bases import MixtureBase
from ..bijections.bijection import Bijection
from .coordinates import FromRelative
from .curvature import Surface
from .density import LogDensity
from .normals import FullNormal, Normal, isotropic
from .warm_start import Start, best_normal

_APART = 4.0  # deviations between the locations of two modes
_BARRIER = 1.0  # nats, by which the density between two modes is lower than at either
_LEAST_WEIGHT = 1e-3
_POINTS_BETWEEN = 21


class Modes(NamedTuple):
    """The distinct normals, the most probable one first."""

    normals: list[Normal]
    weights: Tensor
    """The probability of each, by its ELBO."""


def find_modes(density: LogDensity, start: Start, points: Tensor, init_scale: float) -> Modes:
    """Follows Newton's path from each point, and keeps the normals that are modes of their own.

    Args:
        density: the log-density of the model.
        start: the normal that the guide has found from its own starting value.
        points: the other starts, ``(N, D)``, in plain unconstrained coordinates.
        init_scale: the deviation of the first candidate of each path.
    """
    points = points.to(start.normal.loc)
    if density.relative:
        points = FromRelative(density).inv(points)
    surface, found = Surface(density), [(start.normal, start.elbo)]
    for point in points:
        if surface(point.unsqueeze(0)).isfinite():
            found.append(best_normal(surface, isotropic(point, init_scale)))
    found.sort(key=lambda pair: pair[1], reverse=True)
    kept: list[tuple[Normal, float]] = []
    for normal, elbo in found:
        if all(_are_apart(surface, normal, other) for other, _ in kept):
            kept.append((normal, elbo))
    weights = torch.tensor([elbo for _, elbo in kept], dtype=torch.float64).softmax(0)
    kept = [pair for pair, weight in zip(kept, weights) if weight > _LEAST_WEIGHT]
    weights = weights[: len(kept)]
    return Modes([normal for normal, _ in kept], weights / weights.sum())


@torch.no_grad()
def _are_apart(surface: Surface, one: Normal, other: Normal) -> bool:
    """Whether two normals are far from each other, with a barrier between them."""
    between = one.loc.lerp(other.loc, torch.linspace(0, 1, _POINTS_BETWEEN).to(one.loc).unsqueeze(-1))
    trils = torch.stack([one.scale_tril, other.scale_tril])
    distances = torch.linalg.solve_triangular(trils, (other.loc - one.loc)[:, None], upper=False).norm(dim=(-2, -1))
    log_p = surface(between)
    return bool(distances.min() > _APART) and bool(log_p.min() < torch.minimum(log_p[0], log_p[-1]) - _BARRIER)


def mixture_of(modes: Modes, full: bool) -> tuple[MixtureBase, Bijection]:
    """A mixture of the normals, and the affine map to it that gives it mean 0 and standard deviation 1."""
    locs = torch.stack([normal.loc for normal in modes.normals])
    trils = torch.stack([normal.scale_tril for normal in modes.normals])
    if not full:
        trils = trils.square().sum(-1).sqrt().diag_embed()
    weights = modes.weights.to(locs)
    mean = weights @ locs
    centered = locs - mean
    covariance = torch.einsum("k,kij,klj->il", weights, trils, trils) + (weights[:, None] * centered).mT @ centered
    tril = torch.linalg.cholesky(covariance) if full else covariance.diagonal().sqrt().diag()
    base = MixtureBase(len(mean), num_components=len(locs), full=full).to(locs)
    base.start_at(
        weights,
        torch.linalg.solve_triangular(tril, centered.mT, upper=False).mT,
        torch.linalg.solve_triangular(tril.expand_as(trils), trils, upper=False),
    )
    return base, FullNormal(mean, tril).bijection(full)
