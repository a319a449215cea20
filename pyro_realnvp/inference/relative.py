# SPDX-License-Identifier: Apache-2.0
"""Coordinates of a latent relative to its prior, in which a hierarchy has no funnel."""

from typing import NamedTuple

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

from ..bijections.shapes import sum_events
from ..supports import plain

_LOCATION_SCALE = (td.Normal, td.LogNormal, td.StudentT, td.Laplace, td.Cauchy, td.Gumbel, dist.Logistic)


class Relative(NamedTuple):
    r""":math:`t = m + S u,\ S S^T = (\Sigma^{-1} + A)^{-1},\ m = S S^T (\Sigma^{-1} \mu + b)`: the coordinates u of a
    latent whose prior has the location :math:`\mu` and the covariance :math:`\Sigma`, which depend on other latents.

    m and S are the mean and a factor of the covariance of :math:`N(t; \mu, \Sigma) \exp(b^T t - t^T A t / 2)`: of the
    prior, times a normal likelihood in place of the true one. So u is close to a standard normal whatever :math:`\mu`
    and :math:`\Sigma` are. With A = 0 and b = 0 it is the non-centered parametrization, with a large A the centered
    one. A is diagonal, and :math:`\Sigma` is, except for a ``MultivariateNormal``.
    """

    precision: Tensor
    """The diagonal of A, shaped like the unconstrained value."""
    shift: Tensor
    """b, shaped like the unconstrained value."""

    def forward(self, fn: td.Distribution, u: Tensor) -> tuple[Tensor, Tensor]:
        """t, and log|dt/du| of each element of the batch."""
        loc, scale = location_and_scale(fn)
        if scale.dim() > loc.dim():
            root, half = self._roots(loc, scale)
            t = (scale @ solve_upper(root.mT, half + u.unsqueeze(-1))).squeeze(-1)
            return t, _log_det_of_trils(scale, root)
        mean, deviation = self._mean_and_deviation(loc, scale)
        return mean + deviation * u, _log_det(deviation, u, fn.event_dim)

    def inverse(self, fn: td.Distribution, t: Tensor) -> tuple[Tensor, Tensor]:
        """u, and log|du/dt| of each element of the batch."""
        loc, scale = location_and_scale(fn)
        if scale.dim() > loc.dim():
            root, half = self._roots(loc, scale)
            u = root.mT @ solve_lower(scale, t.unsqueeze(-1)) - half
            return u.squeeze(-1), -_log_det_of_trils(scale, root)
        mean, deviation = self._mean_and_deviation(loc, scale)
        return (t - mean) / deviation, -_log_det(deviation, t, fn.event_dim)

    def _mean_and_deviation(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        shrinkage = 1 + self.precision * scale.square()
        return (loc + self.shift * scale.square()) / shrinkage, scale * shrinkage.rsqrt()

    def _roots(self, loc: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
        """R with R R^T = 1 + L^T A L, where L L^T is the covariance, so that S = L R^{-T}; and S^{-1} m."""
        eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
        root = torch.linalg.cholesky(eye + tril.mT @ (self.precision.to(tril).unsqueeze(-1) * tril))
        half = solve_lower(tril, loc.unsqueeze(-1)) + tril.mT @ self.shift.to(tril).unsqueeze(-1)
        return root, solve_lower(root, half)


def solve_lower(tril: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(tril, b, upper=False)


def solve_upper(triu: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(triu, b, upper=True)


def _log_det(deviation: Tensor, values: Tensor, event_dim: int) -> Tensor:
    return sum_events(deviation.log().expand(values.shape), event_dim)


def _log_det_of_trils(tril: Tensor, root: Tensor) -> Tensor:
    return (tril.diagonal(dim1=-2, dim2=-1).log() - root.diagonal(dim1=-2, dim2=-1).log()).sum(-1)


def location_and_scale(fn: td.Distribution) -> tuple[Tensor, Tensor] | None:
    """Location and scale of a site's distribution in unconstrained coordinates, or None if it has none.

    The scale of a ``MultivariateNormal`` is the lower triangular factor of its covariance.
    """
    fn = plain(fn)
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc, fn.scale_tril
    return (fn.loc, fn.scale) if isinstance(fn, _LOCATION_SCALE) else None


def prior_curvature(fn: td.Distribution, t: Tensor, slope: Tensor) -> Tensor:
    """The diagonal of the Hessian of a prior's log-density in t, given its gradient as a function of t."""
    fn = plain(fn)
    if isinstance(fn, td.MultivariateNormal):
        return -fn.precision_matrix.diagonal(dim1=-2, dim2=-1).expand(t.shape)
    return torch.autograd.grad(slope.sum(), t)[0]


def is_relative(first: td.Distribution, second: td.Distribution, shape: torch.Size) -> bool:
    """Whether the location or the scale of a site depends on the latents: whether it differs between two runs."""
    pair, other = location_and_scale(first), location_and_scale(second)
    if pair is None or other is None:
        return False
    loc, scale = pair
    if torch.broadcast_shapes(shape, loc.shape, scale.shape[: loc.dim()]) != shape:  # it depends on an enumerated site
        return False
    return not all(torch.equal(one, two) for one, two in zip(pair, other))
