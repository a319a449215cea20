# SPDX-License-Identifier: Apache-2.0
"""
Digits
======

A multi-scale RealNVP over integer images, conditional on the class. The example trains it, counts the bits per
dimension, draws samples, interpolates, shows what each scale holds, and tells digits from other images.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import one_hot, pad

from pyro_realnvp import (
    Compose,
    DequantizedFlow,
    Flow,
    Logit,
    bits_per_dim,
    fit,
    image_real_nvp,
    interpolate,
    latent_scales,
    plots,
)

parser = argparse.ArgumentParser(description="Fit a multi-scale RealNVP to scikit-learn's digits and draw it.")
parser.add_argument("--num-steps", type=int, default=700)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The data
# --------
# There are 1797 images of 8 x 8 pixels with 17 levels of gray, as integers of shape ``(N, 1, 8, 8)``. A fifth of them
# is the test set.
digits = load_digits()
shape, levels = (1, 8, 8), 17
order = torch.randperm(len(digits.images))
x = torch.tensor(digits.images[order]).long().unsqueeze(1)
labels = torch.tensor(digits.target[order])
x_test, labels_test, x, labels = x[:360], labels[:360], x[360:], labels[360:]

# %%
# The model
# ---------
# From base to pixels, the multi-scale flow comes first, then the inverse logit, which maps to the range of the pixels.
# ``DequantizedFlow`` turns this density into a distribution over integer images. The class is the context.
flow = Flow(Compose([image_real_nvp(shape, context_dim=10), Logit().inv]))
images = DequantizedFlow(flow, levels=levels)
history = fit(
    images,
    x,
    context=one_hot(labels, 10).float(),
    num_steps=args.num_steps,
    batch_size=128,
    lr=2e-3,
    weight_decay=0.1,
    patience=None,
    seed=0,
)
images.eval().requires_grad_(False)


# %%
# Bits per dimension
# ------------------
# If the class is unknown, :math:`P(x) = \frac{1}{10} \sum_c P(x \mid c)`. Bayes' rule turns the model into a
# classifier.
def log_prob_of_classes(x, num_samples=1):
    return torch.stack([images(one, num_samples=num_samples).log_prob(x) for one in torch.eye(10)], -1)


def log_prob(x):
    return log_prob_of_classes(x).logsumexp(-1) - math.log(10)


print(f"test bits/dim:                {bits_per_dim(log_prob(x_test), shape).mean():.3f}")
of_classes = log_prob_of_classes(x_test, num_samples=16)
print(f"with 16 samples in the bound: {bits_per_dim(of_classes.logsumexp(-1) - math.log(10), shape).mean():.3f}")
print(f"with the class known:         {bits_per_dim(of_classes[range(360), labels_test], shape).mean():.3f}")
print(f"bits of a uniform guess:      {math.log2(levels):.3f}")
print(f"classified by Bayes' rule:    {(of_classes.argmax(-1) == labels_test).float().mean():.1%} right")


# %%
# Samples
# -------
# Each column is one class. The first picture shows data, the others samples at temperature 1 and at temperature 0.7,
# where they lie closer to the typical digit.
def save(fig, name):
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        fig.savefig(args.out / f"digits_{name}.png", dpi=120)


def show_grid(rows, title, ax):
    """Draws rows of images as one picture, with margins between them."""
    grid = torch.cat([torch.cat(list(pad(row[:, 0], (1, 1, 1, 1))), 1) for row in rows])
    ax.imshow(grid, cmap="gray_r", vmin=0, vmax=levels - 1)
    ax.set(title=title, xticks=[], yticks=[])


fig, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
show_grid([torch.stack([x[labels == k][row] for k in range(10)]) for row in range(8)], "data", axes[0])
for ax, temperature in zip(axes[1:], (1.0, 0.7)):
    show_grid(images(torch.eye(10), temperature=temperature).sample((8,)), f"samples, temperature {temperature}", ax)
save(fig, "samples")

# %%
# Interpolation
# -------------
# Each row leads from one test image to another of the same class, along a great circle of the latent space.
pairs = [x_test[labels_test == k][:2] for k in range(10)]
start, end = (torch.stack([pair[k] for pair in pairs]) for k in (0, 1))
way = interpolate(images, start, end, 12, context=torch.eye(10))
fig, ax = plt.subplots(figsize=(7, 6), layout="constrained")
show_grid(way.transpose(0, 1), "test image, way through latent space, test image", ax)
save(fig, "interpolation")

# %%
# What each scale holds
# ---------------------
# Half of the latents are factored out at the first, fine scale. On the left are test images. In the middle their fine
# latents are drawn again and the coarse ones kept; on the right it is the other way round.
bijection = flow.bijection.condition(torch.eye(10))
latent = bijection.inv((start + 0.5) / levels)
fine = latent_scales(shape) == 1
fig, axes = plt.subplots(1, 3, figsize=(9, 8), layout="constrained", width_ratios=[1, 5, 5])
show_grid(start[:, None], "image", axes[0])
for ax, drawn, title in zip(axes[1:], (fine, ~fine), ("fine scale drawn again", "coarse scale drawn again")):
    pixels = bijection(torch.where(drawn, torch.randn(5, *latent.shape), latent))
    show_grid((pixels * levels).floor().clamp(0, levels - 1).transpose(0, 1), title, ax)
save(fig, "scales")

# %%
# In and out of distribution
# --------------------------
# How many bits do other images take? The test digits are compared with the same digits upside down, with shuffled
# pixels, and with inverted levels.
others = {
    "test digits": x_test,
    "upside down": x_test.flip(-2),
    "pixels shuffled": x_test.flatten(1)[:, torch.randperm(64)].reshape(-1, *shape),
    "inverted": levels - 1 - x_test,
}
fig, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for name, other in others.items():
    bits = bits_per_dim(log_prob(other), shape)
    print(f"{name + ':':<16} {bits.median():6.2f} bits/dim")
    axes[0].hist(bits, bins=torch.logspace(0, 2, 100), alpha=0.6, label=name)
axes[0].set(title="likelihood", xlabel="bits/dim", ylabel="images", xscale="log")
axes[0].legend(frameon=False)
plots.plot_loss(history, ax=axes[1])
save(fig, "likelihood")
if args.out:
    print(f"pictures in {args.out.resolve()}")
else:
    plt.show()
