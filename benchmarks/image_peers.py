# SPDX-License-Identifier: Apache-2.0
"""Multi-scale flows of images of other libraries, with as many couplings and, where possible, parameters as ours."""

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
    """The most resident memory that this process has had, in MiB; nan where the system does not say."""
    # Not from getrusage: its maximum begins with that of the process which started this one.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), math.nan)


def matched(make: Callable[[int], nn.Module], target: int) -> nn.Module:
    """What it makes of the width whose number of parameters is nearest to the target."""
    low, high = 1, 2
    while count(make(high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)) <= target else (low, middle)
    return make(min((low, high), key=lambda width: abs(count(make(width)) - target)))


def our_glow(shape: Sequence[int], num_scales: int, num_couplings: int, target: int) -> nn.Module:
    """Ours, with so many couplings at each scale and about so many parameters."""
    options = {"num_scales": num_scales, "num_couplings": num_couplings}
    return matched(lambda hidden: glow(shape, hidden_channels=hidden, **options), target)


class NormflowsGlow(normflows.MultiscaleFlow):
    """Glow as its documentation builds it, with a learned Gaussian at each scale."""

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
        return super().log_prob(x, None)  # which has no default for the classes


def normflows_glow(shape: Sequence[int], num_scales: int, num_couplings: int, target: int) -> nn.Module:
    """With so many couplings at each scale and about so many parameters."""
    return matched(partial(NormflowsGlow, shape, num_scales, num_couplings), target)


def torchflows_nvp(shape: Sequence[int], num_scales: int) -> nn.Module:
    """The paper's couplings, as many as `image_real_nvp` has by default.

    Its networks have one size. They shrink an image to 10 x 10 numbers and go to all outputs by a dense layer, which
    has most of the parameters; the convolutions have 4 to 8 channels, so that they are little work.
    """
    return torchflows.flows.Flow(MultiscaleRealNVP(shape, n_layers=num_scales))


class LevelsPeer(nn.Module):
    """A density of real images as a model of levels, dequantised and scaled as ours; called as ours, too."""

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
