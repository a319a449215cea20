# SPDX-License-Identifier: Apache-2.0
"""What the estimator finds out about a table: bounds of its columns, weights of its rows, narrow directions."""

import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from .bijections.linear import TriangularAffine, triangular_root

_NAMED_SUPPORTS = {"real": (None, None), "positive": (0.0, None)}
_NARROW = 1e-5  # variance along a direction of standardized rows, below which they are whitened
_LEAST_VARIANCE = 1e-12


def bounds_of(support, num_columns: int, names: Sequence[str] = ()) -> tuple[list[float], list[float]]:
    """The lower bounds and the upper bounds of the columns, infinite where there is none.

    Args:
        support: as in :class:`RealNVPDensity`.
        num_columns: the number of columns.
        names: the names of the columns, if they have any.

    Raises:
        ValueError: The support is not of a known form, or does not fit the columns.
    """
    supports = ["real"] * num_columns
    if isinstance(support, Mapping):
        for key, one in support.items():
            column = list(names).index(key) if key in names else key
            if not isinstance(column, numbers.Integral) or not 0 <= column < num_columns:
                raise ValueError(f"expected support to name columns of {list(names) or num_columns}; got {key!r}")
            supports[column] = one
    elif isinstance(support, str) or _is_pair(support):
        supports = [support] * num_columns
    elif len(support) == num_columns:
        supports = list(support)
    else:
        raise ValueError(f"expected a support for each of the {num_columns} columns; got {len(support)}")
    pairs = [_NAMED_SUPPORTS.get(one, one) if isinstance(one, str) else one for one in supports]
    for pair in pairs:
        if not _is_pair(pair):
            raise ValueError(f"expected 'real', 'positive' or a pair (low, high), None for no bound; got {pair!r}")
    low = [-torch.inf if low is None else low for low, _ in pairs]
    high = [torch.inf if high is None else high for _, high in pairs]
    return low, high


def _is_pair(support) -> bool:
    is_pair = isinstance(support, (tuple, list)) and len(support) == 2
    return is_pair and all(bound is None or isinstance(bound, numbers.Real) for bound in support)


def check_weights(sample_weight, X: np.ndarray) -> np.ndarray:
    """A weight for each row, checked. (The check that scikit-learn uses itself is private.)"""
    weights = np.full(len(X), sample_weight) if isinstance(sample_weight, numbers.Number) else sample_weight
    weights = check_array(weights, dtype=X.dtype, ensure_2d=False, input_name="sample_weight")
    if weights.shape != (len(X),):
        raise ValueError(f"expected sample_weight of shape ({len(X)},); got {weights.shape}")
    if (weights < 0).any() or not (weights > 0).any():
        raise ValueError("expected sample weights >= 0, at least one of them positive; got negative ones, or all zero")
    return weights


def whitening(z: Tensor, weights: Tensor | None) -> list[TriangularAffine]:
    """The affine map that gives standardized rows their correlations, if some direction is narrow; else nothing.

    Couplings hardly learn such a direction, since it is not along an axis. Where no direction is nearly constant they
    do better in the coordinates of the columns: whitened, iris, wine and breast cancer lose 0.15, 0.5 and 7 nats.
    """
    dim, rows = z.shape[1], z.double()
    weights = torch.ones(len(z)).to(rows) if weights is None else weights.to(rows)
    covariance = (weights[:, None] * rows).mT @ rows / weights.sum()
    variances, directions = torch.linalg.eigh(covariance)
    if variances[0] > _NARROW:
        return []
    tril = triangular_root(directions * variances.clamp(min=_LEAST_VARIANCE).sqrt())
    return [TriangularAffine(dim).to(z).start_at(torch.zeros(dim).to(z), tril)]
