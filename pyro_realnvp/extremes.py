# SPDX-License-Identifier: Apache-2.0
"""Rows that are so far from all others that they alone would set the scale of a column."""

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array
from torch import Tensor

_FAR = 50  # interquartile ranges from the median
_MOST_ROWS = 0.01  # more are a heavy tail, and belong to the column


def is_extreme(x: np.ndarray) -> np.ndarray:
    """Which entries of a table are extreme."""
    low, median, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
    far = (np.abs(x - median) > _FAR * (high - low)) & (high > low)
    return far & (far.sum(0) <= max(1, _MOST_ROWS * len(x)))


def typical_weights(x: Tensor, weights: Tensor | None) -> Tensor | None:
    """The weights of rows, with 0 for those that have an extreme entry. None if all rows count alike."""
    extreme = torch.from_numpy(is_extreme(x.detach().cpu().numpy()).any(1)).to(x.device)
    if not extreme.any():
        return weights
    return torch.where(extreme, 0.0, torch.ones_like(x[:, 0]) if weights is None else weights)


def fit_scaler(table: ArrayLike, weights: np.ndarray, name: str) -> StandardScaler:
    """A scaler for the columns of a table, fitted to its typical rows; of the others a warning says what they hold."""
    values, counted = check_array(table), weights > 0
    warn_of_extremes(values[counted], name)
    weights = weights * 1.0
    weights[counted] *= ~is_extreme(values[counted]).any(1)
    scaler = StandardScaler().fit(table, sample_weight=weights)
    return scaler.set_output(transform="default")


def warn_of_extremes(x: np.ndarray, name: str) -> None:
    extreme = is_extreme(x)
    if extreme.any():
        row, column = np.argwhere(extreme)[0]
        warnings.warn(
            f"{extreme.any(1).sum()} of {len(x)} rows of {name} hold values that are far from all others, such as "
            f"{x[row, column]:.6g} in column {column}: they do not count in the scales of the columns. If they are "
            "fill values, drop the rows",
            RuntimeWarning,
            stacklevel=3,
        )
