# SPDX-License-Identifier: Apache-2.0
"""Where a guide starts: the best normal approximation on the way to a mode."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_HALVINGS = 40
_PATIENCE = 8  # steps without a better normal: the way leads into a trap
_ENOUGH = 1e-4  # nats that the next step promises


class Normal(NamedTuple):
    """A multivariate normal: mean, and lower triangular factor of the covariance."""

    loc: Tensor
    scale_tril: Tensor


def best_normal(
    log_density: Callable[[Tensor], Tensor], start: Normal, *, max_steps: int = 50, num_samples: int = 25
) -> Normal:
    r"""The normal :math:`N(x - H^{-1} \nabla U,\, H^{-1})` with the highest ELBO among the points x on the way of
    Newton's method downhill :math:`U = -\log p`, and the one given.

    (Pathfinder, Zhang et al. 2022, with exact Hessians.) Newton's steps do not depend on the scales and correlations of
    the coordinates; where the Hessian is not positive, the absolute values of its eigenvalues are taken
    (Dauphin et al. 2014). Steps are halved until U falls, so that they stay inside the support. A mode that is a trap,
    such as the neck of a funnel, where the density grows without end in an ever smaller place, loses to an earlier
    point.

    Args:
        log_density: of one point, ``(D,)``, up to a constant; finite at the start.
        start: its loc is where the way starts.
    """
    noise = torch.randn(num_samples, *start.loc.shape, dtype=start.loc.dtype, device=start.loc.device)
    # Sums of +e and -e have the right mean, which takes much of the noise out of the comparison.
    noise = torch.cat([noise, -noise])

    @torch.no_grad()
    def elbo(normal: Normal) -> float:
        total = normal.scale_tril.diagonal().log().sum().item()
        for e in noise:
            total += log_density(normal.loc + normal.scale_tril @ e).item() / len(noise)
        return total if math.isfinite(total) else -math.inf

    best, best_elbo, best_step = start, elbo(start), 0

    def consider(candidate: Normal, step: int) -> None:
        nonlocal best, best_elbo, best_step
        value = elbo(candidate)
        if value > best_elbo:
            best, best_elbo, best_step = candidate, value, step

    scale_tril = start.scale_tril
    x, potential = start.loc, -log_density(start.loc).item()
    for k in range(max_steps):
        if k - best_step > _PATIENCE:
            break
        gradient, hessian = _derivatives(log_density, x)
        if not (gradient.isfinite().all() and hessian.isfinite().all()):
            break
        step, scale_tril = _newton(gradient, hessian)
        consider(Normal(x, scale_tril), k)
        consider(Normal(x + step, scale_tril), k)
        decrement = -(gradient @ step).item()
        if decrement < _ENOUGH:
            break
        for halvings in range(_MAX_HALVINGS):
            size = 0.5**halvings
            new = -log_density(x + size * step).item()
            if new <= potential - 1e-4 * size * decrement:
                break
        else:
            break
        x, potential = x + size * step, new
    for shrunk in (0.7, 0.5, 0.3, 0.1):  # where the tails are lighter than the curvature at the mode says
        consider(Normal(x, shrunk * scale_tril), max_steps)
    return best


def _derivatives(log_density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of -log p."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-log_density(x), x, create_graph=True)
        rows = [
            torch.autograd.grad(g, x, retain_graph=True, materialize_grads=True)[0] if g.requires_grad else 0 * x
            for g in gradient
        ]
    return gradient.detach(), torch.stack(rows).detach()


def _newton(gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The step, and the lower triangular factor of the inverse Hessian."""
    hessian = (hessian + hessian.mT) / 2
    # On scales on which the diagonal is 1, so that the smallest eigenvalue is not lost in the rounding of the largest.
    diagonal = hessian.diagonal().abs()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * hessian * scale)
    values = values.abs().clamp(min=1e-12 if values.dtype == torch.float64 else 1e-6)
    root = scale[:, None] * vectors * values.rsqrt()  # root root^T is the inverse
    step = -root @ (root.mT @ gradient)
    # root = R^T Q^T, so root root^T = R^T R: a QR decomposition does not square the condition as Cholesky's would
    upper = torch.linalg.qr(root.mT).R
    return step, (upper * upper.diagonal().sign()[:, None]).mT
