# SPDX-License-Identifier: Apache-2.0
"""
Neal's funnel
=============

The scale of this density changes a hundredfold from one end to the other. The example compares a mean-field guide, a
flow guide, NUTS, and NUTS in the coordinates of the flow guide (NeuTra) with the true density, which is known here.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.ops.stats import effective_sample_size

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, neutra

parser = argparse.ArgumentParser(description="Approximate Neal's funnel with guides and NeuTra.")
parser.add_argument("--num-steps", type=int, default=2000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)
num_draws = 400 if args.num_steps >= 100 else 10  # the short mode draws few


# %%
# The funnel
# ----------
# In Neal's funnel (2003) v is normal with standard deviation 3, and exp(v/2) is the standard deviation of each x.
# Nothing is observed, so the log-evidence is 0, and the ELBO of a guide is -KL(guide || funnel).
def model():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dims", 3):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


# %%
# Two guides
# ----------
# Both guides are trained in the same way. The mean-field guide has a normal for each variable, so it can only settle
# somewhere in the middle of the funnel, and half of the steps are enough for that.
guides = {"mean-field": AutoNormal(model), "AutoRealNVP": AutoRealNVP(model)}
num_steps = {"mean-field": max(args.num_steps // 2, 1), "AutoRealNVP": args.num_steps}
diagnoses, draws = {}, {}
for name, guide in guides.items():
    history = fit_guide(guide, num_steps=num_steps[name], seed=0)
    diagnoses[name] = diagnose(guide, num_samples=5000)
    draws[name] = diagnoses[name].draws
    print(f"{name}: {len(history.loss)} steps in {history.seconds:.0f} s\n{diagnoses[name]}")

# %%
# Exact draws
# -----------
# NUTS runs in the model's own coordinates and in those of the flow guide. Divergences are trajectories that went wrong:
# steps that suit the wide part of the funnel are too large for the narrow part. The draws can be wrong even if there
# are few divergences, since chains that do not reach the neck do not diverge in it. The effective sample size shows
# this.
started = time.perf_counter()
kernel = NUTS(model)
mcmc = MCMC(kernel, num_draws, warmup_steps=num_draws // 2, disable_progbar=True)
mcmc.run()
draws["NUTS"] = mcmc.get_samples()
seconds = time.perf_counter() - started
divergences = sum(len(steps) for steps in mcmc.diagnostics()["divergences"].values())
ess = effective_sample_size(draws["NUTS"]["v"][None]).item()
print(f"NUTS:   {divergences} divergences, {ess:.0f} effective draws of v in {seconds:.0f} s")

posterior = neutra(guides["AutoRealNVP"], num_samples=num_draws, warmup_steps=num_draws // 2, progress=False)
draws["NeuTra"] = posterior.samples
ess = posterior.effective_sample_size["v"].item()
print(f"NeuTra: {posterior.divergences.sum()} divergences, {ess:.0f} effective draws of v in {posterior.seconds:.0f} s")
print(posterior)

# %%
# The table shows the draws of v, which should have mean 0 and standard deviation 3.
print(f"{'':<12}{'mean':>8}{'std':>8}{'1 %':>8}{'99 %':>8}")
levels = torch.tensor([0.01, 0.99])
exact = dist.Normal(0.0, 3.0)
print(f"{'exact':<12}{0.0:>8.2f}{3.0:>8.2f}" + "".join(f"{q:>8.2f}" for q in exact.icdf(levels)))
for name, sites in draws.items():
    v = sites["v"]
    print(f"{name:<12}{v.mean():>8.2f}{v.std():>8.2f}" + "".join(f"{q:>8.2f}" for q in v.quantile(levels)))

# %%
# Draws over the true density
# ---------------------------
# The upper row shows v and one x over their true density, in gray. The lower row shows v alone, with its exact
# marginal.
fig, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained", height_ratios=[1.6, 1], sharey="row")
grid_x, grid_v = torch.meshgrid(torch.linspace(-30, 30, 300), torch.linspace(-10, 10, 300), indexing="xy")
log_density = exact.log_prob(grid_v) + dist.Normal(0.0, (grid_v / 2).exp()).log_prob(grid_x)
line = torch.linspace(-10, 10, 300)
colors = {"mean-field": "tab:blue", "AutoRealNVP": "tab:orange", "NUTS": "tab:red", "NeuTra": "tab:green"}
for (above, below), (name, sites) in zip(axes.T, draws.items()):
    above.contourf(grid_x, grid_v, log_density, levels=torch.arange(-12.0, 2.0, 1.5), cmap="Greys", extend="max")
    above.scatter(sites["x"][:1000, 0], sites["v"][:1000], s=3, color=colors[name], alpha=0.6, linewidths=0)
    above.set(title=name, xlabel="$x_1$", xlim=(-30, 30), ylim=(-10, 10))
    below.hist(sites["v"], bins=40, range=(-10, 10), density=True, color=colors[name], alpha=0.6)
    below.plot(line, exact.log_prob(line).exp(), color="black", linewidth=1)
    below.set(xlabel="$v$", yticks=[])
axes[0, 0].set(ylabel="$v$")
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "funnel.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
