# SPDX-License-Identifier: Apache-2.0
"""
A variational autoencoder
=========================

Four variational autoencoders learn digits with two latent variables. The prior is a standard normal or a flow, and the
posterior of each image is a normal or a flow. The decoder and the number of steps are the same for all four.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import pad

from pyro_realnvp import AmortizedRealNVP, Base, Flow, fit_guide, real_nvp

parser = argparse.ArgumentParser(description="Train a VAE with flows as prior and posterior.")
parser.add_argument("--num-steps", type=int, default=1500)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The data
# --------
# There are 1797 images of 8 x 8 pixels, integers from 0 to 16. A fifth of them is the test set.
digits = load_digits()
order = torch.randperm(len(digits.data))
x, labels = torch.tensor(digits.data, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
x_test, labels_test, x = x[:360], labels[:360], x[360:]
latent_dim = 2


# %%
# The model
# ---------
# The decoder returns the logits of a binomial distribution for each pixel. The prior is a module that returns a
# distribution: a ``Base``, which is fixed, or a ``Flow``, which is learned with the decoder. ``pyro.module`` registers
# prior and decoder. At each step the plate draws ``batch_size`` of the images and scales their likelihood to the whole
# data set.
class VAE(nn.Module):
    def __init__(self, name, prior):
        super().__init__()
        self.name = name  # each VAE has its own parameters in Pyro's store
        self.prior = prior
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
        self.decoder.append(nn.Linear(128, x.shape[-1]))

    def model(self, x, batch_size=None):
        pyro.module(self.name, self)
        with plate(x, batch_size):
            batch = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=batch)


def plate(x, batch_size=None):
    return pyro.plate("images", len(x), subsample_size=batch_size, dim=-1)


# %%
# Two guides
# ----------
# The encoder reads an image and returns the mean and the log-scale of a normal, or the context of a flow.
# ``AmortizedRealNVP`` gets the plate that draws the images, and calls the encoder inside of it.
class Encoder(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(x.shape[-1], 128), nn.Tanh(), nn.Linear(128, width))

    def forward(self, x, batch_size=None):
        return super().forward(pyro.subsample(x, event_dim=1) / 8 - 1)


class NormalGuide(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.encoder = name, Encoder(2 * latent_dim)

    def forward(self, x, batch_size=None):
        pyro.module(self.name, self)
        with plate(x, batch_size):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            return {"z": pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))}


def flow_guide(model):
    return AmortizedRealNVP(model, Encoder(64), context_dim=64, create_plates=plate)


# %%
# Training
# --------
# ``fit_guide`` trains the guide, the decoder and the prior together. The ELBO of the test images, in nats per image,
# is a lower bound of their log-likelihood.
standard = Base(dist.Normal, loc=torch.zeros(latent_dim), scale=torch.ones(latent_dim))
vaes = {}
print(f"{'prior':<10}{'posterior':<12}{'test ELBO':>11}{'seconds':>9}")
for prior in ("normal", "flow"):
    for posterior in ("normal", "flow"):
        pyro.set_rng_seed(1)  # the same decoder for all
        name = f"{prior} prior, {posterior} posterior"
        vae = VAE(name, standard if prior == "normal" else None)
        if prior == "flow":
            vae.prior = Flow(real_nvp(latent_dim, num_couplings=8))
        guide = NormalGuide(f"guide of {name}") if posterior == "normal" else flow_guide(vae.model)
        history = fit_guide(
            guide,
            x,
            128,
            model=vae.model,
            num_steps=args.num_steps,
            num_particles=1,
            lr=3e-3,
            validation_particles=16,
            validate_every=max(args.num_steps // 10, 1),
            progress=False,
        )
        with torch.no_grad():
            elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
            value = -elbo.loss(vae.model, guide, x_test) / len(x_test)
        print(f"{prior:<10}{posterior:<12}{value:>11.2f}{history.seconds:>9.0f}")
        vaes[name] = vae, guide


# %%
# Samples, and the latent space
# -----------------------------
# The upper row shows the mean pixels at draws of the prior. The lower row shows the log-density of the prior, and one
# draw of the posterior of each test image, in the color of its digit. A flow prior moves to where the images are. If
# both prior and posterior are flows, nothing fixes the scale of the latent space.
fig, axes = plt.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
for (above, below), (name, (vae, guide)) in zip(axes.T, vaes.items()):
    with torch.no_grad():
        pixels = vae.decoder(vae.prior().sample((10, 10))).sigmoid().unflatten(-1, (8, 8))
        z = guide(x_test)["z"]
        low, high = z.quantile(torch.tensor([0.01, 0.99]), dim=0)
        margin = (high - low) / 4
        lines = [torch.linspace(a, b, 150) for a, b in zip((low - margin).tolist(), (high + margin).tolist())]
        density = vae.prior().log_prob(torch.stack(torch.meshgrid(*lines, indexing="xy"), -1))
    above.imshow(torch.cat(list(torch.cat(list(pad(pixels, (1, 1, 1, 1)).movedim(1, 0)), -1)), -2), cmap="gray_r")
    above.set(title=name, xticks=[], yticks=[])
    style = {"cmap": "Greys", "vmin": density.max() - 8, "vmax": density.max() + 4, "shading": "gouraud"}
    below.pcolormesh(*lines, density, rasterized=True, **style)
    points = below.scatter(*z.T, s=8, c=labels_test, cmap="tab10", vmin=-0.5, vmax=9.5)
    below.set(xlim=lines[0][[0, -1]].tolist(), ylim=lines[1][[0, -1]].tolist(), xlabel="$z_1$", ylabel="$z_2$")
fig.colorbar(points, ax=axes, ticks=range(10), label="digit")
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "vae.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
