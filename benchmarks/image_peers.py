# SPDX-License-Identifier: Apache-2.0
"""Multi-scale flows of images in other libraries, with the number of couplings and, where possible, of parameters of
ours."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import normflows
import torch
import torchflows.flows
from torch import Tensor, nn
from torchflows.bijections.finite.multiscale import MultiscaleRealNVP

from pyro_realnvp import Logit, glow

warnings.filterwarnings("ignore", "torch.lu is deprecated")  # in normflows
warnings.filterwarnings("ignore", "Using a non-tuple sequence")  # in torchflows


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def resident_peak() -> float:
    """The peak of this process's resident memory in MiB, or nan on systems that do not report it."""
    # getrusage is no help here: its maximum starts at that of the parent process.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), math.nan)


def matched(make: Callable[[int], nn.Module], target: int) -> nn.Module:
    """The module that ``make`` returns for the width at which the number of parameters is closest to the target."""
    low, high = 1, 2
    while count(make(high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)) <= target else (low, middle)
    return make(min((low, high), key=lambda width: abs(count(make(width)) - target)))


def our_glow(shape: Sequence[int], num_scales: int, num_couplings: int, target: int) -> nn.Module:
    """Our Glow with ``num_couplings`` couplings at each scale and about ``target`` parameters."""
    options = {"num_scales": num_scales, "num_couplings": num_couplings}
    return matched(lambda hidden: glow(shape, hidden_channels=hidden, **options), target)


class NormflowsGlow(normflows.MultiscaleFlow):
    """Glow as the documentation of normflows builds it, with a learned Gaussian at each scale."""

    def __init__(self, shape: Sequence[int], num_scales: int, num_couplings: int, hidden: int):
        channels, height, width = shape
        bases, flows = [], []
        for k in range(num_scales):  # from the coarsest to the finest
            size = 2 ** (num_scales - k)
            blocks = [normflows.flows.GlowBlock(2 * channels * size, hidden) for _ in range(num_couplings)]
            flows.append([*blocks, normflows.flows.Squeeze()])
            leaving = channels * size * (2 if k == 0 else 1)
            bases.append(normflows.distributions.DiagGaussian((leaving, height // size, width // size)))
        merges = [normflows.flows.Merge() for _ in range(num_scales - 1)]
        super().__init__(bases, flows, merges, class_cond=False)

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x, None)  # the argument for the classes has no default


def normflows_glow(shape: Sequence[int], num_scales: int, num_couplings: int, target: int) -> nn.Module:
    """normflows' Glow with ``num_couplings`` couplings at each scale and about ``target`` parameters."""
    return matched(partial(NormflowsGlow, shape, num_scales, num_couplings), target)


def torchflows_nvp(shape: Sequence[int], num_scales: int) -> nn.Module:
    """torchflows' RealNVP with the couplings of the paper, as many as `image_real_nvp` has by default.

    The size of its networks is fixed, so their parameters cannot be matched to ours. They shrink an image to 10 x 10
    numbers, and a dense layer maps these to all outputs. That layer has most of the parameters; the convolutions have
    only 4 to 8 channels, so they cost little time.
    """
    return torchflows.flows.Flow(MultiscaleRealNVP(shape, n_layers=num_scales))


class LevelsPeer(nn.Module):
    """A model of integer levels from a peer's density of real images, dequantized, scaled and called like ours."""

    def __init__(self, flow: nn.Module, levels: int, alpha: float):
        super().__init__()
        self.flow, self.levels, self.logit = flow, levels, Logit(alpha)

    def forward(self, *, num_samples: int = 1) -> SimpleNamespace:
        return SimpleNamespace(log_prob=partial(self._bound, num_samples))

    def _bound(self, num_samples: int, x: Tensor) -> Tensor:
        scaled = (x + torch.rand((num_samples, *x.shape), device=x.device)) / self.levels
        y, ladj = self.logit.forward_and_ladj(scaled)
        bound = self.flow.log_prob(y.flatten(0, 1)).reshape(num_samples, -1) + ladj.sum((-3, -2, -1))
        return bound.logsumexp(0) - math.log(num_samples) - x[0].numel() * math.log(self.levels)
