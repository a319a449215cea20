# SPDX-License-Identifier: Apache-2.0
"""
The posterior of a simulator
============================

A simulator draws data from parameters, but cannot evaluate the likelihood of data. A conditional flow learns the
posterior from simulations alone, for all observations at once. More simulations check its calibration.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from scipy.stats import binom, chisquare
from torch import nn

from pyro_realnvp import Flow, MixtureBase, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Learn the posterior of the two moons simulator.")
parser.add_argument("--num-steps", type=int, default=30_000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)
short = args.num_steps < 100  # the short mode is small everywhere


# %%
# The simulator
# -------------
# This simulator, "two moons", comes from the literature on simulation-based inference (Greenberg et al. 2019). The
# parameters are uniform in a square. A point on a noisy crescent is shifted by an amount that is the same for theta and
# for its mirror image.
def draw_uniform(n, bound=1.0):
    return bound * (2 * torch.rand(n, 2) - 1)


def shift(theta):
    return torch.stack([-(theta[..., 0] + theta[..., 1]).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)


def simulate(theta):
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    return crescent + shift(theta)


# %%
# The posterior
# -------------
# The flow is a density of theta given x, trained by maximum likelihood on simulated pairs, and by nothing else. An edge
# where the posterior ends all at once is hard for a flow, so the pairs come from a square that is a little wider than
# the prior's. Inside of the prior's square the posterior is the same but for a constant, and draws beyond it are
# rejected. The base is a mixture of normals that depend on x; they line up along the crescents, and the couplings bend
# them. Simulations are free here, so each step gets new ones, and nothing can be overfitted.
def simulations(n):
    while True:
        theta = draw_uniform(n, bound=1.25)
        yield theta, simulate(theta)


bijection = real_nvp(2, context_dim=2, num_couplings=6, hidden_dims=(64, 64), activation=nn.ReLU)
base = MixtureBase(2, num_components=32, context_dim=2, hidden_dims=(64, 64))
posterior = Flow(bijection, base=base)
held_out = next(simulations(1000 if short else 10_000))
history = fit(
    posterior,
    simulations(512),
    validation=held_out,
    num_steps=args.num_steps,
    patience=None,
    validate_every=500,
    compile=not short,
)
posterior.requires_grad_(False)
print(f"held-out negative log-density of theta: {history.best_loss:.3f} nats, in {history.seconds:.0f} s")
print(f"that of the wider square:               {2 * math.log(2.5):.3f} nats")


def draw_posterior(observed, n):
    """Draws inside of the prior's square: (n, ..., 2). Draws beyond it are replaced until none is left."""
    draws = posterior(observed).sample((n,))
    while (beyond := (draws.abs() > 1).any(-1)).any():
        rows = beyond.any(0)
        again = posterior(observed[rows]).sample((n,))
        draws[:, rows] = torch.where(beyond[:, rows, None], again, draws[:, rows])
    return draws


# %%
# Beside the exact posterior
# --------------------------
# The likelihood of this simulator is known, so the exact posterior can be computed on a grid. It consists of two
# crescents, which are mirror images of each other and for some observations meet or are cut off by the square. One flow
# gives the posteriors of all observations.
num_points = 100 if short else 400
line = (torch.arange(num_points) + 0.5) / num_points * 2 - 1
grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
cell = (2 / num_points) ** 2


def exact_log_posterior(observed):
    u = observed - shift(grid) - torch.tensor([0.25, 0.0])
    radius = u.norm(dim=-1)
    log_likelihood = torch.distributions.Normal(0.1, 0.01).log_prob(radius) - (math.pi * radius).log()
    log_likelihood[u[..., 0] < 0] = -math.inf  # the other half of the circle is not part of the crescent
    return log_likelihood - log_likelihood.logsumexp((0, 1)) - math.log(cell)


observations = torch.tensor([[0.0, 0.0], [-0.5, 0.5], [-0.9, -0.2], [0.3, -0.4]])
fig, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained", sharex=True, sharey=True)
for (above, below), observed in zip(axes.T, observations):
    exact = exact_log_posterior(observed)
    learned = posterior(observed).log_prob(grid)
    learned = learned - learned.logsumexp((0, 1)) - math.log(cell)  # as a density in the square
    possible = exact > -math.inf
    kl = (exact.exp() * (exact - learned))[possible].sum() * cell
    title = f"x = ({observed[0]:.1f}, {observed[1]:.1f})"
    print(f"{title}: KL(exact || flow) = {kl:.3f} nats")
    for ax, density, name in ((above, exact.exp(), "exact"), (below, learned.exp(), "flow")):
        style = {"cmap": "magma", "vmin": 0.0, "vmax": exact.exp().max()}
        ax.imshow(density, extent=(-1, 1, -1, 1), origin="lower", **style)
        ax.set(title=f"{name}, {title}")
for ax in axes[:, 0]:
    ax.set(ylabel=r"$\theta_2$")
for ax in axes[1]:
    ax.set(xlabel=r"$\theta_1$")

# %%
# Calibration
# -----------
# If the likelihood is not known, simulation-based calibration still works (Talts et al. 2018). It draws parameters from
# the prior, simulates data from them, and ranks the parameters among draws of the posterior given these data. If the
# posterior is right, all ranks are equally probable. The rank of the density itself can show errors that the ranks of
# single parameters miss. So many tests find errors that are hard to see in a picture; the histograms show their size.
num_tests, num_draws, num_bins = 200 if short else 2000, 99, 20
true = draw_uniform(num_tests)
observed = simulate(true)
distribution, draws = posterior(observed), draw_posterior(observed, num_draws)
ranks = {rf"$\theta_{k + 1}$": (draws[..., k] < true[:, k]).sum(0) for k in range(2)}
ranks["density"] = (distribution.log_prob(draws) < distribution.log_prob(true)).sum(0)
low, high = binom.ppf([0.005, 0.995], num_tests, 1 / num_bins)
calibration, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="constrained")
for ax, (name, rank) in zip(axes, ranks.items()):
    counts = torch.histc(rank.float(), num_bins, 0, num_draws + 1)
    p_value = chisquare(counts.numpy()).pvalue
    print(f"ranks of {name.strip('$').replace(chr(92), ''):<8} uniform with p = {p_value:.2f}")
    ax.axhspan(low, high, color="tab:gray", alpha=0.3, label="99 % of uniform ranks")
    ax.bar(torch.arange(num_bins) * 5 + 2.5, counts, width=4.5, color="tab:orange")
    ax.set(title=f"rank of {name}", xlabel="rank among 99 draws", ylabel="tests", xlim=(0, 100))
axes[0].legend(frameon=False, loc="lower center")
plots.plot_loss(history, ax=axes[3])
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "simulator_posteriors.png", dpi=120)
    calibration.savefig(args.out / "simulator_calibration.png", dpi=120)
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
