# SPDX-License-Identifier: Apache-2.0
"""How many times a call evaluates the conditioner of each layer."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import DenseNN
from torch import nn
from torch.distributions import Transform

from pyro_realnvp import MLP, Compose, Flow, Permute, real_nvp

from .peers import Setting, pyro_transforms, standard_normal
from .tables import print_table

DIM, NUM_LAYERS = 4, 4


class Counter:
    """Counts the calls of all conditioners of a module."""

    def __init__(self, module: nn.Module):
        self.count = 0
        for m in module.modules():
            if isinstance(m, (MLP, DenseNN)):
                m.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def per_layer(self, call: Callable[[], object]) -> float:
        before = self.count
        call()
        return (self.count - before) / NUM_LAYERS


def ours(dim: int = DIM) -> Transform:
    return real_nvp(dim, num_couplings=NUM_LAYERS)


def theirs(dim: int = DIM) -> Transform:
    return T.ComposeTransformModule(pyro_transforms(Setting(dim, 0, NUM_LAYERS, (32, 32))))


def of_a_distribution(transforms: list[Transform], module: nn.Module) -> list[float]:
    """The evaluations of log_prob of data, of rsample and log_prob of that sample, and of log_prob of the same data
    before and after an optimizer step."""
    d = dist.TransformedDistribution(standard_normal(DIM), transforms)
    counter = Counter(module)
    x = torch.randn(5, DIM)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def score_train_score() -> None:
        d.log_prob(x).sum().backward()
        optimizer.step()
        d.log_prob(x)

    calls = [lambda: d.log_prob(torch.randn(5, DIM)), lambda: d.log_prob(d.rsample((5,))), score_train_score]
    return [counter.per_layer(call) for call in calls]


def of_a_guide(make_transform: Callable[[int], Transform]) -> list[float]:
    """The evaluations of one SVI step of AutoNormalizingFlow, and of one potential energy and its gradient under
    NeuTra."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

    pyro.clear_param_store()
    guide = AutoNormalizingFlow(model, make_transform)
    guide()  # makes the transform
    counter = Counter(guide.transform)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    step = counter.per_layer(svi.step)
    parameters, potential, *_ = initialize_model(NeuTraReparam(guide).reparam(model))
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    return [step, counter.per_layer(lambda: potential(parameters).backward())]


def main() -> None:
    torch.manual_seed(0)
    rows: list[list[object]] = []

    def add(names: list[str], targets: list[int], own: list[float], other: list[float] | None = None) -> None:
        for k, (name, target, count) in enumerate(zip(names, targets, own)):
            met = "ok" if count == target else "NOT MET"
            rows.append([name, f"{count:g}", target, met, f"{other[k]:g}" if other else ""])

    names, targets = ["log_prob", "rsample, log_prob", "log_prob, optimizer step, same log_prob"], [1, 1, 2]
    f, t = ours(), theirs()
    add(names, targets, of_a_distribution([f], f), of_a_distribution(t.parts, t))

    f, t = ours(), theirs()
    inverse = [part.inv for part in reversed(t.parts)]
    add([f".inv: {name}" for name in names], targets, of_a_distribution([f.inv], f), of_a_distribution(inverse, t))

    f, t = Compose([ours(), Permute(torch.randperm(DIM))]), T.ComposeTransformModule([theirs(), T.permute(DIM)])
    add([f"Compose: {name}" for name in names], targets, of_a_distribution([f], f), of_a_distribution([t], t))

    flow = Flow(ours())
    calls = [lambda: flow().log_prob(torch.randn(5, DIM)), lambda: flow().rsample_and_log_prob((5,))]
    add(["Flow: log_prob", "Flow: rsample_and_log_prob"], [1, 1], list(map(Counter(flow).per_layer, calls)))

    names = ["AutoNormalizingFlow: SVI step", "NeuTra: potential energy, gradient"]
    add(names, [1, 1], of_a_guide(ours), of_a_guide(theirs))

    header = ["", "ours", "right (fewer: stale)", "", "Pyro's affine_coupling"]
    print_table(f"conditioner evaluations per layer, {NUM_LAYERS} layers", header, rows)
