# SPDX-License-Identifier: Apache-2.0
"""What happened in a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class History:
    """What happened in :func:`fit` and :func:`fit_guide`. Losses are in nats: mean negative log-likelihoods of a flow,
    negative ELBOs of a guide."""

    loss: list[float] = field(default_factory=list)
    """Of each step; nan where the step was skipped."""
    validation_steps: list[int] = field(default_factory=list)
    """The steps after which the averaged weights were validated."""
    validation_loss: list[float] = field(default_factory=list)
    """Their loss at each of these steps."""
    best_step: int = 0
    """The step whose weights are there now."""
    best_loss: float = math.inf
    """Their loss: on the held-out rows, of a guide over many particles, or the mean since the validation before."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed no weight."""
    restores: int = 0
    """How often the best weights were restored after repeated skips, with half the learning rate."""
    stopped: str = "finished"
    """``"finished"``, ``"early"`` (the validation loss stopped falling), ``"callback"`` (one of them said so),
    ``"interrupted"`` (Ctrl-C), ``"diverged"``."""
    seconds: float = 0.0
    """Wall-clock time; after a resumed run that of all its parts."""


Callback = Callable[[History], object]
