# SPDX-License-Identifier: Apache-2.0
"""The record of a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class History:
    """The record of a training by :func:`fit` or :func:`fit_guide`.

    Losses are in nats. They are mean negative log-likelihoods for a flow, and negative ELBOs for a guide.
    """

    loss: list[float] = field(default_factory=list)
    """The training loss of each step; nan where the step was skipped."""
    validation_steps: list[int] = field(default_factory=list)
    """The steps after which the averaged weights were validated."""
    validation_loss: list[float] = field(default_factory=list)
    """The loss of the averaged weights at each of these steps."""
    best_step: int = 0
    """The step of the best weights, which are those that the module has after training."""
    best_loss: float = math.inf
    """The lowest validation loss: that of the held-out rows or, for a guide, the negative ELBO of many particles.
    Without either, it is the mean training loss since the previous validation. Among weights whose losses differ by
    noise alone the latest are kept, so the loss of the best weights may be higher than this by as much as the noise."""
    skipped_steps: int = 0
    """The number of steps whose loss or gradient was not finite; they changed no weight."""
    restores: int = 0
    """How often the best weights were restored, after ten skipped steps in a row, and the learning rate was halved."""
    stopped: str = "finished"
    """Why the training ended: ``"finished"`` (all steps were taken), ``"early"`` (the validation loss stopped falling),
    ``"callback"`` (a callback returned True), ``"interrupted"`` (Ctrl-C), or ``"diverged"`` (steps were still skipped
    after three restores)."""
    seconds: float = 0.0
    """The wall-clock time; for a resumed training, that of all its runs together."""

    def __repr__(self) -> str:
        parts = [f"{len(self.loss)} steps in {self.seconds:.1f} s, {self.stopped}"]
        if self.validation_steps:
            parts.append(f"best loss {self.best_loss:.3f} at step {self.best_step}")
        if self.skipped_steps:
            parts.append(f"{self.skipped_steps} steps skipped, best weights restored {self.restores} times")
        return f"History({'; '.join(parts)})"


Callback = Callable[[History], object]
"""A function of the history so far, called after each step. If it returns True, the training stops."""
