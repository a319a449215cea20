# SPDX-License-Identifier: Apache-2.0
"""How far a training or a sampler has come: the one progress bar of the package."""

import sys
import time
from collections.abc import Mapping

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


class Progress:
    """The bar of tqdm in a terminal or a notebook; elsewhere, as in a log file, one line for each tenth of the steps.

    Args:
        total: the number of steps.
        initial: the number of steps that were taken before.
        show: whether to show anything.
    """

    def __init__(self, total: int, *, initial: int = 0, show: bool):
        # A bar is redrawn many times, each of which would be text in a file.
        is_redrawn = issubclass(tqdm, tqdm_notebook) or (hasattr(sys.stderr, "isatty") and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=initial, unit="step", disable=not (show and is_redrawn))
        self.prints_lines: bool = show and not is_redrawn
        self.total = total
        self.initial = initial
        self.done: int = initial
        self.started: float = time.perf_counter()

    def update(self, done: int, values: Mapping[str, str]) -> None:
        """Shows that `done` steps have been taken, with these values."""
        self.bar.set_postfix(values, refresh=False)
        self.bar.update(done - self.done)
        if self.prints_lines and 10 * done // self.total > 10 * self.done // self.total:
            line = tqdm.format_meter(
                done,
                self.total,
                time.perf_counter() - self.started,
                initial=self.initial,
                unit="step",
                postfix=", ".join(f"{name}={value}" for name, value in values.items()),
                bar_format="{percentage:3.0f}% {r_bar}",
            )
            print(line, file=sys.stderr, flush=True)
        self.done = done

    def close(self) -> None:
        self.bar.close()
