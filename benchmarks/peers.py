# SPDX-License-Identifier: Apache-2.0
"""The same RealNVP in each library: the same number of couplings, the same ReLU networks, alternating halves.

Each flow is built as the documentation of its library recommends; if it recommends several ways, in the fastest one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
import zuko
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_realnvp import Flow, masks, real_nvp


class Setting(NamedTuple):
    """The size of a comparison. The numbers of dimensions and of couplings must be even."""

    dim: int
    batch: int
    num_couplings: int
    hidden_dims: tuple[int, ...]

    def __str__(self) -> str:
        hidden = "-".join(map(str, self.hidden_dims))
        return f"D {self.dim}, batch {self.batch}, {self.num_couplings} layers, hidden {hidden}"


@dataclass
class Contender:
    """A flow, with the two calls that the benchmarks time."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]

    def parameters(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def network(setting: Setting, num_in: int, num_out: int) -> nn.Sequential:
    layers = []
    for width in setting.hidden_dims:
        layers += [nn.Linear(num_in, width), nn.ReLU()]
        num_in = width
    return nn.Sequential(*layers, nn.Linear(num_in, num_out))


def half_masks(setting: Setting) -> list[Tensor]:
    """The mask of each coupling, true where an entry is kept."""
    return [masks.half(setting.dim, k % 2).b for k in range(setting.num_couplings)]


def our_flow(setting: Setting) -> Flow:
    return Flow(
        real_nvp(
            setting.dim,
            num_couplings=setting.num_couplings,
            hidden_dims=setting.hidden_dims,
            activation=nn.ReLU,
            mask_cycle=[masks.half(setting.dim, 0), masks.half(setting.dim, 1)],
        )
    )


def ours(setting: Setting) -> Contender:
    flow = our_flow(setting)
    return Contender(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def ours_plain(setting: Setting) -> Contender:
    """Our bijection in Pyro's own TransformedDistribution."""
    bijection = our_flow(setting).bijection
    d = dist.TransformedDistribution(standard_normal(setting.dim), [bijection])
    return Contender(bijection, d.log_prob, lambda n: d.sample((n,)))


def ours_compiled(setting: Setting) -> Contender:
    flow = our_flow(setting)
    log_prob = torch.compile(lambda x: flow().log_prob(x), fullgraph=True)
    return Contender(flow, log_prob, lambda n: flow().sample((n,)))


def pyro_transforms(setting: Setting) -> list[Transform]:
    """Pyro's couplings. Each keeps the first half, so the entries are flipped between two couplings."""
    half, flip = setting.dim // 2, torch.arange(setting.dim).flip(0)
    transforms = []
    for k in range(setting.num_couplings):
        net = DenseNN(half, list(setting.hidden_dims), [setting.dim - half] * 2, nonlinearity=nn.ReLU())
        transforms += [T.AffineCoupling(half, net)] if k == 0 else [T.Permute(flip), T.AffineCoupling(half, net)]
    return transforms


def pyro_coupling(setting: Setting) -> Contender:
    transforms = pyro_transforms(setting)
    d = dist.TransformedDistribution(standard_normal(setting.dim), transforms)

    def log_prob(x: Tensor) -> Tensor:
        d.clear_cache()  # else a second call with the same x returns the value and the graph of the first
        return d.log_prob(x)

    modules = nn.ModuleList(t for t in transforms if isinstance(t, nn.Module))
    return Contender(modules, log_prob, lambda n: d.sample((n,)))


def zuko_nvp(setting: Setting) -> Contender:
    options = {"hidden_features": setting.hidden_dims, "activation": nn.ReLU}
    transforms = [
        zuko.flows.GeneralCouplingTransform(setting.dim, mask=mask, **options) for mask in half_masks(setting)
    ]
    zeros, ones = torch.zeros(setting.dim), torch.ones(setting.dim)
    base = zuko.flows.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, ones, buffer=True)
    flow = zuko.flows.Flow(transforms, base)
    return Contender(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


class _IgnoresContext(nn.Sequential):
    """A network without context for nflows, which passes a context to every network, even if it is None."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def nflows_nvp(setting: Setting) -> Contender:
    def net(num_in: int, num_out: int) -> nn.Module:
        return _IgnoresContext(*network(setting, num_in, num_out))

    couplings = [nflows.transforms.AffineCouplingTransform((~mask).int(), net) for mask in half_masks(setting)]
    base = nflows.distributions.StandardNormal([setting.dim])
    flow = nflows.flows.Flow(nflows.transforms.CompositeTransform(couplings), base)
    return Contender(flow, flow.log_prob, flow.sample)


def normflows_nvp(setting: Setting, *, init_zeros: bool = False) -> Contender:
    blocks = [
        normflows.flows.AffineCouplingBlock(
            normflows.nets.MLP([setting.dim // 2, *setting.hidden_dims, setting.dim], init_zeros=init_zeros),
            split_mode="channel" if k % 2 == 0 else "channel_inv",  # faster than a Permute("swap") between couplings
        )
        for k in range(setting.num_couplings)
    ]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(setting.dim, trainable=False), blocks)
    return Contender(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def freia_nvp(setting: Setting, *, all_in_one: bool = False) -> Contender:
    """FrEIA's Glow blocks. Each consists of two affine couplings with one network for scale and shift; FrEIA's RNVP
    block would have a network for each of both.

    With `all_in_one`, the block of FrEIA's quick start: one coupling with normalization and permutation.
    """
    inn = FrEIA.framework.SequenceINN(setting.dim)
    block = FrEIA.modules.AllInOneBlock if all_in_one else FrEIA.modules.GLOWCouplingBlock
    for _ in range(setting.num_couplings if all_in_one else setting.num_couplings // 2):
        inn.append(block, subnet_constructor=lambda num_in, num_out: network(setting, num_in, num_out))
    normalizer = 0.5 * setting.dim * math.log(2 * math.pi)

    def log_prob(x: Tensor) -> Tensor:
        z, ladj = inn(x)
        return ladj - 0.5 * z.square().sum(-1) - normalizer

    return Contender(inn, log_prob, lambda n: inn(torch.randn(n, setting.dim), rev=True)[0])


def standard_normal(dim: int) -> dist.Distribution:
    return dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)


PEERS = {
    "Pyro": pyro_coupling,
    "Zuko": zuko_nvp,
    "nflows": nflows_nvp,
    "normflows": normflows_nvp,
    "FrEIA": freia_nvp,
}
OURS = {"ours, Flow": ours, "ours, TransformedDistribution": ours_plain}


def build(setting: Setting, makers: dict[str, Callable[[Setting], Contender]]) -> dict[str, Contender]:
    """Makes all contenders and checks that they have the same size.

    The weights are small, so that no flow overflows: arithmetic with inf takes another time.
    """
    contenders = {name: make(setting) for name, make in makers.items()}
    for contender in contenders.values():
        for p in contender.parameters():
            nn.init.normal_(p, std=0.03)
    counts = {name: contender.count() for name, contender in contenders.items()}
    if max(counts.values()) > 1.01 * min(counts.values()):
        raise AssertionError(f"the networks differ in size: {counts}")
    return contenders
