# SPDX-License-Identifier: Apache-2.0
"""A detector of outliers, with the interface of scikit-learn."""

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.utils.validation import check_is_fitted

from .estimator import RealNVPDensity


class RealNVPOutlierDetector(OutlierMixin, BaseEstimator):
    r"""Rows of low density are outliers: :math:`\log p(x) < t`, where t is the quantile of the training rows' scores
    that makes a fraction ``contamination`` of these rows outliers.

    Args:
        density: an unfitted :class:`RealNVPDensity`; by default one with default options. Searches set its options as
            ``density__noise`` and so on.
        contamination: the fraction of the training rows that are outliers, in (0, 0.5].

    Attributes:
        density_ (RealNVPDensity): the fitted density.
        offset_ (float): the threshold t, in nats.
        n_features_in_ (int): the number of columns of X.
        feature_names_in_ (ndarray): the names of the columns, if X had any.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> detector = RealNVPOutlierDetector(RealNVPDensity(num_steps=20, random_state=0), contamination=0.1)
        >>> int((detector.fit_predict(X) == -1).sum())
        15
    """

    def __init__(self, density: RealNVPDensity | None = None, *, contamination: float = 0.1):
        self.density = density
        self.contamination = contamination

    def fit(self, X: ArrayLike, y: Any = None) -> "RealNVPOutlierDetector":
        """Fits a density and its threshold to the rows of X and returns the detector.

        Args:
            X: the rows, an array or a data frame of shape ``(n_samples, n_features)``.
            y: ignored.

        Raises:
            ValueError: ``contamination`` is not in (0, 0.5], or X is no data for :meth:`RealNVPDensity.fit`.
        """
        if not isinstance(self.contamination, numbers.Real) or not 0 < self.contamination <= 0.5:
            raise ValueError(f"expected contamination in (0, 0.5], a fraction of the rows; got {self.contamination!r}")
        self.density_: RealNVPDensity = RealNVPDensity() if self.density is None else clone(self.density)
        try:
            self.density_.fit(X)
        finally:
            if hasattr(self.density_, "flow_"):  # an interrupt loses nothing
                scores = self.density_.score_samples(X)
                # Between -inf and a number, there is no quantile.
                scores = np.maximum(scores, np.finfo(scores.dtype).min).astype(np.float64)
                self.offset_: float = np.quantile(scores, self.contamination)
        return self

    @property
    def n_features_in_(self) -> int:
        return self.density_.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        return self.density_.feature_names_in_

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """The log-density of each row, in nats, ``(n_samples,)``; -inf for rows outside of the support."""
        check_is_fitted(self)
        return self.density_.score_samples(X)

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """The log-density of each row less the threshold ``offset_``, ``(n_samples,)``: outliers are below 0."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """-1 for outliers and 1 for the other rows, ``(n_samples,)``."""
        return np.where(self.decision_function(X) < 0, -1, 1)
