# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_realnvp.inference.curvature import Surface
from pyro_realnvp.inference.density import LogDensity
from pyro_realnvp.inference.normals import FullNormal, LowRankNormal, isotropic
from pyro_realnvp.inference.warm_start import best_normal


def surface(distribution):
    """The log-density of one site, which may be nan or infinite elsewhere."""

    def model():
        prior = dist.ImproperUniform(dist.constraints.real_vector, (), distribution.event_shape)
        z = pyro.sample("z", prior)
        pyro.factor("f", distribution.log_prob(z))

    with pyro.validation_enabled(False):
        return Surface(LogDensity(model, values={"z": torch.zeros(distribution.event_shape, dtype=torch.float64)}))


def test_the_warm_start_is_exact_where_the_posterior_is_normal():
    scale = torch.diag(torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)) @ torch.tensor(
        [[1.0, 0, 0], [0.999, 0.04, 0], [0.5, 0.5, 0.7]], dtype=torch.float64
    )
    loc = torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64)
    target = dist.MultivariateNormal(loc, scale_tril=scale, validate_args=False)
    found, elbo = best_normal(surface(target), isotropic(torch.zeros(3, dtype=torch.float64), 0.1))
    assert isinstance(found, FullNormal) and abs(elbo) < 0.1
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.scale_tril, scale, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_warm_start_of_many_dimensions_finds_scales_and_few_strong_correlations():
    dim = 300
    scale = 10 ** torch.linspace(-3, 3, dim, dtype=torch.float64)
    factor = torch.randn(dim, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = scale[:, None] * (torch.eye(dim) + factor @ factor.mT) * scale
    target = dist.MultivariateNormal(scale, covariance, validate_args=False)
    found, elbo = best_normal(surface(target), isotropic(torch.zeros(dim, dtype=torch.float64), 0.1))
    assert isinstance(found, LowRankNormal) and abs(elbo) < 3.0  # an isotropic normal is hundreds of nats away
    draws = found.draw(torch.randn(20_000, dim, dtype=torch.float64))
    deviations = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - scale) / deviations).abs().max() < 0.1
    assert (draws.std(0) / deviations - 1).abs().max() < 0.1


class Gamma:
    """3 log z - z where z > 0, and nan elsewhere."""

    event_shape = (1,)

    def log_prob(self, z):
        return torch.where(z > 0, 3 * z.log() - z, torch.nan).sum(-1)


def test_the_warm_start_stays_inside_the_support():
    start = FullNormal(torch.full((1,), 1e-3, dtype=torch.float64), torch.full((1, 1), 1e-4, dtype=torch.float64))
    found, _ = best_normal(surface(Gamma()), start)
    assert 2.0 < found.loc < 3.5 and 0.5 < found.scale_tril < 2.5
