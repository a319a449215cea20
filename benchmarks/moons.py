# SPDX-License-Identifier: Apache-2.0
"""KL(true || flow) on two moons, in nats. The true density is known, so the KL can be measured."""

import itertools
import math
from collections.abc import Iterator

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from pyro_realnvp import Flow, MixtureBase, fit, real_nvp

from .tables import print_table, verdict

NOISE, NUM_POINTS, NUM_SCORED, NUM_STEPS = 0.05, 3000, 20_000, 3000


def arcs(angle: Tensor) -> Tensor:
    """The points of both arcs at the given angles, ``(2, N, 2)``; make_moons adds its noise to such points."""
    return torch.stack(
        [torch.stack([angle.cos(), angle.sin()], -1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)]
    )


def true_sample(num: int) -> Tensor:
    both = arcs(torch.rand(num, dtype=torch.float64) * math.pi)
    which = torch.randint(2, (num,))
    return both[which, torch.arange(num)] + NOISE * torch.randn(num, 2, dtype=torch.float64)


def true_log_prob(x: Tensor, *, num_angles: int = 4000) -> Tensor:
    """The mean of N(x; point, NOISE^2) over the points of the arcs.

    There are about 60 points in a width of the noise, so the sum equals the integral up to rounding.
    """
    points = arcs((torch.arange(num_angles, dtype=torch.float64) + 0.5) / num_angles * math.pi).flatten(0, 1)
    normalizer = math.log(len(points)) + math.log(2 * math.pi * NOISE**2)
    exponents = (-torch.cdist(rows, points).square() / (2 * NOISE**2) for rows in x.split(1000))
    return torch.cat([torch.logsumexp(e, -1) for e in exponents]) - normalizer


class Truth:
    """Fresh samples with their true log-density, in the units of make_moons."""

    def __init__(self):
        torch.manual_seed(12345)
        self.x = true_sample(NUM_SCORED)
        self.log_prob = true_log_prob(self.x).mean()

    @torch.no_grad()
    def kl(self, flow: nn.Module, mean: Tensor, std: Tensor) -> float:
        """KL(true || flow) of a flow that models (x - mean) / std."""
        z = ((self.x - mean) / std).float()
        return float(self.log_prob - (flow().log_prob(z).double().mean() - std.log().sum()))


def with_fit(truth: Truth) -> None:
    """Trains on 3000 points for ten seeds, from two normals and with noise that fades away, and prints the table."""
    rows = []
    for seed in range(10):
        x = torch.as_tensor(make_moons(NUM_POINTS, noise=NOISE, random_state=seed)[0])
        mean, std = x.mean(0), x.std(0)
        z = ((x - mean) / std).float()
        torch.manual_seed(seed)
        flow = Flow(real_nvp(2), base=MixtureBase.for_rows(z))
        steps = itertools.count()

        def add_noise(z: Tensor, steps=steps) -> Tensor:
            return z + 0.1 * (1 - next(steps) / NUM_STEPS) ** 2 * torch.randn_like(z)

        history = fit(flow, z, num_steps=NUM_STEPS, augment=add_noise, seed=seed, progress=False)
        kl = truth.kl(flow, mean, std)
        seconds = f"{history.seconds:.1f}"
        rows.append([seed, f"{kl:.4f}", *verdict(kl, 0.035), seconds, *verdict(history.seconds, 40), history.best_step])
    mean = sum(float(row[1]) for row in rows) / len(rows)
    rows.append(["mean", f"{mean:.4f}", *verdict(mean, 0.025), "", "", "", ""])
    header = ["seed", "KL (nats)", "target", "", "seconds", "target", "", "best step"]
    title = f"two moons, {NUM_POINTS} points, noise {NOISE}: MixtureBase.for_rows, {NUM_STEPS} steps with fading noise"
    print_table(title, header, rows)


def with_fresh_data(truth: Truth, *, batch=512, seed=0) -> list[object]:
    """The row of a run that draws new points in every step. Such a run cannot overfit, so its KL shows what the flow is
    able to represent."""
    torch.manual_seed(seed)
    reference = true_sample(100_000)
    mean, std = reference.mean(0), reference.std(0)

    def points() -> Iterator[Tensor]:
        while True:
            yield ((true_sample(batch) - mean) / std).float()

    base = MixtureBase.for_rows(((reference[:NUM_POINTS] - mean) / std).float())
    flow = Flow(real_nvp(2, hidden_dims=(64, 64), activation=nn.SiLU), base=base)  # Tanh: 0.0087 nats
    history = fit(flow, points(), num_steps=NUM_STEPS, lr=1e-2, seed=seed, progress=False)
    kl = truth.kl(flow, mean, std)
    return [seed, f"{kl:.4f}", *verdict(kl, 0.008), f"{history.seconds:.1f}"]


def main() -> None:
    truth = Truth()
    with_fit(truth)
    header = ["seed", "KL (nats)", "target", "", "seconds"]
    title = f"two moons, {NUM_STEPS} steps of 512 fresh points: MixtureBase.for_rows, 16 couplings of 2x64, SiLU"
    print_table(title, header, [with_fresh_data(truth, seed=seed) for seed in range(3)])
