# SPDX-License-Identifier: Apache-2.0
"""
A hierarchy with some hundred latents
=====================================

Each of 85 counties has its own intercept and its own slope, and some counties have a single measurement. The example
fits a flow guide to all 175 latents at once, diagnoses it, and compares it with a long run of NUTS.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.stats import effective_sample_size

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, plots

parser = argparse.ArgumentParser(description="Fit a RealNVP guide to varying intercepts and slopes.")
parser.add_argument("--num-steps", type=int, default=2000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The data
# --------
# The data are simulated after the well-known measurements of radon in houses of Minnesota (Gelman and Hill 2007). There
# are 919 houses in 85 counties of very unequal sizes. Measurements in the basement (x = 0) are higher than those on the
# first floor (x = 1), by an amount that differs from county to county.
num_rows, num_counties = (919, 85) if args.num_steps >= 100 else (60, 8)  # the short mode has few
more = torch.multinomial((1.2 * torch.randn(num_counties)).exp(), num_rows - num_counties, replacement=True)
county = torch.cat([torch.arange(num_counties), more])  # each county has one row or more
size = county.bincount()
x = (torch.rand(num_rows) < 0.2).float()
truth = {"mu_a": 1.5, "tau_a": 0.35, "mu_b": -0.7, "tau_b": 0.3, "sigma": 0.75}
a = truth["mu_a"] + truth["tau_a"] * torch.randn(num_counties)
b = truth["mu_b"] + truth["tau_b"] * torch.randn(num_counties)
y = a[county] + b[county] * x + truth["sigma"] * torch.randn(num_rows)
print(f"{num_counties} counties with {size.min()} to {size.max()} rows, {(size <= 3).sum()} of them with at most 3")


# %%
# The model
# ---------
# Intercepts a and slopes b are written as they are meant, around their means (the "centered" form).
def model(county, x, y):
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 2.0))
    tau_a = pyro.sample("tau_a", dist.HalfNormal(1.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 2.0))
    tau_b = pyro.sample("tau_b", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", num_counties):
        a = pyro.sample("a", dist.Normal(mu_a, tau_a))
        b = pyro.sample("b", dist.Normal(mu_b, tau_b))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(a[county] + b[county] * x, sigma), obs=y)


# %%
# The guide
# ---------
# Small counties would like the non-centered form and large ones the centered form. The guide chooses for each county by
# itself, from the curvature of its data, so the model needs no rewriting.
guide = AutoRealNVP(model)
history = fit_guide(guide, county, x, y, num_steps=args.num_steps, seed=0)
diagnosis = diagnose(guide, county, x, y, num_samples=10_000)
print(f"AutoRealNVP, {guide.latent_dim} latents, trained in {history.seconds:.0f} s:")
print(diagnosis)

# %%
# The reference
# -------------
# NUTS samples the model in the non-centered form, which Pyro makes of it.
num_draws = 1000 if args.num_steps >= 100 else 10  # the short mode draws few
noncentered = poutine.reparam(model, config={"a": LocScaleReparam(0.0), "b": LocScaleReparam(0.0)})
started = time.perf_counter()
mcmc = MCMC(NUTS(noncentered), num_draws, warmup_steps=num_draws // 2, disable_progbar=True)
mcmc.run(county, x, y)
seconds = time.perf_counter() - started
nuts = mcmc.get_samples()
for name in ("a", "b"):
    nuts[name] = nuts[f"mu_{name}"][:, None] + nuts[f"tau_{name}"][:, None] * nuts.pop(f"{name}_decentered")
divergences = sum(len(steps) for steps in mcmc.diagnostics()["divergences"].values())
print(f"NUTS: {num_draws} draws in {seconds:.0f} s, {divergences} divergences")

# %%
# The table compares means and standard deviations of the hyperparameters, with the truth and with the effective sample
# size (ESS) of NUTS. Resampling corrects the guide's draws by their importance weights.
draws = {"guide": diagnosis.draws, "guide, resampled": diagnosis.resample(4000), "NUTS": nuts}
print(f"{'':<8}{'truth':>6}" + "".join(f"{name:>20}" for name in draws) + f"{'ESS of NUTS':>14}")
for name, value in truth.items():
    columns = (f"{sites[name].mean():>12.3f} +- {sites[name].std():.3f}"[-20:] for sites in draws.values())
    ess = effective_sample_size(nuts[name][None])
    print(f"{name:<8}{value:>6.2f}" + "".join(f"{column:>20}" for column in columns) + f"{ess:>14.0f}")

# %%
# The data hardly tell tau_b from zero, where all slopes are equal. The guide draws this end too seldom, and
# resampling corrects it.
for name, sites in draws.items():
    print(f"tau_b below 0.1, {name + ':':<18}{(sites['tau_b'] < 0.1).float().mean():>6.1%}")

# %%
# Over all latents, the largest difference of the means is put beside the standard error of NUTS itself at this
# latent.
flat = {
    name: torch.cat([sites[n].reshape(len(sites[n]), -1) for n in (*truth, "a", "b")], 1)
    for name, sites in draws.items()
}
sd, error = flat["NUTS"].std(0), effective_sample_size(flat["NUTS"][None]).rsqrt()
for name in ("guide", "guide, resampled"):
    difference, ratio = ((flat[name].mean(0) - flat["NUTS"].mean(0)) / sd).abs(), flat[name].std(0) / sd
    print(f"{name}: means differ by at most {difference.max():.3f} sd (error {error[difference.argmax()]:.3f} sd)")
    print(f"{name}: its sd is {ratio.min():.3f} to {ratio.max():.3f} times that of NUTS")

# %%
# The counties
# ------------
# Intercepts of small counties are drawn towards the common mean and have wide intervals, and those of large counties go
# where their data are. The guide follows NUTS in both.
colors = {"guide": "tab:orange", "NUTS": "black"}
fig, axes = plt.subplot_mosaic([["a"] * 3, ["tau_a", "tau_b", "loss"]], figsize=(14, 7.5), layout="constrained")
order, ranks = size.argsort(stable=True), torch.arange(num_counties)
for name, shift in (("guide", -0.17), ("NUTS", 0.17)):
    low, middle, high = draws[name]["a"][:, order].quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    axes["a"].vlines(ranks + shift, low, high, color=colors[name], linewidth=1.2, label=name)
    axes["a"].scatter(ranks + shift, middle, color=colors[name], s=9)
    style = {"histtype": "step", "linewidth": 1.5} if name == "guide" else {"alpha": 0.25}
    for tau in ("tau_a", "tau_b"):
        axes[tau].hist(draws[name][tau], bins=25, density=True, color=colors[name], **style)
for name in ("tau_a", "tau_b"):
    axes[name].axvline(truth[name], color="tab:blue", linestyle="--")
    axes[name].set(title=f"{name}, truth dashed", yticks=[])
axes["a"].scatter(ranks, a[order], marker="_", s=40, color="tab:blue", label="truth", zorder=3)
axes["a"].axhline(nuts["mu_a"].mean(), color="gray", linewidth=0.7)
axes["a"].set(title="intercepts, medians and 90 % intervals", xlabel="rows of the county", xlim=(-1, num_counties))
axes["a"].set_xticks(ranks[::4], size[order][::4].tolist())
axes["a"].legend(frameon=False, ncols=3, loc="lower right")
plots.plot_loss(history, ax=axes["loss"])
lowest = min(history.loss)
axes["loss"].set(title="loss of the guide", ylabel="negative ELBO (nats)", ylim=(lowest - 0.3, lowest + 3))
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "hierarchical.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
