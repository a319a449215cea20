# SPDX-License-Identifier: Apache-2.0
"""The kinds of columns that a table may have, and its weights."""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_array
from torch import Tensor
from torch.quasirandom import SobolEngine

ROUNDINGS = 4  # of rows, up to which a deviation is nothing else

_PART_OF_DIRECTION = 0.05
_NOISE_POINTS = 64  # of one column of whole numbers, and up to four times as many of several
_LEAST_NOISE = 1 / 64  # between two values of noise


@dataclass(frozen=True)
class Column:
    """The values that a column may take: an interval, whole numbers in it, or a circle."""

    low: float = -math.inf
    high: float = math.inf
    is_integer: bool = False
    period: float | None = None


_NAMED = {
    "real": Column(),
    "positive": Column(low=0.0),
    "integer": Column(is_integer=True),
    "count": Column(low=0.0, is_integer=True),
    "circular": Column(period=2 * math.pi),
}


class Columns:
    """The columns of a table.

    Whole numbers get uniform noise, so that the density of the flow at x + u is that of a real number, and its mean
    over u the probability of x. A circle is cut open where it is emptiest; the density at an angle is the sum of the
    densities at all points of the line that are this angle.

    Args:
        support: as in :class:`RealNVPDensity`.
        X: the rows to fit.
        names: the labels of the columns of a data frame.

    Raises:
        ValueError: The support is not of a known form, or does not fit the columns.
    """

    def __init__(self, support: str | Sequence[Any] | Mapping[Any, Any], X: np.ndarray, names: Sequence[Any] = ()):
        self.each: list[Column] = _columns(support, X.shape[1], names)
        self.low: np.ndarray = np.array([c.low for c in self.each], X.dtype)
        self.high: np.ndarray = np.array([c.high for c in self.each], X.dtype)
        self.is_integer: np.ndarray = np.array([c.is_integer for c in self.each])
        largest = np.abs(X[:, self.is_integer]).max(initial=0)
        if np.spacing(largest) > _LEAST_NOISE:
            raise ValueError(
                f"expected whole numbers that leave digits of {X.dtype} for the noise between them; got {largest:.6g}: "
                "pass X in float64, or take such large numbers for real ones"
            )
        self.period: np.ndarray = np.array([c.period or np.inf for c in self.each], X.dtype)
        self.start, self.cut = (
            np.array([find(x, c.period) if c.period else -np.inf for x, c in zip(X.T, self.each)], X.dtype)
            for find in (_start, _emptiest)
        )

    def is_inside(self, X: np.ndarray) -> np.ndarray:
        """Which rows lie inside of the support."""
        inside = np.where(self.is_integer, (X >= self.low) & (X == np.floor(X)), X > self.low)
        return (inside & (X < self.high)).all(1)

    def check(self, X: np.ndarray) -> None:
        """Raises an error if rows lie outside of the support."""
        outside = X[~self.is_inside(X)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} of {len(X)} rows of X lie outside of the support, such as {outside[0]}: "
                "pass another support=, or drop these rows"
            )

    def unwrap(self, X: np.ndarray) -> np.ndarray:
        """The rows with each angle in the one period that begins at the cut."""
        return self._in_period(X, self.cut)

    def restore(self, X: np.ndarray) -> np.ndarray:
        """Samples of the flow as rows of the table: whole numbers, and angles in the period of the rows to fit."""
        return self._in_period(np.where(self.is_integer, np.floor(X), X), self.start)

    def _in_period(self, X: np.ndarray, start: np.ndarray) -> np.ndarray:
        is_circle = np.isfinite(self.period)
        period, start = np.where(is_circle, self.period, 1), np.where(is_circle, start, 0)
        return np.where(is_circle, start + (X - start) % period, X)

    def add_noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Rows with new uniform noise in the columns of whole numbers, in place of any noise from before."""
        if not self.is_integer.any():
            return x
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        noise = noise.clamp(torch.finfo(x.dtype).eps)
        lowest = x.floor()
        # Neither a noise of 0 nor rounding may leave the number on a bound.
        inside = torch.nextafter(lowest, lowest + 1), torch.nextafter(lowest + 1, lowest)
        return torch.where(torch.from_numpy(self.is_integer).to(x.device), (lowest + noise).clamp(*inside), x)

    def points(self, X: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
        """Points at which the densities of the flow, with these weights, add up to the density of each row."""
        X = self.unwrap(X)
        circles = np.flatnonzero(np.isfinite(self.period))
        noise = _lattice(int(self.is_integer.sum()))
        for turns in product((-1, 0, 1), repeat=len(circles)):
            for u in noise:
                points = X.copy()
                points[:, circles] += turns * self.period[circles]
                whole = X[:, self.is_integer]
                inside = np.nextafter(whole, whole + 1), np.nextafter(whole + 1, whole)
                points[:, self.is_integer] = np.clip(whole + u, *inside)
                yield points, 1 / len(noise)


def along(direction: np.ndarray) -> list[int]:
    """The columns along which a direction goes."""
    return np.flatnonzero(np.abs(direction) > _PART_OF_DIRECTION).tolist()


def _columns(support, num_columns: int, names: Sequence[Any]) -> list[Column]:
    columns, support = ["real"] * num_columns, _as_list(support)
    if isinstance(support, Mapping):
        for key, one in support.items():
            # Where labels are numbers themselves, a number that is none of them is no position either.
            are_numbers = any(isinstance(name, numbers.Integral) for name in names)
            column = list(names).index(key) if key in names else None if are_numbers else key
            if not isinstance(column, numbers.Integral) or not 0 <= column < num_columns:
                raise ValueError(f"expected support to name columns of {list(names) or num_columns}; got {key!r}")
            columns[column] = _as_list(one)
    elif not isinstance(support, (list, tuple)) or _is_pair(support) or _is_circle(support) or _is_whole(support):
        columns = [support] * num_columns
    elif len(support) == num_columns:
        columns = [_as_list(one) for one in support]
    else:
        raise ValueError(f"expected a support for each of the {num_columns} columns; got {len(support)}")
    return [_column(one) for one in columns]


def _as_list(values):
    return values.tolist() if hasattr(values, "tolist") else values


def _column(one) -> Column:
    if isinstance(one, str) and one in _NAMED:
        return _NAMED[one]
    if _is_circle(one):
        return Column(period=float(one[1]))
    if _is_whole(one):
        low, high = _bounds(one[1:])
        whole = np.ceil(low), np.floor(high)
        if whole[0] > whole[1]:
            raise ValueError(
                f"expected a whole number from {low} to {high}; got none: exchange the bounds, or widen them"
            )
        return Column(float(whole[0]), float(whole[1]) + 1, is_integer=True)
    if _is_pair(one):
        low, high = _bounds(one)
        if not low < high:
            raise ValueError(f"expected a lower bound, and a higher one; got ({low}, {high}): exchange or widen them")
        return Column(low, high)
    raise ValueError(
        "expected 'real', 'positive', 'integer', 'count', 'circular', a pair (low, high) with None for no bound, "
        f"('integer', low, high) or ('circular', period); got {one!r}"
    )


def _bounds(pair: Sequence[float | None]) -> tuple[float, float]:
    low, high = pair
    return -math.inf if low is None else low, math.inf if high is None else high


def _is_pair(support) -> bool:
    is_pair = isinstance(support, (tuple, list)) and len(support) == 2
    return is_pair and all(bound is None or isinstance(bound, numbers.Real) for bound in support)


def _is_whole(support) -> bool:
    is_triple = isinstance(support, (tuple, list)) and len(support) == 3
    return is_triple and isinstance(support[0], str) and support[0] == "integer" and _is_pair(support[1:])


def _is_circle(support) -> bool:
    is_pair = isinstance(support, (tuple, list)) and len(support) == 2 and isinstance(support[0], str)
    return is_pair and support[0] == "circular" and isinstance(support[1], numbers.Real) and 0 < support[1] < math.inf


def _start(angles: np.ndarray, period: float) -> float:
    """The angle at which a period begins that has all of the angles in it, 0 or half of one below it if possible."""
    for start in (0.0, -period / 2):
        if (angles >= start).all() and (angles <= start + period).all():
            return start
    return float(angles.min())


def _emptiest(angles: np.ndarray, period: float) -> float:
    """The middle of the widest arc without an angle, the point where a circle is cut open."""
    angles = np.unique(angles % period)
    gaps = np.diff(angles, append=angles[0] + period)
    widest = gaps.argmax()
    return float(angles[widest] + gaps[widest] / 2)


def _lattice(dim: int) -> np.ndarray:
    """Points that fill the unit cube evenly, ``(K, dim)``: a scrambled sequence of Sobol, always the same."""
    if not dim:
        return np.zeros((1, 0))
    num = _NOISE_POINTS * 2 ** min(dim - 1, 2)
    return SobolEngine(dim, scramble=True, seed=0).draw(num, dtype=torch.float64).numpy()


def check_weights(sample_weight: ArrayLike, X: np.ndarray) -> np.ndarray:
    """A weight of at most 1 for each row, checked. (The check that scikit-learn uses itself is private.)"""
    weights = np.full(len(X), sample_weight) if isinstance(sample_weight, numbers.Number) else sample_weight
    weights = check_array(weights, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
    if weights.shape != (len(X),):
        raise ValueError(f"expected sample_weight of shape ({len(X)},); got {weights.shape}")
    if (weights < 0).any() or not (weights > 0).any():
        raise ValueError("expected sample weights >= 0, at least one of them positive; got negative ones, or all zero")
    return (weights / weights.max()).astype(X.dtype)  # so that no sum of squares overflows
