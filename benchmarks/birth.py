# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of N(0, I) data under untrained flows, with the initialization of each library."""

import math
from collections.abc import Callable
from functools import partial

import torch

from .peers import PEERS, Contender, Setting, freia_nvp, normflows_nvp, ours
from .tables import print_table

# The first has widths that most people use, the second the default widths of Pyro's affine_coupling(20).
SETTINGS = Setting(20, 10_000, 16, (64, 64)), Setting(20, 10_000, 16, (200,))
SEEDS = range(5)


@torch.no_grad()
def nats_per_dimension(make: Callable[[Setting], Contender], setting: Setting, seed: int) -> float:
    torch.manual_seed(seed)
    x = torch.randn(setting.batch, setting.dim)
    nats = -make(setting).log_prob(x).double().mean().item() / setting.dim
    return nats if math.isfinite(nats) else math.inf  # nan would break the sorting


def main() -> None:
    makers = PEERS | {
        "normflows, init_zeros=True": partial(normflows_nvp, init_zeros=True),
        "FrEIA, AllInOneBlock": partial(freia_nvp, all_in_one=True),
        "ours": ours,
    }
    rows = []
    for name, make in makers.items():
        row = [name]
        for setting in SETTINGS:
            nats = sorted(nats_per_dimension(make, setting, seed) for seed in SEEDS)
            row += [f"{nats[len(nats) // 2]:.3g}", f"{nats[-1]:.3g}"]
        rows.append(row)
    widths = ["2 hidden of 64", "1 hidden of 200"]
    header = ["nats per dimension (best: 1.42)", *(f"{w}, {what}" for w in widths for what in ("median", "worst"))]
    print_table("at birth, N(0, I) data in 20 dimensions, 16 layers, five seeds", header, rows)
