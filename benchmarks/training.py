# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a whole training step: by `fit`, and by bare loops on our flow and on Pyro's coupling."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_realnvp import fit

from .peers import Contender, Setting, build, ours, pyro_coupling
from .tables import print_table, ratio, verdict

SETTING = Setting(16, 256, 8, (64, 64))
NUM_STEPS, ROUNDS, NUM_ROWS = 500, 7, 8192


def by_hand(contender: Contender, x: Tensor, *, fused: bool) -> float:
    """The seconds that the training loop of the tutorials takes."""
    optimizer = torch.optim.Adam(contender.parameters(), lr=1e-3, fused=fused or None)
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        batch = x[torch.randint(len(x), (SETTING.batch,))]
        optimizer.zero_grad()
        loss = -contender.log_prob(batch).mean()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


def through_fit(contender: Contender, x: Tensor) -> float:
    options = {"num_steps": NUM_STEPS, "batch_size": SETTING.batch, "lr": 1e-3, "validation": 0, "progress": False}
    return fit(contender.module, x, **options).seconds


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(NUM_ROWS, SETTING.dim)
    makers = {"fit": ours, "bare loop, ours, Adam(fused=True)": ours, "bare loop, Pyro's coupling, Adam": pyro_coupling}
    fitted, ours_bare, pyros = build(SETTING, makers).values()
    loops: dict[str, Callable[[], float]] = {
        "fit": lambda: through_fit(fitted, x),
        "bare loop, ours, Adam(fused=True)": lambda: by_hand(ours_bare, x, fused=True),
        "bare loop, Pyro's coupling, Adam": lambda: by_hand(pyros, x, fused=False),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for done in range(ROUNDS + 1):  # the first round is a warm-up
        for name, loop in loops.items():
            seconds = loop()
            if done:
                times[name].append(seconds / NUM_STEPS * 1e3)
    _, bare, reference = loops
    rows = []
    for name in loops:
        to_pyro, to_bare = ratio(times[name], times[reference]), ratio(times[name], times[bare])
        row = [name, f"{statistics.median(times[name]):.2f}", f"{to_pyro:.3f}", f"{to_bare:.3f}"]
        rows.append([*row, *verdict(to_pyro, 0.55 if name == "fit" else None)])
    header = ["", "ms per step", "/ Pyro's", "/ bare, ours", "target / Pyro's", ""]
    print_table(f"a training step: {SETTING}", header, rows)
