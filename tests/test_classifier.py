# SPDX-License-Identifier: Apache-2.0
"""The classifier, against scikit-learn's conventions and the exact probabilities of normal classes."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
from helpers import interrupt_after, small_density, table
from scipy import stats
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_realnvp as rn

RNG = np.random.default_rng(0)
CLASSES = [stats.multivariate_normal([-1, 0], 1.0), stats.multivariate_normal([1, 0], [[1.0, 0.5], [0.5, 0.5]])]
Y = np.repeat(["a", "b"], [600, 200])
X = np.concatenate([CLASSES[0].rvs(600, RNG), CLASSES[1].rvs(200, RNG)])


def small(*, priors=None, **options):
    return rn.RealNVPClassifier(small_density(**options), priors=priors)


@pytest.mark.slow
@parametrize_with_checks([small(num_steps=40)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.parametrize("priors", [None, [0.5, 0.5]], ids=["frequencies", "given"])
def test_probabilities_of_normal_classes(priors):
    classifier = small(num_couplings=4, num_steps=500, noise=0.0, priors=priors).fit(X, Y)
    weights = np.array([0.75, 0.25] if priors is None else priors)
    joint = weights * np.stack([normal.pdf(X) for normal in CLASSES], 1)
    exact = joint / joint.sum(1, keepdims=True)
    assert classifier.classes_.tolist() == ["a", "b"]
    np.testing.assert_allclose(classifier.priors_, weights)
    assert np.abs(classifier.predict_proba(X) - exact).mean() < 0.04
    assert (classifier.predict(X) == np.array(["a", "b"])[exact.argmax(1)]).mean() > 0.95


@pytest.mark.slow
def test_bayes_rule_is_that_of_the_densities():
    classifier = small(priors=[0.9, 0.1]).fit(X, Y)
    scores = np.stack([classifier.density_.score_samples(X, context=np.tile(c, (len(X), 1))) for c in np.eye(2)], 1)
    joint = np.exp(scores) * [0.9, 0.1]
    probabilities = classifier.predict_proba(X)
    np.testing.assert_allclose(probabilities, joint / joint.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(np.exp(classifier.predict_log_proba(X)), probabilities)
    assert (classifier.predict(X) == classifier.classes_[probabilities.argmax(1)]).all()


@pytest.mark.parametrize("priors", [[Fraction(1, 4), Fraction(3, 4)], [Decimal("0.25"), Decimal("0.75")]])
def test_priors_of_other_kinds_of_numbers(priors):
    found, expected = (small(priors=p, num_steps=2).fit(X, Y).predict_proba(X[:3]) for p in (priors, [0.25, 0.75]))
    np.testing.assert_allclose(found, expected)


def test_priors_may_be_zero_and_decide_outside_of_the_support():
    classifier = small(support="positive", priors=[1.0, 0.0]).fit(np.abs(X), Y)
    assert (classifier.predict(np.abs(X)) == "a").all()
    classifier = small(support="positive", priors=[0.2, 0.8]).fit(np.abs(X), Y)
    np.testing.assert_allclose(classifier.predict_proba(-np.abs(X[:3])), [[0.2, 0.8]] * 3)


def test_supports_by_the_names_of_columns_and_searches():
    frame = pandas.DataFrame(np.abs(X), columns=["left", "right"])
    search = GridSearchCV(small(support={"left": "positive"}), {"density__noise": [0.0, 0.5]}, cv=2).fit(frame, Y)
    assert search.best_estimator_.feature_names_in_.tolist() == ["left", "right"]
    assert search.predict(frame).shape == (800,)


@table(
    ("call", "message"),
    {
        "one class": (lambda: small().fit(X, Y == "c"), "got 1 class, False: use RealNVPDensity"),
        "three priors": (lambda: small(priors=[0.2, 0.3, 0.5]).fit(X, Y), r"expected 2 priors.*got \[0.2, 0.3, 0.5\]"),
        "negative priors": (lambda: small(priors=[-0.5, 1.5]).fit(X, Y), "not negative"),
        "priors by name": (lambda: small(priors={"a": 0.5, "b": 0.5}).fit(X, Y), "expected 2 priors"),
        "priors of sum 2": (lambda: small(priors=[1, 1]).fit(X, Y), "sum to 1"),
        "numbers": (lambda: small().fit(X, X[:, 0]), "[Uu]nknown label type"),
        "outside": (lambda: small(support="positive").fit(X, Y), "lie outside of the support"),
    },
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_probabilities_add_up_far_away():
    y = RNG.integers(0, 2, 200)
    X = RNG.normal(size=(200, 2)) + 3 * y[:, None]
    classifier = rn.RealNVPClassifier(rn.RealNVPDensity(num_couplings=2, num_steps=20, random_state=0)).fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba([[1e6, 1e6], [1e9, 1e9], [-1e20, 0.0]]).sum(1), 1)
    classifier.fit(X.astype(np.float32), y)
    np.testing.assert_allclose(classifier.predict_proba(np.full((1, 2), -3.4e38, np.float32)), [classifier.priors_])


@pytest.mark.parametrize("make", [small, lambda **options: rn.RealNVPOutlierDetector(small_density(**options))])
def test_an_interrupt_loses_nothing(monkeypatch, make):
    """The trained density was thrown away, or an earlier one combined with new classes."""
    estimator = make(num_steps=20).fit(X, Y)
    before = estimator.density_
    interrupt_after(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X, np.where(Y == "a", "b", "a"))
    assert estimator.density_ is not before and len(estimator.predict(X[:5])) == 5
