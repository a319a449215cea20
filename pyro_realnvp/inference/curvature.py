# SPDX-License-Identifier: Apache-2.0
"""Derivatives of a model's log-density, and Newton's steps on it."""

import torch
from torch import Tensor

from ..bijections.linear import triangular_root
from .density import LogDensity
from .normals import LARGEST_FULL, FullNormal, LowRankNormal, Normal
from .subsampling import Pass

_RANK = 50  # directions of the Hessian that are found where it is not computed as a whole
_MOST_EXACT = 2000  # entries of a diagonal that are computed one by one
_PROBES, _ROUNDS = 50, 3  # random vectors for a longer diagonal, and how often its scales are improved


class Surface:
    """The log-density of a model and its derivatives, with all rows of subsampled plates, or with as many as are
    affordable."""

    def __init__(self, density: LogDensity):
        self.density = density
        self.passes: list[Pass] = density.passes()

    def __call__(self, points: Tensor) -> Tensor:
        return self.density.mean_over(points, self.passes)

    def derivatives(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of -log p at x, and the products of the Hessian of -log p with the rows of `vectors`."""
        pieces = vectors.split(max(1, self.density.piece // 2))
        gradients, products = zip(*(self._products(x, piece) for piece in pieces))
        return gradients[0], torch.cat(products)

    def diagonal(self, x: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of -log p at x and the diagonal of its Hessian, in some of the entries."""
        if len(entries) <= _MOST_EXACT:
            vectors = torch.nn.functional.one_hot(entries, len(x)).to(x)
            gradient, products = self.derivatives(x, vectors)
            return gradient[entries], (vectors * products).sum(1)
        # Hutchinson's estimate: for random signs v, the mean of v * Hv is the diagonal of H. The signs are multiplied
        # by scales, since the noise in an entry comes from the other entries, whose scales may be much larger.
        scales = torch.ones(len(entries)).to(x)
        for _ in range(_ROUNDS):
            vectors = torch.zeros(_PROBES, len(x)).to(x)
            vectors[:, entries] = scales * (torch.randint(2, (_PROBES, len(entries))).to(x) * 2 - 1)
            gradient, products = self.derivatives(x, vectors)
            diagonal = (vectors * products)[:, entries].mean(0) / scales.square()
            scales = scales_of(diagonal)
        return gradient[entries], diagonal

    def _products(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        gradient, product = 0.0, 0.0
        for weight, rows in self.passes:  # one after the other, so that only one graph is in memory
            with torch.enable_grad():
                points = x.detach().expand(vectors.shape).clone().requires_grad_()
                potential = -self.density(points, rows).sum()
                (first,) = torch.autograd.grad(potential, points, create_graph=True)
                second = (
                    torch.autograd.grad((first * vectors).sum(), points, materialize_grads=True)[0]
                    if first.requires_grad
                    else torch.zeros_like(points)
                )
            gradient = gradient + weight * first[0].detach()
            product = product + weight * second
        return gradient, product


def newton(surface: Surface, x: Tensor) -> tuple[Tensor, Tensor, Normal] | None:
    """The gradient of -log p at x, the step, and the normal with the curvature at x; None where one is not finite.

    Where the Hessian is not positive, the absolute values of its eigenvalues are taken (Dauphin et al. 2014).
    """
    return _full_newton(surface, x) if len(x) <= LARGEST_FULL else _krylov_newton(surface, x)


def _full_newton(surface: Surface, x: Tensor) -> tuple[Tensor, Tensor, FullNormal] | None:
    """Newton's step by the whole Hessian."""
    gradient, hessian = surface.derivatives(x, torch.eye(len(x)).to(x))
    if not (gradient.isfinite().all() and hessian.isfinite().all()):
        return None
    values, directions = eigen_directions(hessian)
    root = directions * _positive(values).rsqrt()  # root root^T is the inverse of the Hessian
    step = -root @ (root.mT @ gradient)
    return gradient, step, FullNormal(x, triangular_root(root))


def eigen_directions(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a Hessian whose diagonal is scaled to 1, and its eigenvectors in the unscaled coordinates.

    Without the scales, the rounding of the largest eigenvalue could hide the smallest one.
    """
    hessian = (hessian + hessian.mT) / 2
    scale = scales_of(hessian.diagonal())
    values, vectors = torch.linalg.eigh(scale[:, None] * hessian * scale)
    return values, scale[:, None] * vectors


def _krylov_newton(surface: Surface, x: Tensor) -> tuple[Tensor, Tensor, LowRankNormal] | None:
    """Newton's step by the diagonal of the Hessian, and by its eigenvectors in a Krylov space (Lanczos)."""
    gradient, diagonal = surface.diagonal(x, torch.arange(len(x)))
    if not (gradient.isfinite().all() and diagonal.isfinite().all()):
        return None
    scale = scales_of(diagonal)
    scaled = scale * gradient
    basis = [_unit(_unit(scaled) + _unit(torch.randn_like(x)))]
    images = []
    for _ in range(_RANK):
        _, (product,) = surface.derivatives(x, (scale * basis[-1]).unsqueeze(0))
        images.append(scale * product)
        space = torch.stack(basis)
        rest = images[-1] - space.mT @ (space @ images[-1])
        rest = rest - space.mT @ (space @ rest)  # a second time, against rounding
        if rest.norm() < 1e-6 * images[-1].norm():
            break
        basis.append(_unit(rest))
    space = torch.stack(basis[: len(images)], 1)
    projected = space.mT @ torch.stack(images, 1)
    if not projected.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    values, directions = _positive(values), space @ vectors
    along = directions.mT @ scaled
    step = -scale * (scaled + directions @ (along * (1 / values - 1)))
    return gradient, step, LowRankNormal(x, scale, directions, values.rsqrt())


def scales_of(diagonal: Tensor) -> Tensor:
    """The scales of the coordinates that make the diagonal of a Hessian 1."""
    diagonal = diagonal.abs()
    return torch.where(diagonal > 0, diagonal, 1.0).rsqrt()


def _positive(values: Tensor) -> Tensor:
    """The absolute values of the eigenvalues, and 1 along flat directions."""
    return torch.where(values.abs() < least_curvature(values), 1.0, values.abs())


def least_curvature(values: Tensor) -> float:
    """The smallest eigenvalue that is not just rounding, for a Hessian whose diagonal is 1."""
    return 1e-11 if values.dtype == torch.float64 else 1e-6


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm > 0 else vector
