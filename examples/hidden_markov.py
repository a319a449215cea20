# SPDX-License-Identifier: Apache-2.0
"""
A hidden Markov model
=====================

The states of a Markov chain are hidden behind noise. The example sums over the states, fits a flow guide to the
parameters, checks the sum against the forward algorithm, and finds the probabilities of the states.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from pyro.infer import config_enumerate

from pyro_realnvp import AutoRealNVP, diagnose, fit_guide

parser = argparse.ArgumentParser(description="Fit a RealNVP guide to the parameters of a hidden Markov model.")
parser.add_argument("--num-steps", type=int, default=600)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
args, _ = parser.parse_known_args()
pyro.set_rng_seed(0)

# %%
# The data
# --------
# A chain of three states is simulated: in each state the observations scatter around a level of its own. Levels are
# close to each other, so that a single observation does not tell its state.
num_observations = 80 if args.num_steps >= 100 else 10  # the short mode has few
true_transition = torch.tensor([[0.90, 0.08, 0.02], [0.08, 0.84, 0.08], [0.02, 0.10, 0.88]])
true_level, true_scale = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor(0.8)
states = [torch.tensor(0)]
while len(states) < num_observations:
    states.append(dist.Categorical(true_transition[states[-1]]).sample())
states = torch.stack(states)
y = dist.Normal(true_level[states], true_scale).sample()


# %%
# The model
# ---------
# Each row of the transition matrix has a Dirichlet prior that prefers to stay. The states could be renamed without any
# change to the likelihood, so the levels are ordered: the lowest has a normal prior, and the steps up from one level to
# the next have log-normal priors. ``config_enumerate`` tells Pyro to sum over the states, and ``pyro.markov`` that each
# depends on the one before it only, so that the time of the sum grows with the number of observations and not
# exponentially.
@config_enumerate
def model(y):
    transition, level, scale = parameters()
    state = None
    for t in pyro.markov(range(len(y))):
        probs = torch.ones(3) / 3 if state is None else transition[state]
        state = pyro.sample(f"state_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Normal(level[state], scale), obs=y[t])


def parameters():
    transition = pyro.sample("transition", dist.Dirichlet(2 * torch.ones(3) + 6 * torch.eye(3)).to_event(1))
    lowest_and_steps = dist.Normal(torch.tensor([-1.0, 0.5, 0.5]), torch.tensor([1.0, 0.5, 0.5])).to_event(1)
    level = pyro.sample("level", dist.TransformedDistribution(lowest_and_steps, OrderedTransform()))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    return transition, level, scale


# %%
# The guide
# ---------
# The guide draws the parameters alone.
guide = AutoRealNVP(model)
history = fit_guide(guide, y, num_steps=args.num_steps, seed=0)
pyro.set_rng_seed(1)  # for the draws of the guide, which are compared below
diagnosis = diagnose(guide, y, num_samples=4000)
print(f"AutoRealNVP, {guide.latent_dim} latents, trained in {history.seconds:.0f} s:")
print(diagnosis)


# %%
# The forward algorithm
# ---------------------
# The forward algorithm computes the same sum by hand. A second model has it as a factor, in place of the states. The
# same draws of the guide must have the same importance weights under both models, up to single precision.
def log_likelihood(transition, log_densities):
    """log p(y) of each draw from transitions ``(..., 3, 3)`` and log p(y_t | state) ``(..., time, 3)``."""
    forward = log_densities[..., 0, :] - torch.tensor(3.0).log()
    for t in range(1, log_densities.shape[-2]):
        forward = (forward[..., None] + transition.log()).logsumexp(-2) + log_densities[..., t, :]
    return forward.logsumexp(-1)


def model_without_states(y):
    transition, level, scale = parameters()
    pyro.factor("y", log_likelihood(transition, dist.Normal(level, scale).log_prob(y[:, None])))


pyro.set_rng_seed(1)
by_hand = diagnose(guide, y, model=model_without_states, num_samples=4000)
difference = (diagnosis.log_weights - by_hand.log_weights).abs().max()
print(f"largest difference of the log-density from the forward algorithm: {difference:.1e} nats")

# %%
# The parameters
# --------------
# Resampling by the importance weights corrects what error the guide has.
draws = diagnosis.resample(2000)
pairs = [(i, j) for i in range(3) for j in range(3)]
table = {f"{i + 1} to {j + 1}": (true_transition[i, j], draws["transition"][:, i, j]) for i, j in pairs}
table |= {f"level {k + 1}": (true_level[k], draws["level"][:, k]) for k in range(3)}
table["scale"] = true_scale, draws["scale"]
print(f"{'':<10}{'truth':>8}{'mean':>8}{'sd':>8}")
for name, (true_value, values) in table.items():
    print(f"{name:<10}{true_value:>8.2f}{values.mean():>8.2f}{values.std():>8.2f}")

# %%
# The states
# ----------
# The derivative of the log-likelihood by log p(y_t | state) is the probability of that state at time t, given all
# observations (the "smoothed" probability). So the gradient of the forward algorithm does the work of the backward
# algorithm. The average over the draws takes the uncertainty of the parameters into account.
log_densities = dist.Normal(draws["level"][:, None], draws["scale"][:, None, None]).log_prob(y[:, None])
log_densities.requires_grad_()
(smoothed,) = torch.autograd.grad(log_likelihood(draws["transition"], log_densities).sum(), log_densities)
probabilities = smoothed.mean(0)
right = probabilities.argmax(1) == states
print(f"the most probable state is the true one at {right.sum()} of {len(y)} times")
print(f"by the probabilities themselves, {probabilities.amax(1).sum():.0f} are expected")

# %%
# Above, the observations have the colors of their true states, over the levels that the draws give (mean and two
# standard deviations). Below are the probabilities of the states.
colors = ["tab:blue", "tab:orange", "tab:green"]
fig, (above, below) = plt.subplots(2, 1, figsize=(11, 6), layout="constrained", sharex=True)
times = torch.arange(len(y))
above.plot(times, y, color="gray", linewidth=0.7)
for k, color in enumerate(colors):
    mean, sd = draws["level"][:, k].mean(), draws["level"][:, k].std()
    above.axhspan(mean - 2 * sd, mean + 2 * sd, color=color, alpha=0.15, linewidth=0)
    above.axhline(mean, color=color, linewidth=1)
    above.scatter(times[states == k], y[states == k], s=22, color=color, label=f"state {k + 1}", zorder=3)
above.set(ylabel="observation", title="observations and their true states")
above.legend(frameon=False, ncols=3, loc="upper left")
below.stackplot(times, probabilities.T, colors=colors, alpha=0.7)
below.set(xlabel="time", ylabel="probability", xlim=(-1, len(y)), ylim=(0, 1), title="smoothed probabilities")
if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "hidden_markov.png", dpi=120)
    print(f"picture in {args.out.resolve()}")
else:
    plt.show()
