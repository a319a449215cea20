# SPDX-License-Identifier: Apache-2.0
"""
Several modes
=============

The posterior of a mixture model has a mode for each order of its clusters. A guide that starts at one point finds one
of them, and its own numbers do not show that the other is missing. With several starts the guide gets a base with a
normal for each mode, and learns how much each weighs.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide, sample_posterior

parser = argparse.ArgumentParser(description="Find both modes of a mixture model.")
parser.add_argument("--num-steps", type=int, default=1000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)
short = args.num_steps < 100  # the short mode is small everywhere

# %%
# The model
# ---------
# Twenty points come from each of two clusters, and the model has a mean for each. Nothing says which mean is which, so
# the posterior is symmetric: it has two modes of the same weight.
y = torch.cat([torch.randn(20) - 2, torch.randn(20) + 2])


def model(y):
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    each = dist.Normal(means[:, None], 1.0).log_prob(y)
    pyro.factor("y", (each.logsumexp(0) - math.log(2)).sum())


# %%
# In two dimensions the evidence is known by quadrature.
axis = torch.linspace(-5, 5, 400)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
each = dist.Normal(grid[..., None], 1.0).log_prob(y)
log_p = (each.logsumexp(-2) - math.log(2)).sum(-1) + dist.Normal(0.0, 5.0).log_prob(grid).sum(-1)
evidence = log_p.logsumexp((0, 1)) + 2 * math.log(axis[1] - axis[0])
print(f"log evidence, by quadrature: {evidence:.3f} nats")

# %%
# One start, and sixteen
# ----------------------
# With one start, the guide takes one mode for the whole posterior. Its importance weights are nearly equal, since they
# only see where the guide is. But the evidence is too low by log 2, and the last line of the diagnosis says that nobody
# looked for another mode.
guides = {}
for num_starts in (1, 16):
    guides[num_starts] = AutoRealNVP(model, num_starts=num_starts)
    fit_guide(guides[num_starts], y, num_steps=args.num_steps, seed=0, progress=False)
    print(f"\nnum_starts={num_starts}")
    print(diagnose(guides[num_starts], y))

# %%
# Exact draws
# -----------
# The chains start in both modes, and the guide's proposals take them from one to the other.
posterior = sample_posterior(guides[16], y, num_samples=10 if short else 100, warmup_steps=20 if short else 200)
means = posterior.samples["means"]
print(f"share of the draws with m_1 < m_2: {(means[:, 0] < means[:, 1]).float().mean():.3f}")

fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained", sharex=True, sharey=True)
axes[0].imshow((log_p - log_p.max()).exp(), extent=(-5, 5, -5, 5), origin="lower", cmap="magma")
axes[0].set(title="posterior", ylabel="$m_2$")
draws = {f"guide, {n} start{'s' * (n > 1)}": guide.sample(2000)["means"] for n, guide in guides.items()}
for ax, (title, points) in zip(axes[1:], (draws | {"exact draws": means[:: max(1, len(means) // 2000)]}).items()):
    ax.scatter(*points.T, s=3, alpha=0.5, linewidths=0, color="tab:orange")
    ax.set(title=title, aspect="equal")
for ax in axes:
    ax.set(xlabel="$m_1$", xlim=(-5, 5), ylim=(-5, 5))
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "several_modes.png", dpi=120)
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
