# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing, and the printing of tables."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence


def interleaved(calls: dict[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """The milliseconds of each call, one measurement per round.

    A machine slows down and speeds up during the measurements. So every round times all calls, one after the other in
    random order, and only times of the same round are compared.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # so that the collections below look only at objects that the calls have made
    for done in range(rounds + 5):  # the first five warm up
        gc.collect()  # so that no call pays for the garbage of another
        shuffle(order)
        for name in order:
            calls[name]()  # not timed; brings the weights into the processor's cache
            started = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            if done >= 5:
                times[name].append((time.perf_counter() - started) / repeats * 1e3)
    gc.unfreeze()
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """The median of time / reference time over the rounds."""
    return statistics.median(t / r for t, r in zip(times, reference))


def verdict(value: float, target: float | None) -> tuple[str, str]:
    """The cells of the target and of the verdict."""
    return ("", "") if target is None else (f"<= {target:g}", "ok" if value <= target else "NOT MET")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table whose first column is aligned to the left and whose other columns are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    print("", title, "-" * len(lines[0]), lines[0], "-" * len(lines[0]), *lines[1:], sep="\n", flush=True)
