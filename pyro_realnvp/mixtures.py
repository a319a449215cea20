# SPDX-License-Identifier: Apache-2.0
"""Mixtures of normals, fitted by scikit-learn to rows that may have weights."""

import threading
import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.cluster import HDBSCAN
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

_MANY_ROWS = 1000
_MOST_COMPONENTS = 8
_ROWS_PER_COMPONENT = 10  # with fewer, the criterion prefers normals that collapse to a few rows each
_FILTERS = threading.Lock()  # warnings.catch_warnings changes the filters of all threads
_MOST_LOOKED_AT = 5000  # rows among which clusters, or a number of components, are looked for
_HEAVY = 15.0  # the mean fourth power of a standardized column, 3 of a normal one, above which its tails are heavy
_LEAST_CLUSTERED = 0.9


def fit_mixture(x: Tensor, weights: ArrayLike | None, num_components: int, kind: str, seed: int) -> GaussianMixture:
    rows, shares = _weighted_rows(x, weights, max(2, num_components))
    units = _Units(rows, shares)
    return units.restore(_fitted(units.standardize(rows), shares, num_components, kind, seed))


def choose_mixture(x: Tensor, weights: ArrayLike | None, seed: int) -> GaussianMixture:
    """A mixture whose number of components suits a flow of such rows: see :meth:`MixtureBase.for_rows`."""
    rows, shares = _weighted_rows(x, weights, 2)
    units = _Units(rows, shares)
    rows = units.standardize(rows)
    if _makes_clusters(rows, shares):
        return units.restore(_fitted(rows, shares, _num_clusters(rows, shares), "full", seed))
    are_few = len(rows) <= _MOST_LOOKED_AT or _worth(shares) < _MANY_ROWS
    some, parts = (rows, shares) if are_few else _some(rows, shares)
    most = min(_MOST_COMPONENTS, max(1, int(_worth(parts)) // _ROWS_PER_COMPONENT))
    # scikit-learn's equal covariances count all rows alike.
    kinds = ("full", "tied", "diag") if np.ptp(shares) == 0 else ("full", "diag")
    found = [_fitted(some, parts, num, kind, seed) for num in range(1, most + 1) for kind in kinds]
    best = min(found, key=lambda mixture: (mixture.has_collapsed(some), mixture.bic(some)))
    return units.restore(best if some is rows else _fitted(rows, shares, best.n_components, best.covariance_type, seed))


def makes_clusters(x: Tensor, weights: ArrayLike | None) -> bool:
    """Whether a mixture of such rows has a normal for each cluster, instead of as many as an information criterion."""
    rows, shares = _weighted_rows(x, weights, 2)
    return _makes_clusters(_Units(rows, shares).standardize(rows), shares)


def _makes_clusters(rows: np.ndarray, shares: np.ndarray) -> bool:
    """Whether rows are many and have no heavy tails, which a flow does not learn from those of a normal."""
    return bool(_worth(shares) >= _MANY_ROWS and np.average(rows**4, axis=0, weights=shares).max() <= _HEAVY)


def _weighted_rows(x: Tensor, weights: ArrayLike | None, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that count, and the share of each in the sum of all weights."""
    rows = _array(x)
    weights = np.ones(len(rows)) if weights is None else _array(weights)
    counted = weights > 0
    if counted.sum() < least:
        raise ValueError(f"expected {least} rows or more, of positive weight; got {counted.sum()} of {len(rows)}")
    return rows[counted], weights[counted] / weights.sum()


def _array(values: ArrayLike) -> np.ndarray:
    return torch.as_tensor(values).detach().double().cpu().numpy()


class _Units:
    """Those of the columns: what scikit-learn adds to the variances is absolute, and its first centres are chosen by
    distances."""

    def __init__(self, rows: np.ndarray, shares: np.ndarray):
        self._loc = np.average(rows, axis=0, weights=shares)
        scale = np.sqrt(np.average(np.square(rows - self._loc), axis=0, weights=shares))
        self._scale = np.where(np.ptp(rows, axis=0) > 0, scale, 1.0)  # that of a constant is the rounding of its mean

    def standardize(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self._loc) / self._scale

    def restore(self, mixture: GaussianMixture) -> GaussianMixture:
        diagonal = mixture.covariance_type == "diag"
        mixture.means_ = self._loc + self._scale * mixture.means_
        mixture.covariances_ = mixture.covariances_ * (
            np.square(self._scale) if diagonal else np.outer(self._scale, self._scale)
        )
        return mixture


class WeightedMixture(GaussianMixture):
    """scikit-learn's mixture, which by itself takes no weights of rows."""

    def fit(self, rows: np.ndarray, shares: np.ndarray) -> "WeightedMixture":
        self._weights = shares * len(rows)
        return super().fit(rows)

    def has_collapsed(self, rows: np.ndarray) -> bool:
        """Whether a normal rests on hardly more rows than it has entries, or on a few that outweigh the others."""
        return self.covariance_type != "tied" and bool(
            (_worth(self.predict_proba(rows) * self._weights[:, None]) <= rows.shape[1]).any()
        )

    def bic(self, rows: np.ndarray) -> float:
        worth = _worth(self._weights)
        mean = np.average(self.score_samples(rows), weights=self._weights)
        return -2 * worth * mean + self._n_parameters() * np.log(worth)

    def _initialize(self, rows, responsibilities, **options):
        super()._initialize(rows, responsibilities * self._weights[:, None], **options)

    def _e_step(self, rows, **options):
        log_p, log_responsibilities = self._estimate_log_prob_resp(rows, **options)
        return np.average(log_p, weights=self._weights), log_responsibilities + np.log(self._weights)[:, None]


def _worth(weights: np.ndarray) -> np.ndarray:
    """The number of rows of equal weight that are worth as much."""
    return np.square(weights.sum(0)) / np.square(weights).sum(0)


def _fitted(rows: np.ndarray, shares: np.ndarray, num_components: int, kind: str, seed: int) -> GaussianMixture:
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the flow trains on
        mixture = WeightedMixture(num_components, covariance_type=kind, n_init=3, random_state=seed)
        return mixture.fit(rows, shares)


def _some(rows: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, drawn by their shares, that count alike."""
    # Every k-th row might be all of one kind. No row comes twice, since copies are close together.
    num = min(round(_worth(shares)), _MOST_LOOKED_AT)
    return rows[np.random.default_rng(0).choice(len(rows), num, replace=False, p=shares)], np.full(num, 1 / num)


def _num_clusters(rows: np.ndarray, shares: np.ndarray) -> int:
    """The number of separate clusters, 1 if most rows belong to none."""
    rows, _ = _some(rows, shares)
    labels = HDBSCAN(min_cluster_size=max(10, len(rows) // 20), copy=True).fit_predict(rows)
    return max(1, int(labels.max()) + 1) if (labels >= 0).mean() > _LEAST_CLUSTERED else 1
