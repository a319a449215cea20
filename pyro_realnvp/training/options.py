# SPDX-License-Identifier: Apache-2.0
"""The options that :func:`fit` and :func:`fit_guide` share."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class LoopOptions:
    """The options of the training loop, checked. The docstring of :func:`fit` explains them."""

    num_steps: int
    lr: float
    warmup: float
    max_grad_norm: float
    averaging: float
    validate_every: int
    patience: int | None
    weight_decay: float = 0.0
    tolerance: float = 0.0
    """Later weights replace the best ones unless their validation loss is higher by this much (in nats) or more."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("num_steps", "validate_every", "patience"):
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} >= 1, a whole number; got {value!r}")
        for name in ("lr", "max_grad_norm"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0; got {getattr(self, name)!r}")
        for name in ("warmup", "averaging"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, a fraction of the steps; got {getattr(self, name)!r}")
        if not isinstance(self.weight_decay, (int, float)) or not self.weight_decay >= 0:
            raise ValueError(f"expected weight_decay >= 0; got {self.weight_decay!r}")


def plain(value: Any) -> Any:
    """Converts a scalar of numpy or torch to Python's, which a checkpoint can hold; returns other values unchanged."""
    is_number = isinstance(value, np.generic) or (isinstance(value, Tensor) and not value.dim())
    return value.item() if is_number else value
