# SPDX-License-Identifier: Apache-2.0
import pyro.distributions as dist
import torch

from pyro_realnvp.inference.warm_start import Normal, best_normal


def test_the_warm_start_is_exact_where_the_posterior_is_normal():
    scale = torch.diag(torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)) @ torch.tensor(
        [[1.0, 0, 0], [0.999, 0.04, 0], [0.5, 0.5, 0.7]], dtype=torch.float64
    )
    target = dist.MultivariateNormal(torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64), scale_tril=scale)
    start = Normal(torch.zeros(3, dtype=torch.float64), 0.1 * torch.eye(3, dtype=torch.float64))
    found = best_normal(target.log_prob, start)
    torch.testing.assert_close(found.loc, target.loc)
    torch.testing.assert_close(found.scale_tril, scale, rtol=1e-6, atol=1e-9)


def test_the_warm_start_stays_inside_the_support():
    start = Normal(torch.full((1,), 1e-3, dtype=torch.float64), torch.full((1, 1), 1e-4, dtype=torch.float64))
    found = best_normal(lambda z: torch.where(z > 0, 3 * z.log() - z, torch.nan).sum(), start)
    assert 2.0 < found.loc < 3.5 and 0.5 < found.scale_tril < 2.5
