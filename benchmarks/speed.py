# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of log_prob with its backward pass, of log_prob alone, and of sampling, beside the fastest peer."""

import statistics

import torch
from torch import Tensor

from .peers import OURS, PEERS, Contender, Setting, build, ours_compiled
from .tables import interleaved, print_table, ratio, verdict

FIRST = Setting(16, 256, 8, (64, 64))
SMALL = Setting(2, 512, 6, (128, 128))
LARGE = Setting(64, 1024, 8, (512, 512))
COMPILED = {"ours, Flow, compiled": ours_compiled}


def forward_backward(contender: Contender, x: Tensor) -> None:
    contender.module.zero_grad()
    contender.log_prob(x).mean().neg().backward()


@torch.no_grad()
def score(contender: Contender, x: Tensor) -> None:
    contender.log_prob(x)


@torch.no_grad()
def sample(contender: Contender, x: Tensor) -> None:
    contender.sample(len(x))


def compare(title, setting, makers, call, targets, *, rounds, repeats=3) -> None:
    """Times all contenders and prints the table.

    `targets` are ratios to the time of the fastest peer, except that our bijection in a plain TransformedDistribution
    is compared with Pyro's coupling.
    """
    torch.manual_seed(0)
    contenders = build(setting, makers)
    x = torch.randn(setting.batch, setting.dim)
    calls = {name: (lambda c=contender: call(c, x)) for name, contender in contenders.items()}
    times = interleaved(calls, rounds=rounds, repeats=repeats)
    fastest = min(PEERS, key=lambda name: statistics.median(times[name]))
    rows = []
    for name, contender in contenders.items():
        to_fastest, to_pyro = ratio(times[name], times[fastest]), ratio(times[name], times["Pyro"])
        target = targets.get(name)
        value, of = (to_pyro, "Pyro") if name == "ours, TransformedDistribution" else (to_fastest, fastest)
        wanted, met = verdict(value, target)
        if target is not None:
            wanted = f"{wanted} x {of}"
        median = f"{statistics.median(times[name]):.2f}"
        rows.append([name, contender.count(), median, f"{to_fastest:.3f}", f"{to_pyro:.3f}", wanted, met])
    header = ["", "parameters", "ms", f"/ fastest ({fastest})", "/ Pyro", "target", ""]
    print_table(f"{title}: {setting}", header, rows)


def main() -> None:
    makers, title = PEERS | OURS, "log_prob, forward + backward"
    plain = {"ours, TransformedDistribution": 1.0}
    targets = {"ours, Flow": 0.80, "ours, Flow, compiled": 0.52} | plain
    compare(title, FIRST, makers | COMPILED, forward_backward, targets, rounds=60)
    compare(title, SMALL, makers, forward_backward, {"ours, Flow": 0.85} | plain, rounds=60)
    compare(title, LARGE, makers, forward_backward, {"ours, Flow": 1.0} | plain, rounds=20, repeats=1)
    compare("log_prob, no grad", FIRST, makers, score, {"ours, Flow": 0.65} | plain, rounds=80)
    compare("sample, no grad", FIRST, makers, sample, {"ours, Flow": 0.65} | plain, rounds=80)
