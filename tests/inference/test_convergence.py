# SPDX-License-Identifier: Apache-2.0
import math

import arviz
import pytest
import torch
from helpers import table

from pyro_realnvp.inference.convergence import effective_sample_size, r_hat


def autoregressive(chains, samples, correlation):
    noise = torch.randn(samples, chains, 2, dtype=torch.float64)
    x = [noise[0]]
    for step in noise[1:]:
        x.append(correlation * x[-1] + (1 - correlation**2) ** 0.5 * step)
    return torch.stack(x, 1)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("samples", [2000, 5001])
def test_numbers_of_few_chains_are_those_of_arviz(correlation, samples):
    x = autoregressive(4, samples, correlation)
    x[:, 1] = x[:, 0]  # as where a proposal was rejected
    theirs = [arviz.rhat(column.numpy()) for column in x.unbind(-1)]
    torch.testing.assert_close(r_hat(x), torch.tensor(theirs), atol=1e-3, rtol=0)
    theirs = torch.tensor([arviz.ess(column.numpy()) for column in x.unbind(-1)])
    torch.testing.assert_close(effective_sample_size(x), theirs, rtol=0.15, atol=0)


@table(
    ("correlation", "samples"),
    {
        "independent": (0.0, 4),
        "a few": (0.0, 20),
        "correlated": (0.8, 100),
        "oscillating": (-0.5, 100),
        "slow": (0.95, 400),
    },
)
def test_many_short_chains_that_have_converged(correlation, samples):
    x = autoregressive(256, samples, correlation)
    assert (r_hat(x) < 1.015).all()
    k = torch.arange(1, samples)
    time = 1 + 2 * ((1 - k / samples) * correlation**k).sum()  # of the mean of one chain
    torch.testing.assert_close(effective_sample_size(x), (256 * samples / time).expand(2).double(), rtol=0.15, atol=0)


def test_many_chains_that_have_not_converged():
    stuck = torch.randn(256, 1, 1).expand(256, 100, 1) + 1e-3 * torch.randn(256, 100, 1)
    assert r_hat(stuck) > 2 and effective_sample_size(stuck) < 300
    drifting = torch.randn(256, 100, 1) + torch.linspace(0, 1, 100)[:, None]
    assert r_hat(drifting) > 1.02
    scales = torch.randn(256, 100, 1) * torch.linspace(1, 3, 100)[:, None]  # which only the distances show
    assert r_hat(scales) > 1.02
    apart = torch.randn(256, 100, 1) + 4.0 * (torch.rand(256, 1, 1) < 0.5)
    assert r_hat(apart) > 1.2 and effective_sample_size(apart) < 500
    rarely = torch.randn(256, 100, 1) + 8.0 * (torch.rand(256, 1, 1) < 0.05)
    assert r_hat(rarely) > 1.02


def test_groups_need_a_number_of_chains_that_they_divide():
    x = autoregressive(37, 50, 0.9)  # is prime, so each chain is on its own
    ((theirs, _),) = [[arviz.rhat(column.numpy()) for column in x.unbind(-1)]]
    assert r_hat(x)[0] == pytest.approx(theirs, abs=1e-3)


def test_entries_that_never_vary_and_shapes():
    x = torch.randn(4, 50, 3, 2)
    x[..., 0, 1] = 0.0
    for result in (r_hat(x), effective_sample_size(x)):
        assert result.shape == (3, 2) and result.isnan().nonzero().tolist() == [[0, 1]]
    assert r_hat(x[..., 0, 0]).shape == effective_sample_size(x[..., 0, 0]).shape == ()
    alternating = torch.ones(4, 50).cumsum(1) % 2 + 0.01 * torch.randn(4, 50)
    assert effective_sample_size(alternating) == pytest.approx(200 * math.log10(200))
    heavy = torch.randn(4, 50).exp() ** 80  # overflows
    assert heavy.isinf().any() and r_hat(heavy).isfinite() and effective_sample_size(heavy).isfinite()
