# SPDX-License-Identifier: Apache-2.0
"""
Exact draws and model comparison
================================

Counts vary more than those of a Poisson distribution. The example fits a flow guide to each of two models, draws from
both posteriors exactly with 256 chains at once, and hands the draws to ArviZ, which checks and compares the models.
"""

import argparse
from pathlib import Path

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, sample_posterior

parser = argparse.ArgumentParser(description="Compare two models of counts by exact draws.")
parser.add_argument("--num-steps", type=int, default=1000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)
num_samples = 100 if args.num_steps >= 100 else 4  # the short mode draws few

# %%
# The data and two models
# -----------------------
# The counts are simulated: their rate grows with x, and is multiplied by a random factor of mean 1 in each row, so that
# they are negative binomial. The second model knows this, and the first does not.
x = torch.linspace(-1, 1, 60)
factor = dist.Gamma(2.0, 2.0).sample((60,))
y = torch.poisson((1.5 + x).exp() * factor)


def poisson(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((a + b * x).exp()), obs=y)


def negative_binomial(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.GammaPoisson(shape, shape * (-a - b * x).exp()), obs=y)


# %%
# The draws
# ---------
# Each guide is trained and diagnosed. ``sample_posterior`` then draws from the posterior itself. The printed table has
# R-hat and effective sample sizes of its 256 chains.
posteriors, evidence = {}, {}
for model in (poisson, negative_binomial):
    guide = AutoRealNVP(model)
    history = fit_guide(guide, y, num_steps=args.num_steps, seed=0)
    evidence[model.__name__] = diagnose(guide, y).log_evidence
    posteriors[model.__name__] = sample_posterior(guide, y, num_samples=num_samples, seed=0)
    print(f"{model.__name__}, guide trained in {history.seconds:.0f} s\n{posteriors[model.__name__]}\n")

# %%
# In ArviZ
# --------
# ``to_arviz`` gives an ``InferenceData``. On request it holds the log-likelihood of each row and new counts drawn from
# the model.
data = {
    name: posterior.to_arviz(y, log_likelihood=True, posterior_predictive=True)
    for name, posterior in posteriors.items()
}
print(arviz.summary(data["negative_binomial"], kind="stats"))

# %%
# Leave-one-out cross-validation prefers the negative binomial model. So does the evidence that ``diagnose`` estimates.
for name, inference in data.items():
    loo = arviz.loo(inference)
    print(f"{name:<18} elpd {loo.elpd_loo:8.1f} +- {loo.se:.1f}   log evidence {evidence[name]:8.1f}")


# %%
# Traces
# ------
# On the left are the marginals of eight of the chains, on the right their draws.
def save(fig, name):
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        fig.savefig(args.out / f"overdispersion_{name}.png", dpi=120)


axes = arviz.plot_trace(data["negative_binomial"].sel(chain=range(8)), compact=True, figsize=(12, 6))
fig = axes[0, 0].figure
fig.set_layout_engine("constrained")
save(fig, "traces")

# %%
# What the models predict
# -----------------------
# New counts of the Poisson model vary too little: of the observed counts, many more than a tenth are outside of its
# 90 % intervals.
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for ax, (name, inference) in zip(axes, data.items()):
    drawn = torch.as_tensor(inference.posterior_predictive["y"].values).flatten(0, 1)
    low, high = drawn.quantile(torch.tensor([0.05, 0.95]), dim=0)
    outside = ((y < low) | (y > high)).float().mean()
    ax.fill_between(x, low, high, color="tab:orange", alpha=0.4, linewidth=0, label="90 % of new counts")
    ax.scatter(x, y, s=12, color="tab:blue", label="observed")
    ax.set(title=f"{name.replace('_', ' ')}: {outside:.0%} outside", xlabel="x")
axes[0].legend(frameon=False, loc="upper left")
axes[0].set(ylabel="count")
save(fig, "predictions")
if args.out:
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
