# SPDX-License-Identifier: Apache-2.0
"""A classifier by the densities of the classes, with the interface of scikit-learn."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from .estimator import RealNVPDensity


class RealNVPClassifier(ClassifierMixin, BaseEstimator):
    r"""Bayes' rule with the densities of a normalizing flow, conditional on the class:
    :math:`p(c \mid x) = \pi_c\, p(x \mid c) / \sum_k \pi_k\, p(x \mid k)`.

    Quadratic discriminant analysis is the same rule with normal densities. Here all classes share one
    :class:`RealNVPDensity`, whose context is the one-hot class, so that small classes profit from the others.

    Args:
        density: an unfitted :class:`RealNVPDensity`; by default one with default options. Searches set its options as
            ``density__noise`` and so on.
        priors: the probabilities :math:`\pi_c` of the classes, ``(n_classes,)``, in the order of ``classes_``; by
            default their frequencies.

    Attributes:
        classes_ (ndarray): the labels of the classes, sorted.
        priors_ (ndarray): the probabilities of the classes.
        density_ (RealNVPDensity): the fitted density, whose ``flow_`` takes a one-hot class.
        n_features_in_ (int): the number of columns of X.
        feature_names_in_ (ndarray): the names of the columns, if X had any.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> classifier = RealNVPClassifier(RealNVPDensity(num_steps=20, random_state=0)).fit(X, y)
        >>> classifier.predict_proba(X[:5]).shape
        (5, 3)
    """

    def __init__(self, density: RealNVPDensity | None = None, *, priors: ArrayLike | None = None):
        self.density = density
        self.priors = priors

    def fit(self, X: ArrayLike, y: ArrayLike) -> "RealNVPClassifier":
        """Fits the density of the rows given their classes, and returns the classifier.

        Args:
            X: the rows, an array or a data frame of shape ``(n_samples, n_features)``.
            y: the label of each row, ``(n_samples,)``.

        Raises:
            ValueError: There is only one class, the priors do not fit the classes, or X is no data for
                :meth:`RealNVPDensity.fit`.
        """
        _, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected two or more classes; got 1 class, {self.classes_[0]}: use RealNVPDensity")
        self.priors_: np.ndarray = self._priors(labels)
        # Before it is fitted, so that an interrupt loses nothing.
        self.density_: RealNVPDensity = RealNVPDensity() if self.density is None else clone(self.density)
        self.density_.fit(X, context=np.eye(len(self.classes_))[labels])
        return self

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:
        """The logarithm of :meth:`predict_proba`."""
        check_is_fitted(self)
        num_rows = len(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))
        classes = np.eye(len(self.classes_))
        scores = np.stack([self.density_.score_samples(X, context=np.tile(c, (num_rows, 1))) for c in classes], 1)
        with np.errstate(divide="ignore"):  # a prior may be 0
            log_priors = np.log(self.priors_)
        joint = scores + log_priors
        # No class has a density outside of the support, where nothing but the priors is known.
        joint = np.where(np.isneginf(joint).all(1, keepdims=True), log_priors, joint)
        joint = joint - joint.max(1, keepdims=True)  # far away, the sum of the classes is lost in rounding otherwise
        return joint - logsumexp(joint, axis=1, keepdims=True)

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """The probability of each class, given the row.

        Args:
            X: the rows, ``(n_samples, n_features)``.

        Returns:
            The probabilities, ``(n_samples, n_classes)``, in the order of ``classes_``. A row outside of the support
            gets the priors.
        """
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable class of each row, ``(n_samples,)``."""
        best = self.predict_log_proba(X).argmax(1)
        return self.classes_[best]

    def _priors(self, labels: np.ndarray) -> np.ndarray:
        if self.priors is None:
            return np.bincount(labels) / len(labels)
        priors = np.asarray(self.priors)
        if priors.shape == self.classes_.shape:
            priors = priors.astype(float)  # of fractions, decimals and names there is no logarithm
        if priors.shape != self.classes_.shape or (priors < 0).any() or not np.isclose(priors.sum(), 1):
            raise ValueError(
                f"expected {len(self.classes_)} priors, which are not negative and sum to 1; got {self.priors}"
            )
        return priors
