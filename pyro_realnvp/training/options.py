# SPDX-License-Identifier: Apache-2.0
"""The options that :func:`fit` and :func:`fit_guide` share."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class LoopOptions:
    """How the loop of training goes. The docstring of :func:`fit` explains each option."""

    num_steps: int
    lr: float
    warmup: float
    max_grad_norm: float
    averaging: float
    validate_every: int
    patience: int | None
    weight_decay: float = 0.0
    tolerance: float = 0.0
    """Later weights are preferred to earlier ones whose loss is better by less than this."""

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("num_steps", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1; got {getattr(self, name)}")


def plain(value):
    """A scalar of numpy's as one of Python's, which a checkpoint can hold."""
    return value.item() if isinstance(value, np.generic) else value
