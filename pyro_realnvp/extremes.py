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


def typical_weights(x: Tensor, weights: Tensor | None, name: str | None = None) -> Tensor | None:
    """The weights of rows, with 0 for those that have an extreme entry. None if all rows count alike.

    A warning says what such rows of a table with a name hold.
    """
    extreme = torch.from_numpy(_are_extreme(x.detach().cpu().numpy(), name)).to(x.device)
    if not extreme.any():
        return weights
    return torch.where(extreme, 0.0, torch.ones_like(x[:, 0]) if weights is None else weights)


def fit_scaler(table: ArrayLike, weights: np.ndarray, name: str) -> StandardScaler:
    """A scaler for the columns of a table, fitted to its typical rows; of the others a warning says what they hold."""
    values, counted = check_array(table), weights > 0
    weights = weights * 1.0
    weights[counted] *= ~_are_extreme(values[counted], name)
    scaler = StandardScaler().fit(table, sample_weight=weights)
    return scaler.set_output(transform="default")


def standardized(table: ArrayLike, scaler: StandardScaler, dtype: np.dtype) -> np.ndarray:
    """What a scaler makes of a table.

    Raises:
        ValueError: the result is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        values = scaler.transform(table).astype(dtype)
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise ValueError(
            f"expected contexts that {values.dtype} holds after they are standardized; got others in {bad.sum()} of "
            f"{len(bad)} rows, the first of which is {bad.argmax()}: correct them, or pass X in float64 to fit"
        )
    return values


def _are_extreme(x: np.ndarray, name: str | None) -> np.ndarray:
    """Which rows of a table have an extreme entry. For a table with a name, a warning says what they hold."""
    low, median, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
    far = (np.abs(x - median) > _FAR * (high - low)) & (high > low)
    far &= far.sum(0) <= max(1, _MOST_ROWS * len(x))
    rows = far.any(1)
    if name is not None and rows.any():
        row, column = np.argwhere(far)[0]
        warnings.warn(
            f"{rows.sum()} of {len(x)} rows of {name} hold values that are far from all others, such as "
            f"{x[row, column]:.6g} in column {column}: they do not count in the scales of the columns. If they are "
            "fill values, drop the rows",
            RuntimeWarning,
            stacklevel=4,
        )
    return rows
