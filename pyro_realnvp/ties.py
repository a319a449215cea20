# SPDX-License-Identifier: Apache-2.0
"""Warnings of tables whose density has no bound."""

import warnings

import numpy as np

from .columns import ROUNDINGS, Columns, along

_FEW_ROWS = 50  # fewer say nothing about ties
_MOST_TIES = 0.1  # of the rows, above which a warning says that a value is repeated,
_TIMES_AS_OFTEN = 10  # if it is so much more frequent than others
_MOST_COPIES = 0.05  # of the rows, above which a warning says that rows are repeated
_LEAST_DEVIATION = 1e-6  # of standardized rows, below which they lie in a plane
_ROUNDING = 1e-12


def warn_of_ties(X: np.ndarray, columns: Columns) -> None:
    """Warns of what lets a density rise without bound: whole numbers, repeated values, copies of columns and of rows,
    and rows that lie in a plane."""
    is_real = ~columns.is_integer & ~np.isfinite(columns.period)
    if len(X) <= is_real.sum():
        _warn(
            f"{len(X)} rows of {is_real.sum()} columns lie in a plane, beside which a density has no bound: reduce the "
            "columns first, for example by sklearn.decomposition.PCA, or pass more rows"
        )
    if len(X) < _FEW_ROWS:
        return
    whole = np.flatnonzero(is_real & (X == np.floor(X)).all(0))
    whole = [int(k) for k in whole if 1 < len(np.unique(X[:, k])) < len(X) / 2]
    if whole:
        _warn(
            f"columns {whole[:10]} hold whole numbers, where a density has no bound, so that its scores mean little: "
            f'pass support={{{whole[0]}: "integer"}} (or "count") for probabilities of the numbers'
        )
    for k in np.setdiff1d(np.flatnonzero(is_real), whole):
        values, counts = np.unique(X[:, k], return_counts=True)
        # Values that were rounded are all repeated, as in iris.
        stands_out = counts.max() > max(_MOST_TIES * len(X), _TIMES_AS_OFTEN * np.median(counts))
        if len(values) > 1 and stands_out:
            _warn(
                f"column {k} is {values[counts.argmax()]:.6g} in {counts.max()} of {len(X)} rows, where a density has "
                "no bound: model these rows apart, or add noise to the column"
            )
    copies = len(X) - len(np.unique(X, axis=0))
    if is_real.any() and not whole and copies > max(1, _MOST_COPIES * len(X)):
        _warn(
            f"{copies} of {len(X)} rows are copies of others, so that held-out rows are no test: drop them, and pass "
            "sample_weight= if they count more"
        )
    standard = X / np.abs(X).max(0, initial=np.finfo(X.dtype).tiny)  # squares of the values themselves may be infinite
    standard = standard.astype(np.float64)
    std = np.where(standard.std(0) > 0, standard.std(0), 1)
    rounding = np.finfo(X.dtype).eps * (1 + np.abs(standard.mean(0)) / std)
    least = np.maximum(_LEAST_DEVIATION, ROUNDINGS * rounding)
    standard = (standard - standard.mean(0)) / std
    # Copies have the same mean with any weights, by which hardly any other columns have to be compared.
    weights = np.random.default_rng(0).standard_normal(len(X)) / len(X)
    means, copied = weights @ standard, set()
    for k in np.flatnonzero(is_real & standard.any(0)):
        is_near = np.abs(means[:k] - means[k]) <= (least[:k] + least[k]) * np.abs(weights).sum()
        near = np.flatnonzero(is_real[:k] & is_near)
        differences = {j: np.abs(standard[:, j] - standard[:, k]).max() for j in near}
        same = [int(j) for j in differences if differences[j] <= least[j] + least[k]]
        if same:
            copied.add(k)
            _warn(f"column {k} is a copy of column {same[0]}{_no_bound(differences[same[0]])}: drop one of them")
    varied = [int(k) for k in np.flatnonzero(is_real) if k not in copied and standard[:, k].any()]
    if len(varied) < 2 or len(X) <= len(varied):
        return
    _, deviations, directions = np.linalg.svd(standard[:, varied] / np.sqrt(len(X)), full_matrices=False)
    if deviations[-1] <= np.linalg.norm(least[varied] * directions[-1]):
        dependent = [varied[k] for k in along(directions[-1])]
        _warn(
            f"columns {dependent[:10]} depend on each other linearly, so that all rows lie in a plane"
            f"{_no_bound(deviations[-1])}: drop one of these columns"
        )


def _no_bound(deviation: float) -> str:
    if deviation <= _ROUNDING:
        return ", where a density has no bound"
    return f" up to {deviation:.1g} of its spread; if that is rounding, the density has no bound"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
