# SPDX-License-Identifier: Apache-2.0
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import count_evaluations, fitted, rough, table, two_modes

import pyro_realnvp as rn
from pyro_realnvp.inference.chains import Chains, van_der_corput
from pyro_realnvp.inference.pulled_back import PulledBack

COVARIANCE = torch.tensor([[1.0, 2.7], [2.7, 9.0]])
EXACT = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), COVARIANCE)


def correlated():
    pyro.sample("z", EXACT)


def chains_of(guide, number):
    return Chains(PulledBack(rn.sample_posterior, guide, (), {}, None), number)


def largest_gap(values, cdf):
    """The distance of Kolmogorov and Smirnov times the root of the number of values: 1.95 has the probability 0.001."""
    levels = cdf(values.sort().values).double()
    grid = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)
    return max((levels - grid[1:]).abs().max(), (levels - grid[:-1]).abs().max()).item() * len(values) ** 0.5


@table(
    "guide",
    {
        "near": lambda: rough(correlated, {"z": EXACT.mean}, 2.0),
        "too narrow": lambda: rough(correlated, {"z": EXACT.mean}, 0.7),
        "beside": lambda: rough(correlated, {"z": EXACT.mean + 2.0}, 1.5),
    },
)
def test_an_iteration_leaves_the_posterior_as_it_is(guide):
    chains = chains_of(guide(), 8000)
    chains.scale = torch.tensor([0.5, 0.9])
    chains.log_step, chains.log_length = math.log(0.7), math.log(1.5)
    exact = EXACT.sample((8000,))
    with torch.no_grad():
        chains.state = chains._evaluate(chains.target.transform.inv(exact))
        moves = [chains.iterate() for _ in range(4)]
        z = chains.target.constrain(chains.state.point)["z"]
    jumped = torch.stack([move.jumped for move in moves]).float().mean()
    acceptance = torch.stack([move.acceptance for move in moves]).mean()
    assert 0.01 < jumped < 0.99 and 0.2 < acceptance < 0.99  # both moves are tested
    assert (z - exact).abs().mean() > 0.3
    for k in range(2):
        marginal = dist.Normal(EXACT.mean[k], EXACT.variance[k].sqrt())
        assert largest_gap(z[:, k], marginal.cdf) < 1.95
    white = torch.linalg.solve_triangular(EXACT.scale_tril, (z - EXACT.mean).T, upper=False)
    assert largest_gap(white.square().sum(0), dist.Exponential(0.5).cdf) < 1.95


def test_chains_start_at_different_draws_chosen_by_their_weights():
    chains = chains_of(rough(correlated, {"z": torch.tensor([0.0, -2.0])}, 2.0), 200)
    assert len(chains.state.point.unique(dim=0)) == 200
    z = chains.target.constrain(chains.state.point)["z"]
    assert z[:, 0].mean() > 0.3  # between 0, where the guide is, and 1


def test_few_finite_draws_start_several_chains():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", torch.where((z > 0.7).all(), 0.0, -torch.inf))

    chains = chains_of(rough(model, {"z": torch.ones(2)}, 1.0, shift=-1.0), 200)
    assert chains.state.log_p.isfinite().all() and 1 < len(chains.state.point.unique(dim=0)) < 200
    chains.target.base = dist.Delta(chains.state.point[0], event_dim=1)
    alone = Chains(chains.target, 20)
    assert (alone.scale == 1).all() and len(alone.state.point.unique(dim=0)) == 1


@pytest.mark.slow
def test_the_step_and_the_length_fit_a_normal():
    wide = chains_of(rough(lambda: pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1)), {}, 1.0), 256)
    with torch.no_grad():
        for _ in range(200):
            wide.iterate(adapt=True)
        wide.freeze()
        acceptance = torch.stack([wide.iterate().acceptance for _ in range(20)])
    harmonic = 1 / (1 / acceptance).mean()
    assert harmonic == pytest.approx(0.75, abs=0.15)
    # A quarter of a period, pi / 2, ends at an independent point; with jitter the mean time is T / 2.
    assert 1.0 < math.exp(wide.log_length) < 4.0
    assert 0.5 < math.exp(wide.log_step) < 2.0
    torch.testing.assert_close(wide.scale, torch.ones(10), atol=0.15, rtol=0)


@pytest.mark.slow
def test_the_scales_of_a_guide_that_is_wrong_about_them():
    scales = torch.tensor([0.01, 1.0, 100.0])
    chains = chains_of(rough(lambda: pyro.sample("z", dist.Normal(0.0, scales).to_event(1)), {}, 0.3), 256)
    with torch.no_grad():
        for _ in range(200):
            chains.iterate(adapt=True)
    torch.testing.assert_close(chains.scale * 0.3 / scales, torch.ones(3), atol=0.2, rtol=0)


@table(
    ("density", "is_divergent"),
    {
        "-inf": (lambda z: torch.where(z > 0, 0.0, -torch.inf), True),
        "nan": (lambda z: torch.where(z > 0, 0.0, torch.nan), True),
        "inf": (lambda z: torch.where(z > 0, 0.0, torch.inf), True),
        "nan from a logarithm": (lambda z: z.log() - z.log().detach(), True),
        "a gradient that is nan": (lambda z: 0.0 * z.clamp(max=0.0).abs().sqrt() + _half(z), False),
    },
)
def test_a_density_that_is_not_finite_is_a_boundary(density, is_divergent):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", density(z))

    guide = rough(model, {"z": torch.tensor(0.9)}, 0.5)
    with torch.no_grad():
        chains = chains_of(guide, 200)
        chains.log_step, chains.log_length = math.log(0.3), math.log(1.5)
        points, divergent = [], 0
        for _ in range(20):
            chains.iterate()
        for _ in range(40):
            divergent += int(chains.iterate().is_divergent.sum())
            points.append(chains.state.point)
        z = chains.target.constrain(torch.cat(points))["z"]
    assert (z > 0).all() and bool(divergent) >= is_divergent
    assert z.mean() == pytest.approx((2 / math.pi) ** 0.5, abs=0.05)
    assert z.std() == pytest.approx((1 - 2 / math.pi) ** 0.5, abs=0.05)


def test_singular_matrices_are_a_boundary():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 0.0 * torch.linalg.cholesky(z * torch.eye(2)).sum())

    with torch.no_grad():
        chains = chains_of(rough(model, {"z": torch.tensor(0.9)}, 0.25), 8)
        divergent = sum(int(chains.iterate().is_divergent.sum()) for _ in range(30))
    assert divergent and (chains.target.constrain(chains.state.point)["z"] > 0).all()


def _half(z):
    return torch.where(z > 0, 0.0, -torch.inf)


def test_an_evaluation_evaluates_each_network_and_the_model_once():
    calls = []

    def model():
        calls.append(1)
        two_modes()

    guide = fitted(two_modes, num_steps=5)
    chains = Chains(PulledBack(rn.sample_posterior, guide, (), {}, model), 20)
    chains.log_step, chains.log_length = 0.0, math.log(2.5)  # the first trajectory has two steps
    calls.clear()
    assert count_evaluations(guide, chains.iterate) == {3} and len(calls) == 3


def test_the_jitter_fills_the_unit_interval():
    assert [van_der_corput(n) for n in range(1, 6)] == [0.5, 0.25, 0.75, 0.125, 0.625]
    values = sorted(van_der_corput(n) for n in range(1, 1024))
    assert values == [k / 1024 for k in range(1, 1024)]
