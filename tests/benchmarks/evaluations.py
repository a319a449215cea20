# SPDX-License-Identifier: Apache-2.0
"""How often a conditioner is evaluated, per layer."""

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
    """Counts the calls of all conditioners of a module, hooked as they are."""

    def __init__(self, *modules: nn.Module):
        self.count = 0
        for module in modules:
            for m in module.modules():
                if isinstance(m, (MLP, DenseNN)):
                    m.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def per_layer(self, call: Callable[[], object]) -> str:
        before = self.count
        call()
        return f"{(self.count - before) / NUM_LAYERS:g}"


def our_stack(dim: int = DIM) -> Transform:
    return real_nvp(dim, num_couplings=NUM_LAYERS)


def pyro_stack(dim: int = DIM) -> Transform:
    return T.ComposeTransformModule(pyro_transforms(Setting(dim, 0, NUM_LAYERS, 32)))


def of_a_distribution(transforms: list[Transform], modules: list[nn.Module]) -> tuple[str, str]:
    """Of log_prob(data), and of rsample followed by log_prob of that sample."""
    d = dist.TransformedDistribution(standard_normal(DIM), transforms)
    counter = Counter(*modules)
    return counter.per_layer(lambda: d.log_prob(torch.randn(5, DIM))), counter.per_layer(
        lambda: d.log_prob(d.rsample((5,)))
    )


def of_a_guide(init_transform: Callable[[int], Transform]) -> tuple[str, str]:
    """Of one SVI step of AutoNormalizingFlow, and of one potential energy with its gradient under NeuTra."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

    pyro.clear_param_store()
    guide = AutoNormalizingFlow(model, init_transform)
    guide()  # makes the transform
    counter = Counter(guide.transform)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    step = counter.per_layer(svi.step)
    parameters, potential, *_ = initialize_model(NeuTraReparam(guide).reparam(model))
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    return step, counter.per_layer(lambda: potential(parameters).backward())


def main() -> None:
    torch.manual_seed(0)
    rows = {}
    f, t = our_stack(), pyro_transforms(Setting(DIM, 0, NUM_LAYERS, 32))
    nets = [part for part in t if isinstance(part, nn.Module)]
    rows["log_prob"], rows["rsample, then log_prob"] = zip(of_a_distribution([f], [f]), of_a_distribution(t, nets))

    f, t = our_stack(), pyro_transforms(Setting(DIM, 0, NUM_LAYERS, 32))
    nets = [part for part in t if isinstance(part, nn.Module)]
    rows[".inv: log_prob"], rows[".inv: rsample, then log_prob"] = zip(
        of_a_distribution([f.inv], [f]), of_a_distribution([part.inv for part in reversed(t)], nets)
    )

    f, t = our_stack(), pyro_stack()
    composed, theirs = Compose([f, Permute(torch.randperm(DIM))]), T.ComposeTransformModule([t, T.permute(DIM)])
    rows["Compose: log_prob"], rows["Compose: rsample, then log_prob"] = zip(
        of_a_distribution([composed], [composed]), of_a_distribution([theirs], [t])
    )

    flow = Flow(our_stack())
    counter = Counter(flow)
    rows["Flow: log_prob"] = counter.per_layer(lambda: flow().log_prob(torch.randn(5, DIM))), ""
    rows["Flow: rsample_and_log_prob"] = counter.per_layer(lambda: flow().rsample_and_log_prob((5,))), ""

    rows["AutoNormalizingFlow: SVI step"], rows["NeuTra: potential energy and gradient"] = zip(
        of_a_guide(our_stack), of_a_guide(pyro_stack)
    )
    cells = [[name, own, "1", "ok" if own == "1" else "NOT MET", theirs] for name, (own, theirs) in rows.items()]
    print_table(
        f"conditioner evaluations per layer ({NUM_LAYERS} layers)",
        ["", "ours", "target", "", "Pyro's affine_coupling"],
        cells,
    )
