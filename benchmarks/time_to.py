# SPDX-License-Identifier: Apache-2.0
"""Seconds of training until KL(true || flow) reaches a target: `fit` beside the loops of the tutorials on the peers.

The true densities are known, so the KL can be measured (in nats). Each step draws new points, so no flow can overfit.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import nflows.transforms
import pyro.distributions as dist
import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

from pyro_realnvp import fit

from . import moons
from .peers import Contender, Setting, nflows_nvp, ours, pyro_coupling, zuko_nvp
from .tables import print_table, verdict

NUM_SCORED, EVALUATE_EVERY, SEEDS, CAP = 20_000, 50, (0, 1, 2), 5  # the cap is a multiple of `fit`'s seconds


class Density(NamedTuple):
    sample: Callable[[int], Tensor]
    log_prob: Callable[[Tensor], Tensor]


def mixture(dim: int, *, num_components: int = 8) -> Density:
    """Gaussians with random means and full covariances, whose condition numbers are below 6."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    means = torch.randn(num_components, dim, **options)
    factors = torch.randn(num_components, dim, 2 * dim, **options) / math.sqrt(2 * dim)
    covariances = 0.7 * factors @ factors.mT + 0.3 * torch.eye(dim)
    components = dist.MultivariateNormal(means, covariances)
    d = dist.MixtureSameFamily(dist.Categorical(torch.ones(num_components)), components)
    return Density(lambda num: d.sample((num,)), d.log_prob)


class Problem:
    """Standardized points of a density, and the KL to this density, estimated on a fixed set of points."""

    def __init__(self, density: Density, target: float):
        self.density, self.target = density, target
        torch.manual_seed(12345)
        reference = density.sample(100_000)
        self.mean, self.std = reference.mean(0), reference.std(0)
        x = density.sample(NUM_SCORED)
        self.scored, self.true = self._standardized(x), density.log_prob(x).mean() + self.std.log().sum()

    def _standardized(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).float()

    def sample(self, num: int) -> Tensor:
        return self._standardized(self.density.sample(num))

    @torch.no_grad()
    def kl(self, contender: Contender) -> float:
        return float(self.true - torch.cat([contender.log_prob(x).double() for x in self.scored.split(1000)]).mean())


class Batches:
    """Endless new batches. `seconds` is the time it took to draw them, which does not count as training."""

    def __init__(self, problem: Problem, batch: int):
        self.problem, self.batch, self.seconds = problem, batch, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            started = time.perf_counter()
            points = self.problem.sample(100 * self.batch)
            self.seconds += time.perf_counter() - started
            yield from points.split(self.batch)


class Outcome(NamedTuple):
    kl: float
    num_steps: int
    seconds: float
    compiling: float = 0.0
    """The seconds of the first step, if it compiles."""

    @property
    def step(self) -> float:
        """Milliseconds per step, without compiling."""
        return (self.seconds - self.compiling) / self.num_steps * 1e3


def through_fit(problem: Problem, setting: Setting, lr: float, num_steps: int, seed: int, *, compile=False) -> Outcome:
    torch.manual_seed(seed)
    contender, batches, ends = ours(setting), Batches(problem, setting.batch), []
    options = {"lr": lr, "num_steps": num_steps, "validation": 0, "compile": compile, "progress": False}
    torch.compiler.reset()
    with fresh_inductor_cache():  # else only the first run on a machine would compile
        started = time.perf_counter()  # the clock of `fit` starts only after the import of torch.compile
        options["callbacks"] = [lambda _: ends.append(time.perf_counter() - started - batches.seconds)]
        fit(contender.module, batches, **options)
    return Outcome(problem.kl(contender), num_steps, ends[-1], ends[0] if compile else 0.0)


def by_hand(problem: Problem, setting: Setting, make, lr: float, seed: int, *, cap: float) -> Outcome:
    """The training loop of the tutorials, until it reaches the target or the cap."""
    torch.manual_seed(seed)
    contender, batches = make(setting), Batches(problem, setting.batch)
    optimizer = torch.optim.Adam(contender.parameters(), lr)
    points, kl, num_steps, seconds = iter(batches), math.inf, 0, 0.0
    while not kl <= problem.target and seconds < cap:
        started = time.perf_counter() - batches.seconds
        for _ in range(EVALUATE_EVERY):
            x = next(points)
            optimizer.zero_grad()
            loss = -contender.log_prob(x).mean()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - batches.seconds - started
        num_steps += EVALUATE_EVERY
        kl = problem.kl(contender)
    return Outcome(kl, num_steps, seconds)


def nflows_inverse(setting: Setting) -> Contender:
    """nflows' couplings, inverted. They scale by at most 1.001, so towards the base they could not spread points out;
    their inverses can."""
    contender = nflows_nvp(setting)
    contender.module._transform = nflows.transforms.InverseTransform(contender.module._transform)
    return contender


PEERS = {"Pyro": pyro_coupling, "Zuko": zuko_nvp, "nflows": nflows_inverse}


def compare(title: str, problem: Problem, setting: Setting, lr: float, num_steps: int, lrs: dict[str, float]) -> None:
    """Trains all contenders and prints the table.

    `lr` and `num_steps` are options of `fit`; `lrs` are the learning rates of the peers.
    """
    fits = [through_fit(problem, setting, lr, num_steps, seed) for seed in SEEDS]
    outcomes = {"fit": fits, "fit, compiled": [through_fit(problem, setting, lr, num_steps, SEEDS[0], compile=True)]}
    cap = CAP * statistics.median(o.seconds for o in fits)
    outcomes |= {name: [by_hand(problem, setting, make, lrs[name], SEEDS[0], cap=cap)] for name, make in PEERS.items()}
    best = min(PEERS, key=lambda name: outcomes[name][0].seconds)
    outcomes[best] += [by_hand(problem, setting, PEERS[best], lrs[best], seed, cap=cap) for seed in SEEDS[1:]]
    median = {name: Outcome(*map(statistics.median, zip(*runs))) for name, runs in outcomes.items()}
    rows = []
    for name, outcome in median.items():
        # The number of steps of `fit` is fixed in advance, so all of its runs must reach the target, and the worst KL
        # counts. The loops of the peers run until they reach the target.
        kl = outcome.kl if name in PEERS else max(o.kl for o in outcomes[name])
        beyond = not kl <= problem.target
        value = outcome.seconds / median[best].seconds
        bound = "> " if beyond else "< " if not median[best].kl <= problem.target else ""
        rows.append(
            [f"bare loop, {name}" if name in PEERS else name, lrs.get(name, lr), len(outcomes[name])]
            + ["> " * beyond + f"{outcome.num_steps}", f"{outcome.step:.2f}", f"{kl:.4f}"]
            + [f"{outcome.compiling:.1f}" if outcome.compiling else "", "> " * beyond + f"{outcome.seconds:.1f}"]
            + [f"{bound}{value:.3f}", *verdict(math.inf if beyond else value, 0.5 if name == "fit" else None)]
        )
    header = ["", "lr", "runs", "steps", "ms per step", "KL (nats)", "seconds compiling", "in all", f"/ {best}"]
    print_table(f"{title}: seconds to a KL of {problem.target}: {setting}", [*header, "target", ""], rows)


def main() -> None:
    # How the learning rates were chosen: by runs with one seed, for some but not all combinations.
    # `fit` was run on the moons with 5e-3 and 1e-2 and 500 to 2000 steps, and on the mixture with 3e-3, 5e-3 and 1e-2
    # and 2000 to 3000 steps; on the mixture 2000 steps do not reach the target of 0.4.
    # The peers were run with 1e-3, 3e-3 and 1e-2 and cut off after 1500 to 5000 steps. With 1e-2 Pyro diverged on the
    # moons and Zuko stayed far above the target; 1e-2 was not run for nflows, nor for Pyro on the mixture. Among the
    # other runs only Zuko's with 1e-3 on the moons reached the target; otherwise the run with the lower KL decided.
    # Pyro's 1e-3 on the moons was chosen without a run, because 3e-3 had missed the target.
    # The mixture's target of 0.4 was chosen after the first of these runs, none of which had come below 0.36.
    problem = Problem(Density(moons.true_sample, moons.true_log_prob), 0.02)
    lrs = {"Pyro": 1e-3, "Zuko": 1e-3, "nflows": 3e-3}
    compare("two moons", problem, Setting(2, 512, 16, (64, 64)), 1e-2, 1000, lrs)
    problem = Problem(mixture(16), 0.4)
    lrs = {"Pyro": 1e-3, "Zuko": 1e-3, "nflows": 1e-3}
    compare("a mixture of 8 Gaussians", problem, Setting(16, 256, 8, (64, 64)), 3e-3, 2500, lrs)
