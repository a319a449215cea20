# SPDX-License-Identifier: Apache-2.0
"""
Eight schools
=============

A flow is the guide of a hierarchical model whose posterior is a funnel. The example trains it, diagnoses how good it
is, corrects it by importance sampling, and compares it with NUTS.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, plots

parser = argparse.ArgumentParser(description="Fit a RealNVP guide to eight schools and compare it with NUTS.")
parser.add_argument("--num-steps", type=int, default=2000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The model
# ---------
# The model describes the effect of coaching in eight schools, each measured with an error (Rubin 1981). The effects
# theta are drawn around a common mean mu with standard deviation tau. In this "centered" form theta depends on tau:
# if tau is small, theta has little room. A normal guide cannot follow that.
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %%
# The guide
# ---------
# The guide is made from the model, trained and diagnosed. Pareto's k says how well the tails of the guide match those
# of the posterior: below 0.5 they are good, above 0.7 they are not. For comparison, a normal guide with all
# correlations is trained in the same way.
guide = AutoRealNVP(model)
history = fit_guide(guide, y, num_steps=args.num_steps, seed=0)
diagnosis = diagnose(guide, y, num_samples=10_000)
print(f"AutoRealNVP, trained in {history.seconds:.0f} s:")
print(diagnosis)

normal = AutoMultivariateNormal(model)
history_of_normal = fit_guide(normal, y, num_steps=args.num_steps, seed=0)
print(f"AutoMultivariateNormal, trained in {history_of_normal.seconds:.0f} s:")
print(diagnose(normal, y, num_samples=10_000))

# %%
# The reference
# -------------
# NUTS samples the same model with theta standardized by mu and tau (the "non-centered" form), which has no funnel.
num_draws = 1000 if args.num_steps >= 100 else 10  # the short mode draws few
noncentered = poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
mcmc = MCMC(NUTS(noncentered), num_draws, warmup_steps=num_draws, disable_progbar=True)
mcmc.run(y)
nuts = mcmc.get_samples()
nuts["theta"] = nuts["mu"][:, None] + nuts["tau"][:, None] * nuts.pop("theta_decentered")

# %%
# The table compares means and standard deviations. Resampling corrects the guide's draws by their importance weights.
draws = {"guide": diagnosis.draws, "guide, resampled": diagnosis.resample(4000), "NUTS": nuts}
print(f"{'':<18}" + "".join(f"{name:>22}" for name in ("log tau", "mu", "theta[0]", "theta[2]")))
for name, sites in draws.items():
    columns = (sites["tau"].log(), sites["mu"], sites["theta"][:, 0], sites["theta"][:, 2])
    print(f"{name:<18}" + "".join(f"{column.mean():>14.2f} +- {column.std():.2f}" for column in columns))
for name, sites in draws.items():
    print(f"log tau below -1.5, {name + ':':<18}{(sites['tau'].log() < -1.5).float().mean():>6.1%}")


# %%
# Marginals
# ---------
def save(fig, name):
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        fig.savefig(args.out / f"eight_schools_{name}.png", dpi=120)


colors = {"guide": "tab:orange", "guide, resampled": "tab:green", "NUTS": "black"}
fig, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="constrained")
pictures = {
    r"$\log \tau$": (lambda sites: sites["tau"].log(), (-4, 4)),
    r"$\mu$": (lambda sites: sites["mu"], (-12, 20)),
    r"$\theta_1$": (lambda sites: sites["theta"][:, 0], (-15, 40)),
    r"$\theta_3$": (lambda sites: sites["theta"][:, 2], (-30, 25)),
}
for ax, (label, (of, limits)) in zip(axes, pictures.items()):
    for name, sites in draws.items():
        style = {"linewidth": 1.5} if name != "NUTS" else {"alpha": 0.25}
        kind = "step" if name != "NUTS" else "stepfilled"
        ax.hist(of(sites), bins=50, range=limits, density=True, histtype=kind, color=colors[name], label=name, **style)
    ax.set(title=label, yticks=[])
axes[0].legend(frameon=False, loc="upper left")
save(fig, "marginals")

# %%
# The funnel
# ----------
# If tau is small, all effects are nearly the same. The guide follows the funnel most of the way down to the neck, which
# holds a few percent of the posterior. Resampling draws the neck more often, but cannot reach regions that the guide
# never draws.
fig, axes = plt.subplots(1, 5, figsize=(18, 3.5), layout="constrained", width_ratios=[1, 1, 1, 1, 1.3])
of_normal = diagnose(normal, y, num_samples=1000).draws
for ax, (name, sites) in zip(axes, ({"normal guide": of_normal} | draws).items()):
    ax.scatter(sites["theta"][:1000, 0], sites["tau"][:1000].log(), s=3, alpha=0.5, color=colors.get(name, "tab:blue"))
    ax.set(title=name, xlabel=r"$\theta_1$", ylabel=r"$\log \tau$", xlim=(-20, 40), ylim=(-5, 4))
plots.plot_loss(history, ax=axes[4])
axes[4].set(title="loss of the guide", ylabel="negative ELBO (nats)")
save(fig, "funnel")
if args.out:
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
