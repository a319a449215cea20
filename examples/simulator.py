# SPDX-License-Identifier: Apache-2.0
"""
The posterior of a simulator
============================

A simulator draws data from parameters, but cannot say how probable data are. A conditional flow learns the posterior
from simulations alone, for all observations at once, and its calibration is checked with more of them.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions.transforms as T
import torch
from scipy.stats import binom, chisquare

from pyro_realnvp import Compose, Flow, Logit, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Learn the posterior of the two moons simulator.")
parser.add_argument("--num-steps", type=int, default=3000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)
short = args.num_steps < 100  # the short mode is small everywhere


# %%
# The simulator
# -------------
# Two moons, from the literature on simulation-based inference (Greenberg et al. 2019). The parameters are uniform in a
# square. A point on a noisy crescent is shifted by an amount that does not tell theta from its mirror image.
def draw_prior(n):
    return 2 * torch.rand(n, 2) - 1


def shift(theta):
    return torch.stack([-(theta[..., 0] + theta[..., 1]).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)


def simulate(theta):
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    return crescent + shift(theta)


theta = draw_prior(20_000)
x = simulate(theta)

# %%
# The posterior
# -------------
# A density of theta for each x. The flow ends in the inverse logit and a scaling, so it has no mass outside of the
# prior's square. Maximum likelihood on simulated pairs is all there is to its training.
to_square = [Logit(0).inv, T.AffineTransform(-1.0, 2.0)]
bijection = real_nvp(2, context_dim=2, num_couplings=12, hidden_dims=(64, 64), activation=torch.nn.SiLU)
posterior = Flow(Compose([bijection, *to_square], event_shape=(2,)))
history = fit(posterior, theta, context=x, num_steps=args.num_steps, batch_size=512, patience=None, seed=0)
posterior.requires_grad_(False)
print(f"held-out negative log-density of theta: {history.best_loss:.3f} nats, in {history.seconds:.0f} s")
print(f"that of the prior:                      {math.log(4):.3f} nats")

# %%
# Beside the exact posterior
# --------------------------
# Of this simulator the likelihood is known, so the posterior can be had on a grid. Two crescents, each the mirror image
# of the other; they meet where the observation leaves little to fold. One flow gives them all. Between two crescents it
# leaves a thin bridge, since it bends a normal distribution and cannot cut it.
num_points = 100 if short else 400
line = (torch.arange(num_points) + 0.5) / num_points * 2 - 1
grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
cell = (2 / num_points) ** 2


def exact_log_posterior(observed):
    u = observed - shift(grid) - torch.tensor([0.25, 0.0])
    radius = u.norm(dim=-1)
    log_likelihood = torch.distributions.Normal(0.1, 0.01).log_prob(radius) - (math.pi * radius).log()
    log_likelihood[u[..., 0] < 0] = -math.inf  # the crescent's other half
    return log_likelihood - log_likelihood.logsumexp((0, 1)) - math.log(cell)


observations = torch.tensor([[0.0, 0.0], [-0.5, 0.5], [-0.9, -0.2], [0.3, -0.4]])
fig, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained", sharex=True, sharey=True)
for (above, below), observed in zip(axes.T, observations):
    exact = exact_log_posterior(observed)
    learned = posterior(observed).log_prob(grid)
    kl = (exact.exp() * (exact - learned).nan_to_num(0.0, 0.0, 0.0)).sum() * cell
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
# Where the likelihood is not known, there is still simulation-based calibration (Talts et al. 2018): parameters from
# the prior, data from them, and the rank of the parameters among draws of the posterior. If the posterior is right, all
# ranks are equally probable. The rank of the density itself sees errors that those of single parameters may miss. So
# many tests find errors as small as the bridges; the histograms say how large they are.
num_tests, num_draws, num_bins = 200 if short else 2000, 99, 20
true = draw_prior(num_tests)
distribution = posterior(simulate(true))
draws = distribution.sample((num_draws,))
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
