# SPDX-License-Identifier: Apache-2.0
"""Draws from posteriors: Pyro's NUTS, NUTS in the coordinates of a guide, and many chains at once, beside the truth."""

import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_realnvp import AutoRealNVP, PosteriorSamples, fit_guide, neutra, sample_posterior

from .tables import print_table

Sites = dict[str, Tensor]
Moments = tuple[Tensor, Tensor]


class Posterior(NamedTuple):
    model: Callable
    quantities: Callable[[Sites], Tensor]
    """A function of N draws of the sites, which returns ``(N, K)`` quantities."""
    exact: Moments
    """Their exact means and deviations, ``(K,)``."""
    num_starts: int = 1
    """The number of points from which the guide searches for modes."""


def hierarchy(y: Tensor, errors: Tensor, scale_of_mu: float, prior_of_tau: dist.Distribution) -> Posterior:
    """A centered hierarchy of normals. The truth is a quadrature over log tau, given which all else is normal."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, scale_of_mu))
        tau = pyro.sample("tau", prior_of_tau)
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, errors), obs=y)

    data, noise = y.double(), errors.double().square()
    log_tau = torch.linspace(-12, 8, 20001, dtype=torch.float64)
    between = log_tau.exp().square()[:, None]
    total = between + noise
    precision = scale_of_mu**-2 + (1 / total).sum(1)
    mu = (data / total).sum(1) / precision
    log_p = prior_of_tau.log_prob(log_tau.exp()) + log_tau + precision * mu.square() / 2 - precision.log() / 2
    weights = (log_p + dist.Normal(0.0, total.sqrt()).log_prob(data).sum(1)).softmax(0)[:, None]
    share = between / total  # of the observation in the mean of theta given mu
    means = torch.cat([mu[:, None], log_tau[:, None], share * data + (1 - share) * mu[:, None]], 1)
    within = share * noise + (1 - share).square() / precision[:, None]
    variances = torch.cat([1 / precision[:, None], torch.zeros_like(within[:, :1]), within], 1)
    mean = (weights * means).sum(0)
    deviation = ((weights * (variances + means.square())).sum(0) - mean.square()).sqrt()
    return Posterior(
        model, lambda s: torch.cat([s["mu"][:, None], s["tau"].log()[:, None], s["theta"]], 1), (mean, deviation)
    )


def eight_schools() -> Posterior:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return hierarchy(y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]), 5.0, dist.HalfCauchy(5.0))


def hundred() -> Posterior:
    draw = torch.Generator().manual_seed(0)
    errors = 0.3 + torch.rand(98, generator=draw)
    y = 1 + 0.7 * torch.randn(98, generator=draw) + errors * torch.randn(98, generator=draw)
    return hierarchy(y, errors, 5.0, dist.HalfNormal(2.0))


def funnel() -> Posterior:
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("dims", 9):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    # The x have no finite-sample deviation to compare with, but their ratios to exp(v / 2) are standard normal.
    def quantities(s: Sites) -> Tensor:
        return torch.cat([s["v"][:, None], s["x"] * (-s["v"] / 2).exp()[:, None]], 1)

    return Posterior(model, quantities, (torch.zeros(10), torch.tensor([3.0] + 9 * [1.0])))


def regression() -> Posterior:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=draw)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(100, generator=draw)

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        with pyro.plate("rows", 100):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    covariance = torch.linalg.inv(torch.eye(3) / 25 + x.T @ x)
    return Posterior(model, lambda s: s["b"], (covariance @ x.T @ y, covariance.diagonal().sqrt()))


def two_modes(distance: float, num_starts: int = 1) -> Posterior:
    """Normals of the deviation 0.5 and the weights 0.3 and 0.7, so many apart. The fraction on the left is compared."""
    half = distance / 2

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        left, right = (dist.Normal(m, 0.5).log_prob(z[0]) for m in (-half, half))
        log_p = torch.logaddexp(math.log(0.3) + left, math.log(0.7) + right) + dist.Normal(0.0, 1.0).log_prob(z[1])
        pyro.factor("mixture", log_p - dist.Normal(0.0, 10.0).log_prob(z).sum())

    beyond = 0.5 * math.erfc(distance / 2**0.5)  # of a normal, on the other side
    left = 0.3 * (1 - beyond) + 0.7 * beyond
    exact = (
        torch.tensor([0.4 * half, 0.0, left]),
        torch.tensor([(0.25 + 0.84 * half**2) ** 0.5, 1.0, (left - left**2) ** 0.5]),
    )
    return Posterior(model, lambda s: torch.cat([s["z"], (s["z"][:, :1] < 0).float()], 1), exact, num_starts)


POSTERIORS = {
    "eight schools, centered": eight_schools,
    "funnel, 10 dimensions": funnel,
    "regression, 100 rows": regression,
    "hierarchy, 100 dimensions": hundred,
    "two modes, 4 deviations apart": lambda: two_modes(2.0),
    "two modes, 8 deviations apart": lambda: two_modes(4.0),
    "the same, num_starts=16": lambda: two_modes(4.0, num_starts=16),
}


def nuts(model: Callable, num_samples: int) -> PosteriorSamples:
    """Pyro's NUTS, with as many warmup steps as draws."""
    started = time.perf_counter()
    mcmc = MCMC(NUTS(model), num_samples, num_samples, disable_progbar=True)
    mcmc.run()
    nothing = torch.zeros(1, num_samples)
    return PosteriorSamples(mcmc.get_samples(), nothing.bool(), nothing, time.perf_counter() - started)


def rows(posterior: Posterior, *, num_steps: int, num_samples: int) -> list[list[str]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoRealNVP(posterior.model, num_starts=posterior.num_starts)
    training = fit_guide(guide, num_steps=num_steps, progress=False).seconds
    sample_posterior(guide, num_samples=4, warmup_steps=4, progress=False)  # the first call pays for what torch loads
    calls = {
        "Pyro: NUTS": lambda: nuts(posterior.model, num_samples),
        "ours: neutra": lambda: neutra(guide, num_samples=num_samples, warmup_steps=num_samples, progress=False),
        "ours: sample_posterior": lambda: sample_posterior(guide, seed=0, progress=False),
    }
    table, reference = [], None
    for name, call in calls.items():
        found = call()
        reference = reference or found.min_ess_per_second
        values = posterior.quantities(found.samples).double()
        mean, deviation = (moment.double() for moment in posterior.exact)
        off = ((values.mean(0) - mean) / deviation).abs().max()
        spread = (values.std(0) / deviation - 1).abs().max()
        whole = found.seconds + (0.0 if name == "Pyro: NUTS" else training)
        rate = found.min_ess_per_second
        table.append(
            [name, f"{rate:.1f}", f"{rate / reference:.0f}", f"{found.min_ess:.0f}", f"{found.max_r_hat:.3f}"]
            + [f"{off:.3f}", f"{spread:.3f}", f"{1 / found.min_ess**0.5:.3f}", f"{found.seconds:.1f}", f"{whole:.1f}"]
        )
    return table


def main(*, num_steps: int = 2000, num_samples: int = 500) -> None:
    header = ["", "least ESS / s", "/ NUTS", "least ESS", "R-hat", "mean off (sd)", "sd off", "1 / sqrt(ESS)"]
    header += ["seconds", "with training"]
    for name, make in POSTERIORS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the largest R-hat")  # the table shows it
            found = rows(make(), num_steps=num_steps, num_samples=num_samples)
        print_table(f"{name}: NUTS {num_samples} + {num_samples}, 256 chains 200 + 100", header, found)
