# SPDX-License-Identifier: Apache-2.0
"""Guides: milliseconds of a step, NUTS in the guide's coordinates, and posteriors with gold-standard draws.

The draws are those of posteriordb. The environment variable PYRO_REALNVP_DATA names the folder that holds
posteriordb/NAME.npz, whose array ``draws`` has the shape (chains, draws, parameters), and posteriordb/NAME.json with
the data. Without it, the tables that need them are skipped.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, neutra

from .tables import interleaved, print_table, ratio, verdict

Sites = dict[str, Tensor]


class Posterior(NamedTuple):
    model: Callable
    parameters: Callable[[Sites], Tensor]
    """A function of the sites' draws that returns the parameters in the order of the gold draws, ``(number,
    parameters)``."""
    gaussian: bool
    """Whether the posterior is close to normal, so that a normal guide is as good as a flow."""


def normal(scale: float, size: int) -> dist.Distribution:
    return dist.Normal(0.0, scale).expand([size]).to_event(1)


def ar(data: dict) -> Posterior:
    y, k = torch.tensor(data["y"]), data["K"]
    lagged = torch.stack([y[k - 1 - lag : len(y) - 1 - lag] for lag in range(k)])  # (K, T - K)

    def model():
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", normal(10.0, k))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        mean = alpha[..., None] + (beta[..., None] * lagged).sum(-2)
        pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y[k:])

    return Posterior(model, lambda s: torch.cat([s["alpha"][:, None], s["beta"], s["sigma"][:, None]], -1), True)


def eight_schools(data: dict, *, centered: bool = False) -> Posterior:
    y, sigma = torch.tensor(data["y"]).float(), torch.tensor(data["sigma"]).float()

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))[..., None]
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))[..., None]
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau).expand(mu.shape[:-1] + y.shape).to_event(1))
        else:
            theta = mu + tau * pyro.sample("eta", normal(1.0, len(y)))
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    def parameters(s: Sites) -> Tensor:
        mu, tau = s["mu"][:, None], s["tau"][:, None]
        return torch.cat([s["theta"] if centered else mu + tau * s["eta"], mu, tau], -1)

    return Posterior(model, parameters, False)


def garch(data: dict) -> Posterior:
    y, sigma1 = torch.tensor(data["y"]), data["sigma1"]

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0).mask(False))[..., None]  # flat
        alpha0 = pyro.sample("alpha0", dist.HalfNormal(1.0).mask(False))[..., None]
        alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))[..., None]
        fraction = pyro.sample("fraction", dist.Uniform(0.0, 1.0))[..., None]
        pyro.factor("flat_beta1", (1 - alpha1[..., 0]).log())  # |d beta1 / d fraction|
        beta1 = (1 - alpha1) * fraction
        first = torch.full_like(alpha0, sigma1**2)
        # The recursion variance_t = u_t + beta1 variance_{t-1} is the sum over k of beta1^k u_{t-k}. Each pass of the
        # loop doubles the number of its terms, so there are log2(T) passes instead of T steps.
        variance = torch.cat([first, alpha0 + alpha1 * (y[:-1] - mu).square()], -1)
        power, lag = beta1, 1
        while lag < len(y):
            variance = variance + power * torch.nn.functional.pad(variance[..., :-lag], (lag, 0))
            power, lag = power.square(), 2 * lag
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)

    return Posterior(
        model, lambda s: torch.stack([s["mu"], s["alpha0"], s["alpha1"], (1 - s["alpha1"]) * s["fraction"]], -1), False
    )


def gp_poisson(data: dict) -> Posterior:
    x, k = torch.tensor(data["x"]).double(), torch.tensor(data["k"])
    squares = (x[:, None] - x).square()

    def function(rho: Tensor, alpha: Tensor, z: Tensor) -> Tensor:
        rho, alpha = rho.double()[..., None, None], alpha.double()[..., None, None]  # the matrix is nearly singular
        covariance = alpha.square() * (-squares / (2 * rho.square())).exp() + 1e-10 * torch.eye(len(x)).double()
        return (torch.linalg.cholesky(covariance).to(z) @ z[..., None])[..., 0]

    def model():
        rho, alpha = pyro.sample("rho", dist.Gamma(25.0, 4.0)), pyro.sample("alpha", dist.HalfNormal(2.0))
        f = function(rho, alpha, pyro.sample("z", normal(1.0, len(x))))
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    return Posterior(model, lambda s: torch.cat([s["rho"][:, None], s["alpha"][:, None], function(**s)], -1), False)


def kidscore(data: dict) -> Posterior:
    score, iq = torch.tensor(data["kid_score"]).float(), torch.tensor(data["mom_iq"])

    def model():
        beta = pyro.sample("beta", normal(1.0, 2).mask(False))  # flat
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))[..., None]
        pyro.sample("score", dist.Normal(beta[..., :1] + beta[..., 1:] * iq, sigma).to_event(1), obs=score)

    return Posterior(model, lambda s: torch.cat([s["beta"], s["sigma"][:, None]], -1), True)


MAKERS = {"arK": ar, "eight_schools_noncentered": eight_schools, "garch11": garch}
MAKERS |= {"gp_pois_regr": gp_poisson, "kidscore_momiq": kidscore}


def pyro_couplings(dim: int, num_couplings: int = 8, hidden_dims: list[int] | None = None) -> T.ComposeTransformModule:
    """Pyro's own RealNVP. Between its couplings the entries are reversed, so that each half is changed in turn."""
    reverse = torch.arange(dim).flip(0)
    couplings = [T.affine_coupling(dim, hidden_dims) for _ in range(num_couplings)]
    return T.ComposeTransformModule([part for c in couplings for part in (c, T.Permute(reverse))])


OURS = "AutoRealNVP"
GUIDES = {
    OURS: AutoRealNVP,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoNormalizingFlow": lambda model: AutoNormalizingFlow(model, pyro_couplings),
}


def load(folder: Path, name: str) -> tuple[dict, Tensor]:
    """The data and the gold draws, of shape (number, parameters)."""
    draws = np.load(folder / "posteriordb" / f"{name}.npz")["draws"]
    return json.loads((folder / "posteriordb" / f"{name}.json").read_text()), torch.as_tensor(draws).double().flatten(
        0, 1
    )


def posterior(
    folder: Path, name: str, *, num_steps: int = 2000, num_draws: int = 20_000, seed: int = 0, guides=GUIDES, **options
) -> None:
    data, gold = load(folder, name)
    model, parameters, gaussian = MAKERS[name](data)
    rows, losses = [], {}
    for label, make in guides.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        started = time.perf_counter()
        guide = make(model)
        history = fit_guide(guide, num_steps=num_steps, progress=False, **options)
        seconds = time.perf_counter() - started
        found = diagnose(guide, num_samples=num_draws)
        draws = parameters(found.draws).double()
        off = ((draws.mean(0) - gold.mean(0)) / gold.std(0)).abs().max().item()
        spread = draws.std(0) / gold.std(0)
        low, high, losses[label] = spread.min(), spread.max(), -found.elbo
        met = off <= 0.1 and low >= 0.9 and high <= 1.1 and found.pareto_k < 0.5
        rows.append(
            [label, f"{off:.3f}", f"{low:.3f} {high:.3f}", f"{found.pareto_k:.2f}"]
            + [f"{found.effective_sample_size:.0f}", f"{losses[label]:.3f}", f"{seconds:.1f}", history.best_step]
            + [history.skipped_steps, ("ok" if met else "NOT MET") if label == OURS else ""]
        )
    best_peer = min([value for label, value in losses.items() if label != OURS], default=float("inf"))
    header = ["", "mean off by (sd)", "sd / gold sd", "k", f"ESS of {num_draws}", "-ELBO", "seconds", "best step"]
    print_table(
        f"{name}: wanted of {OURS} 0.1, 0.9 to 1.1, k < 0.5",
        [*header, "skipped", ""],
        sorted(rows, key=lambda r: float(r[5])),
    )
    if not gaussian:
        print(f"lower -ELBO than all of Pyro's: {'ok' if losses[OURS] < best_peer else 'NOT MET'}", flush=True)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()[..., None]).expand([*v.shape, 9]).to_event(1))


def step(*, num_steps: int = 200, rounds: int = 5) -> None:
    """Prints the milliseconds of an SVI step on the funnel, with 8 couplings of 2x64 and one particle."""
    pyro.clear_param_store()
    theirs = AutoNormalizingFlow(funnel, lambda dim: pyro_couplings(dim, 8, [64, 64]))
    svi = SVI(funnel, theirs, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    guide = AutoRealNVP(funnel, num_couplings=8, hidden_dims=(64, 64))
    options = {"num_particles": 1, "validation_particles": 0, "lr": 1e-3, "progress": False}
    pyros, ours = "Pyro: SVI, Adam, AutoNormalizingFlow", "ours: fit_guide, AutoRealNVP"
    calls = {pyros: lambda: [svi.step() for _ in range(num_steps)]}
    calls[ours] = lambda: fit_guide(guide, num_steps=num_steps, **options)
    whole = "ours: the same, path_derivative=False"
    calls[whole] = lambda: fit_guide(guide, num_steps=num_steps, path_derivative=False, **options)
    times = interleaved(calls, rounds=rounds)
    rows = []
    for name, target in ((pyros, None), (ours, 0.5), (whole, 0.5)):
        value, median = ratio(times[name], times[pyros]), statistics.median(times[name]) / num_steps
        rows.append([name, f"{median:.2f}", f"{value:.3f}", *verdict(value, target)])
    print_table("10-d funnel, 8 couplings of 2x64, 1 particle: a step", ["", "ms", "/ Pyro", "target", ""], rows)


def nuts(model: Callable, spread: Callable[[Sites], float], *, num_samples: int = 500, num_steps: int = 2000) -> list:
    """The rows of the table for plain NUTS and for NUTS in the guide's coordinates."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    started = time.perf_counter()
    mcmc = MCMC(NUTS(model), num_samples, num_samples, disable_progbar=True)
    mcmc.run()
    seconds, samples = time.perf_counter() - started, mcmc.get_samples()
    ess = min(effective_sample_size(values[None]).min().item() for values in samples.values())
    divergences = sum(map(len, mcmc.diagnostics()["divergences"].values()))
    rows = [["NUTS", f"{ess / seconds:.2f}", f"{ess:.0f}", divergences, f"{spread(samples):.2f}", f"{seconds:.1f}", ""]]
    guide = AutoRealNVP(model)
    training = fit_guide(guide, num_steps=num_steps, progress=False).seconds
    found = neutra(guide, num_samples=num_samples, warmup_steps=num_samples, progress=False)
    numbers = [f"{found.min_ess_per_second:.2f}", f"{found.min_ess:.0f}", int(found.divergences.sum())]
    rows.append(["neutra", *numbers, f"{spread(found.samples):.2f}", f"{found.seconds:.1f}", f"{training:.1f}"])
    return rows


def main(num_steps: int = 2000) -> None:
    step()
    header = ["", "least ESS / s", "least ESS", "divergences", "sd / true sd", "seconds", "of training"]
    print_table("NUTS, 500 + 500, 10-d funnel (sd of v)", header, nuts(funnel, lambda s: s["v"].std().item() / 3))
    if "PYRO_REALNVP_DATA" not in os.environ:
        print("the posteriors are skipped: PYRO_REALNVP_DATA names no folder")
        return
    folder = Path(os.environ["PYRO_REALNVP_DATA"])
    data, gold = load(folder, "eight_schools_noncentered")
    true = gold[:, -1].log().std().item()
    rows = nuts(eight_schools(data, centered=True).model, lambda s: s["tau"].log().std().item() / true)
    print_table("NUTS, 500 + 500, centered eight schools (sd of log tau)", header, rows)
    for name in MAKERS:
        posterior(folder, name, num_steps=num_steps)
