# SPDX-License-Identifier: Apache-2.0
"""Timing side by side, and tables."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence


def interleaved(calls: dict[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Milliseconds of a call of each, once per round.

    A machine slows down and speeds up while it measures. So every round times all of them, one after the other in a
    random order, and only times of the same round are compared.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # so that the collections below look only at what the calls have left
    for done in range(rounds + 5):  # the first five warm up
        gc.collect()  # else one pays for what another has left
        shuffle(order)
        for name in order:
            calls[name]()  # brings its own weights into the processor's cache
            started = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            if done >= 5:
                times[name].append((time.perf_counter() - started) / repeats * 1e3)
    gc.unfreeze()
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """The median over the rounds of time / reference time."""
    return statistics.median(t / r for t, r in zip(times, reference))


def verdict(value: float, target: float | None) -> tuple[str, str]:
    """The target's column and the verdict's."""
    return ("", "") if target is None else (f"<= {target:g}", "ok" if value <= target else "NOT MET")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints aligned columns, the first to the left and all others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    print("", title, "-" * len(lines[0]), lines[0], "-" * len(lines[0]), *lines[1:], sep="\n", flush=True)
