# SPDX-License-Identifier: Apache-2.0
"""
Composing with Pyro's transforms
================================

Couplings and Pyro's own transforms form one bijection, first as a density and then as a variational guide. ``Compose``
registers all parameters, evaluates every network once, and leaves no cache to clear.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from sklearn.datasets import make_s_curve

from pyro_realnvp import Compose, Flow, check_bijection, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Compose RealNVP couplings with Pyro's transforms.")
parser.add_argument("--num-steps", type=int, default=1500)
parser.add_argument("--out", type=Path, help="folder for the picture; by default it is shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# As a density
# ------------
# The data have the shape of an S. The flow is a spline, couplings with a permutation and reflections between them, and
# an affine map that gives the samples the scale of the data.
points, _ = make_s_curve(3000, noise=0.1, random_state=0)
x = torch.tensor(points[:, [0, 2]] * 5 + 10, dtype=torch.float32)


def flow_of(dim: int, num_couplings: int = 4) -> Compose:
    """From base to data: couplings of this package, with Pyro's transforms between them."""
    return Compose(
        [
            real_nvp(dim, num_couplings=num_couplings),
            T.permute(dim),
            T.Householder(dim, count_transforms=2),
            real_nvp(dim, num_couplings=num_couplings),
        ]
    )


to_scale = T.AffineTransform(x.mean(0), x.std(0))
spline = T.Spline(2, bound=4.0)
for parameter in spline.parameters():
    torch.nn.init.zeros_(parameter)  # Pyro's spline starts at random; from here it starts near the identity
flow = Flow(Compose([spline, flow_of(2, num_couplings=8), to_scale]))
print(check_bijection(flow.bijection, x[:100], tolerance=1e-2))
history = fit(flow, x, num_steps=args.num_steps, seed=0)
print(f"held-out negative log-likelihood: {history.best_loss:.3f} nats")

# %%
# As a guide
# ----------
# Pyro's ``AutoNormalizingFlow`` takes the same function and fits a posterior that has the shape of a banana.


def model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a**2, 0.2), obs=torch.tensor(1.0))


guide = AutoNormalizingFlow(model, flow_of)
adam = pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": 0.1 ** (1 / args.num_steps)})
svi = SVI(model, guide, adam, Trace_ELBO(num_particles=64, vectorize_particles=True))
losses = [svi.step() for _ in range(args.num_steps)]
print(f"evidence lower bound: {-sum(losses[-100:]) / len(losses[-100:]):.3f} nats")
posterior = Predictive(model, guide=guide, num_samples=3000, parallel=True)()

# %%
# The pictures show the density of the S, the data beside samples, and the posterior. The line is the ridge of the
# likelihood.
fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
plots.plot_density(flow, x, max_points=0, ax=axes[0])
plots.plot_samples(flow, x, axes=axes[1:3])
axes[3].scatter(posterior["a"].flatten(), posterior["b"].flatten(), s=3, c="tab:orange", alpha=0.5, linewidths=0)
a = torch.linspace(-2.5, 2.5, 100)
axes[3].plot(a, 1 - a**2, c="gray", linewidth=1)
axes[3].set(title="posterior by the flow guide", xlabel="a", ylabel="b")
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "compose_with_pyro.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
