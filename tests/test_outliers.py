# SPDX-License-Identifier: Apache-2.0
"""The detector of outliers, against scikit-learn's conventions and the outliers of a known density."""

import numpy as np
import pandas
import pytest
from helpers import small_density
from scipy import stats
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_realnvp as rn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(500, 2)) @ [[1.0, 0.9], [0.0, 0.3]] + [5.0, -3.0]


def small(*, contamination=0.1, **options):
    return rn.RealNVPOutlierDetector(small_density(**options), contamination=contamination)


@pytest.mark.slow
@parametrize_with_checks([small(num_steps=5)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_outliers_of_a_normal_density():
    """The outliers are the rows beyond an ellipse, which holds 90 % of the normal distribution."""
    detector = small(num_couplings=4, num_steps=300).fit(X)
    normal = stats.multivariate_normal(X.mean(0), np.cov(X.T))
    exact = normal.logpdf(X) < normal.logpdf(X.mean(0)) - stats.chi2(2).ppf(0.9) / 2
    assert ((detector.predict(X) == -1) == exact).mean() > 0.96
    assert detector.predict([[5.0, -3.0], [6.0, -4.0]]).tolist() == [1, -1]  # against the correlation


@pytest.mark.parametrize("contamination", [0.02, 0.5])
def test_contamination_is_the_fraction_of_outliers(contamination):
    detector = small(contamination=contamination).fit(X)
    assert (detector.predict(X) == -1).sum() == 500 * contamination
    np.testing.assert_allclose(detector.decision_function(X), detector.score_samples(X) - detector.offset_)
    assert (detector.fit_predict(X) == detector.predict(X)).all()


def test_rows_outside_of_the_support_are_outliers():
    frame = pandas.DataFrame(np.abs(X), columns=["left", "right"])
    detector = small(support={"left": "positive"}).fit(frame)
    assert detector.feature_names_in_.tolist() == ["left", "right"] and detector.n_features_in_ == 2
    row = frame[:1].assign(left=-1.0)
    assert detector.decision_function(row).tolist() == [-np.inf]
    assert detector.predict(row).tolist() == [-1]


def test_the_options_of_the_density_are_searched():
    search = GridSearchCV(
        small(), {"density__noise": [0.0, 0.5]}, scoring=lambda d, X, y=None: d.density_.score(X), cv=2
    )
    assert set(search.fit(X).best_params_) == {"density__noise"}


@pytest.mark.filterwarnings("ignore:.* rows of .* hold values", "ignore:.* steps had a loss or gradient")
@pytest.mark.parametrize("fill", [1e20, 9.96921e36, -3.4028235e38])
def test_a_fill_value_is_the_outlier(fill):
    """Its density was nan or the threshold -inf, so that no row was an outlier; or the column seemed to be constant."""
    table = X.astype(np.float32)
    table[7, 1] = fill
    detector = small(contamination=1 / len(X), num_components=1).fit(table)
    assert np.flatnonzero(detector.predict(table) == -1).tolist() == [7]
    assert np.isneginf(detector.score_samples(table[7:8])) and np.isfinite(detector.offset_)


def test_rows_far_away_are_outliers():
    """In couplings behind an overflow, the difference of two infinities was nan."""
    narrow = np.c_[X[:, 0], X[:, 0] + 1e-4 * X[:, 1]].astype(np.float32)
    far = np.array([[0, 1e18], [0, 1e30], [0, 9.96921e36], [-3.4028235e38, -3.4028235e38]], np.float32)
    for table in (X.astype(np.float32), narrow):
        for num_components in (1, 3):
            detector = small(num_components=num_components).fit(table)
            assert (detector.score_samples(far) < -1e30).all()
            assert (detector.predict(far) == -1).all()


@pytest.mark.parametrize("contamination", [0.0, 0.6, "auto"])
def test_a_bad_contamination(contamination):
    with pytest.raises(ValueError, match=r"contamination in \(0, 0.5\], a fraction of the rows; got"):
        small(contamination=contamination).fit(X)
