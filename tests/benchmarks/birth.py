# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of N(0, I) data under untrained stacks, each with its library's own initialisation."""

import statistics
from functools import partial

import torch

from .peers import PEERS, Setting, freia_nvp, normflows_nvp, ours
from .tables import print_table

SETTING = Setting(20, 10_000, 16, 64)
SEEDS = range(5)


def main() -> None:
    makers = PEERS | {
        "normflows, init_zeros=True": partial(normflows_nvp, init_zeros=True),
        "FrEIA, AllInOneBlock": partial(freia_nvp, all_in_one=True),
        "ours": ours,
    }
    rows = []
    for name, make in makers.items():
        nats = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            x = torch.randn(SETTING.batch, SETTING.dim)
            with torch.no_grad():
                nats.append(-make(SETTING).log_prob(x).double().mean().item() / SETTING.dim)
        # nan orders with nothing: a library that gives one is shown as giving it
        worst = max(nats, key=lambda value: (value != value, value))
        rows.append([name, f"{statistics.median(nats) if worst == worst else worst:.3g}", f"{worst:.3g}"])
    header = ["nats per dimension; 1.42 is the entropy of N(0, 1)", "median of 5 seeds", "worst"]
    print_table(f"at birth, N(0, I) data: {SETTING}", header, rows)
