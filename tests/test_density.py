# SPDX-License-Identifier: Apache-2.0
"""Densities of flows against the truth."""

import math

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import perturb

import pyro_realnvp as rn


def integral(log_prob, half_width=15.0, num_points=401):
    """The integral of exp(log_prob) over the plane, by the trapezoidal rule."""
    axis = torch.linspace(-half_width, half_width, num_points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        density = torch.cat([log_prob(rows).exp() for rows in grid.split(100)])
    return torch.trapezoid(torch.trapezoid(density, axis), axis).item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: rn.real_nvp(2, num_couplings=4),
        lambda: rn.real_nvp(2, num_couplings=4, coupling=rn.AdditiveCoupling),
        lambda: rn.real_nvp(2, num_couplings=4, between=rn.InvertibleLinear),
        lambda: rn.real_nvp(2, num_couplings=4, between=lambda d: rn.ActNorm(d).inv),
        lambda: rn.Compose([rn.real_nvp(2, num_couplings=4), T.Householder(2), T.AffineTransform(1.0, 2.0)]),
        lambda: rn.real_nvp(2, num_couplings=4).inv,
    ],
    ids=["affine", "additive", "linear", "actnorm", "with Pyro's", "inverse"],
)
def test_density_integrates_to_one(make):
    flow = rn.Flow(perturb(make(), 0.15)).double()
    for d in (flow(), flow(temperature=0.5)):
        assert integral(d.log_prob) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.slow
def test_density_of_splines_integrates_to_one():
    parts = [rn.real_nvp(2, num_couplings=4, coupling=rn.SplineCoupling), rn.Spline(2)]
    flow = rn.Flow(perturb(rn.Compose(parts), 0.15)).double()
    for d in (flow(), flow(temperature=0.5)):  # the slopes jump at the knots, so the grid is finer
        assert integral(d.log_prob, half_width=8.0, num_points=641) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.slow
def test_conditional_density_integrates_to_one():
    flow = rn.Flow(perturb(rn.real_nvp(2, num_couplings=4, context_dim=3), 0.15)).double()
    for context in torch.randn(3, 3, dtype=torch.float64):
        assert integral(flow(context).log_prob) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        rn.Base(dist.StudentT, df=torch.full((2,), 5.0), loc=torch.zeros(2), scale=torch.ones(2)),
        rn.Base(dist.Normal, loc=torch.ones(2), scale=torch.full((2,), 0.7), learnable=True),
        rn.Base(dist.Laplace, loc=torch.zeros(2), scale=torch.ones(2)),
    ],
    ids=["student", "learned normal", "laplace"],
)
def test_other_bases_integrate_to_one(base):
    flow = rn.Flow(perturb(rn.real_nvp(2, num_couplings=2), 0.1), base=base).double()
    assert integral(flow().log_prob, half_width=60.0, num_points=1201) == pytest.approx(1.0, abs=3e-3)


def test_fit_recovers_a_gaussian():
    """The KL is down to the sampling error, about (number of parameters) / (2 N)."""
    truth = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.9], [0.9, 2.0]]))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=4, hidden_dims=(16,)))
    rn.fit(flow, truth.sample((4000,)), num_steps=600, lr=1e-2, seed=0, progress=False)
    x = truth.sample((20_000,))
    with torch.no_grad():
        kl = (truth.log_prob(x) - flow().log_prob(x)).mean().item()
        samples = flow().sample((20_000,))
    assert kl < 0.01
    torch.testing.assert_close(samples.mean(0), truth.mean, atol=0.08, rtol=0)
    torch.testing.assert_close(samples.T.cov(), truth.covariance_matrix, atol=0.15, rtol=0)


@pytest.mark.slow
def test_conditional_fit_recovers_a_conditional_gaussian():
    c = torch.rand(4000, 1) * 4 - 2
    x = torch.cat([c + 0.5 * torch.randn(4000, 1), (c.exp() / 4) * torch.randn(4000, 1)], -1)
    flow = rn.Flow(rn.real_nvp(2, num_couplings=4, hidden_dims=(32,), context_dim=1))
    rn.fit(flow, x, context=c, num_steps=800, seed=0, progress=False)
    for value in (-1.0, 0.5, 1.5):
        samples = flow(torch.tensor([value])).sample((20_000,))
        torch.testing.assert_close(samples.mean(0), torch.tensor([value, 0.0]), atol=0.12, rtol=0)
        torch.testing.assert_close(samples.std(0), torch.tensor([0.5, math.exp(value) / 4]), rtol=0.15, atol=0)


def test_an_untrained_deep_stack_scores_a_normal_as_a_normal():
    x = torch.randn(10_000, 20)
    per_dim = -rn.Flow(rn.real_nvp(20, num_couplings=16))().log_prob(x).mean() / 20
    assert per_dim.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.01)


def test_temperature_scales_the_base():
    flow = rn.Flow(rn.real_nvp(2), base=rn.Base(dist.Normal, loc=torch.tensor([3.0, 0.0]), scale=torch.ones(2)))
    cool = flow(temperature=0.5)
    samples = cool.sample((20_000,))
    torch.testing.assert_close(samples.mean(0), torch.tensor([3.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.full((2,), 0.5), atol=0.02, rtol=0)
    expected = dist.Normal(torch.tensor([3.0, 0.0]), 0.5).to_event(1).log_prob(samples)
    torch.testing.assert_close(cool.log_prob(samples), expected)
