# SPDX-License-Identifier: Apache-2.0
"""
Conditional densities
=====================

What is x, given c? A regression answers with one number, while a conditional density can give two answers. The first
part fits one with the scikit-learn estimator; the second fits a flow in the plane that turns with an angle.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import make_moons
from sklearn.ensemble import HistGradientBoostingRegressor

from pyro_realnvp import Flow, RealNVPDensity, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Fit conditional densities and draw them.")
parser.add_argument("--num-steps", type=int, default=2000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# An inverse problem
# ------------------
# In the forward direction c is a function of x with noise, c = x + 0.3 sin(2 pi x) (Bishop 1994). In the backward
# direction up to three values of x belong to one c.
random = np.random.default_rng(0)
x = random.uniform(0, 1, size=(2000, 1))
c = x + 0.3 * np.sin(2 * np.pi * x) + 0.05 * random.normal(size=x.shape)
density = RealNVPDensity(support=(0, 1), noise=0.1, num_steps=args.num_steps, random_state=0).fit(x, context=c)
mean = HistGradientBoostingRegressor(random_state=0).fit(c, x[:, 0])

# %%
# The true density is known here: since x is uniform, p(x | c) is proportional to the likelihood of c. On a grid of x
# the Kullback-Leibler divergence is a sum.
grid, contexts = (np.arange(500) + 0.5) / 500, np.linspace(0.0, 1.0, 101)
log_p = np.stack([density.score_samples(grid[:, None], context=np.full((500, 1), context)) for context in contexts])
truth = -((contexts[:, None] - grid - 0.3 * np.sin(2 * np.pi * grid)) ** 2) / (2 * 0.05**2)
truth -= np.log(np.exp(truth).mean(1, keepdims=True))
kl = (np.exp(truth) * (truth - log_p)).mean(1)
print(f"KL(true || flow), mean over c from 0 to 1: {kl.mean():.3f} nats, largest {kl.max():.3f}")

fig, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
axes[0].scatter(c, x, s=3, alpha=0.4)
axes[0].plot(contexts, mean.predict(contexts[:, None]), color="tab:red", label="a regression's mean")
axes[0].set(xlabel="c", ylabel="x", title="2000 pairs", xlim=(0, 1), ylim=(0, 1))
axes[0].legend()
for ax, values, title in ((axes[1], log_p, "flow, p(x | c)"), (axes[2], truth, "true p(x | c)")):
    ax.imshow(
        np.exp(values).T, origin="lower", extent=(0, 1, 0, 1), aspect="auto", vmin=0, vmax=np.exp(truth).max() / 2
    )
    ax.set(xlabel="c", ylabel="x", title=title)
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "conditional.png", dpi=120)

# %%
# In the plane
# ------------
# Each point of the two moons is turned by its own random angle. The context is the cosine and sine of that angle.
points = torch.tensor(make_moons(5000, noise=0.08, random_state=0)[0], dtype=torch.float32) - torch.tensor([0.5, 0.25])
angle = 2 * math.pi * torch.rand(5000)


def turn(points, angle):
    cos, sin = torch.as_tensor(angle).cos(), torch.as_tensor(angle).sin()
    return torch.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], -1)


def context_of(angle):
    return torch.stack([torch.as_tensor(angle).cos(), torch.as_tensor(angle).sin()], -1)


flow = Flow(real_nvp(2, context_dim=2))
history = fit(flow, turn(points, angle), context=context_of(angle), num_steps=args.num_steps, seed=0)
print(f"turning moons: {history.best_loss:.3f} nats held out, at step {history.best_step}")
fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
for ax, degrees in zip(axes, (0, 45, 90, 200)):
    given = torch.tensor(math.radians(degrees))
    plots.plot_density(flow, turn(points[:500], given), context=context_of(given), ax=ax)
    ax.set_title(f"c: {degrees} degrees")
if args.out:
    fig.savefig(args.out / "conditional_moons.png", dpi=120)
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
