# SPDX-License-Identifier: Apache-2.0
"""
Two moons
=========

A RealNVP flow learns a density from points. The example trains it and shows the reconstruction error, the density, the
samples, the loss, the latent space, and what the layers do.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.datasets import make_moons

from pyro_realnvp import Flow, MixtureBase, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Fit a RealNVP flow to two moons and draw it.")
parser.add_argument("--num-steps", type=int, default=2000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The data
# --------
# The data are 3000 points on two half circles with noise, standardized.
points, labels = make_moons(3000, noise=0.05, random_state=0)
x = torch.tensor(points, dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)

# %%
# The flow
# --------
# A flow joins a base and a bijection from base to data. By default the base is a standard normal. But a bijection is
# continuous and cannot cut a normal in two, so a thin bridge would stay between the moons. Here the base is a mixture
# of normals, one for each separate cluster of the points. ``fit`` trains base and bijection by maximum likelihood and
# holds out a part of the data.
flow = Flow(real_nvp(2), base=MixtureBase.for_rows(x))
history = fit(flow, x, num_steps=args.num_steps, seed=0)
print(f"held-out negative log-likelihood: {history.best_loss:.3f} nats, at step {history.best_step}")
print(f"that of a standard normal:        {Flow(real_nvp(2))().log_prob(x).mean().neg():.3f} nats")

# %%
# Exactly invertible
# ------------------
# Every data point has a latent point, from which the flow returns to the data point.
latent = flow.bijection.inv(x)
error = (flow.bijection(latent.clone()) - x).abs().max().item()
print(f"largest reconstruction error:     {error:.1e}")

# %%
# The density, data beside samples, and the loss
# ----------------------------------------------
fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
plots.plot_density(flow, x, max_points=0, ax=axes[0])
plots.plot_samples(flow, x, axes=axes[1:3])
plots.plot_loss(history, ax=axes[3])
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "two_moons.png", dpi=120)

# %%
# Data in latent space
# --------------------
# In latent space the two moons, in two colors, fill the two normals of the base. The second picture shows what the
# layers do on the way.
latent_axes = plots.plot_latent(flow, x, color=torch.tensor(labels))
layers = plots.plot_layers(flow, x, color=torch.tensor(labels))
if args.out:
    latent_axes.figure.savefig(args.out / "two_moons_latent.png", dpi=120)
    layers.savefig(args.out / "two_moons_layers.png", dpi=120)
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
