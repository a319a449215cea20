# SPDX-License-Identifier: Apache-2.0
"""Columns that are no real numbers: whole numbers and angles; and ties, of which the estimator warns."""

import math
import warnings

import numpy as np
import pandas
import pytest
import torch
from helpers import table
from scipy import stats

from pyro_realnvp import RealNVPDensity
from pyro_realnvp.columns import _lattice


def quick(**options):
    return RealNVPDensity(**{"num_couplings": 4, "num_steps": 400, "random_state": 0} | options)


@pytest.mark.slow
def test_counts_have_probabilities():
    """y ~ Poisson(exp(x / 2 + 1)), x ~ N(0, 1): the scores are log p(x) + log P(y | x)."""
    rng = np.random.default_rng(0)

    def draw(num):
        x = rng.normal(size=num)
        rate = np.exp(x / 2 + 1)
        y = rng.poisson(rate)
        return np.stack([x, y], 1), stats.norm.logpdf(x) + stats.poisson.logpmf(y, rate)

    X, _ = draw(3000)
    density = quick(support={1: "count"}, num_couplings=8, num_steps=800).fit(X)
    X, truth = draw(5000)
    scores = density.score_samples(X)
    assert 0 <= (truth - scores).mean() < 0.05
    samples = density.sample(5000, random_state=0)
    assert (samples[:, 1] == np.floor(samples[:, 1])).all() and samples[:, 1].min() == 0
    np.testing.assert_allclose(samples.mean(0), X.mean(0), atol=0.15)
    # No fraction of a number has a probability, and no negative number.
    assert (density.score_samples([[0.0, 1.5], [0.0, -1.0]]) == -np.inf).all()


def test_probabilities_of_two_values_add_up_to_one():
    rng = np.random.default_rng(0)
    X = np.stack([rng.normal(size=1000), rng.random(1000) < 0.3], 1)
    x = np.linspace(-8, 8, 400)
    for support, values in ((("integer", 0, 1), [0, 1]), ("integer", range(-4, 6))):
        density = quick(support={1: support}).fit(X)
        of_each = [np.exp(density.score_samples(np.stack([x, np.full(400, float(k))], 1))) for k in values]
        mass = dict(zip(values, np.trapezoid(of_each, x)))
        assert sum(mass.values()) == pytest.approx(1, abs=0.02)
        assert mass[1] == pytest.approx(X[:, 1].mean(), abs=0.08)
    assert (quick(support={1: ("integer", 0, 1)}, num_steps=1).fit(X).score_samples([[0.0, 2.0]]) == -np.inf).all()


def test_bounds_between_whole_numbers():
    """From -0.5 to 3 are the numbers 0, 1, 2, 3, whose probabilities add up to 1."""
    X = np.random.default_rng(0).integers(0, 4, (400, 1)).astype(float)
    density, same = (quick(support=("integer", low, high), num_steps=20).fit(X) for low, high in ((-0.5, 3.9), (0, 3)))
    values = np.arange(-2.0, 7)[:, None]
    np.testing.assert_allclose(density.score_samples(values), same.score_samples(values))
    assert np.exp(density.score_samples(values)).sum() == pytest.approx(1, abs=0.01)
    assert set(density.sample(500).ravel()) == {0, 1, 2, 3}


@pytest.mark.parametrize("support", [(5, 2), (2, 2), (math.nan, 1), ("integer", 5, 2), ("integer", 0.2, 0.8)])
def test_bounds_in_the_wrong_order(support):
    with pytest.raises(ValueError, match="exchange"):
        quick(support=support).fit(np.zeros((10, 1)) + 3)


@pytest.mark.slow
@pytest.mark.parametrize("period", [2 * math.pi, 24.0])
def test_angles_go_round(period):
    """Hours around midnight, whose sines and cosines alone are continuous."""
    rng = np.random.default_rng(0)

    def draw(num):
        angle = rng.vonmises(0.0, 2.0, num)
        x = np.cos(angle) + 0.5 * rng.normal(size=num)
        log_p = stats.vonmises.logpdf(angle, 2.0) + stats.norm.logpdf(x, np.cos(angle), 0.5)
        return np.stack([angle % (2 * np.pi) * period / (2 * np.pi), x], 1), log_p - np.log(period / (2 * np.pi))

    X, _ = draw(3000)
    density = quick(support={0: ("circular", period)}, num_couplings=8, num_steps=800).fit(X)
    X, truth = draw(5000)
    assert (truth - density.score_samples(X)).mean() < 0.05
    np.testing.assert_allclose(density.score_samples(X + [5 * period, 0]), density.score_samples(X), atol=1e-6)
    grid = np.stack(np.meshgrid(np.linspace(0, period, 200), np.linspace(-5, 5, 200)), -1)
    p = np.exp(density.score_samples(grid.reshape(-1, 2))).reshape(200, 200)
    assert np.trapezoid(np.trapezoid(p, dx=period / 199), dx=10 / 199) == pytest.approx(1, abs=0.01)
    samples = density.sample(1000, random_state=0)[:, 0]
    assert np.ptp(samples) <= period


@pytest.mark.slow
def test_uniform_angles():
    """There is no empty arc to cut the circle at."""
    X = np.random.default_rng(0).uniform(0, 2 * np.pi, (2000, 1))
    scores = quick(support="circular").fit(X).score_samples(np.linspace(0, 2 * np.pi, 1000)[:, None])
    assert 0 <= -np.log(2 * np.pi) - scores.mean() < 0.03


@table(
    "change, message",
    {
        "whole numbers": (lambda X: np.round(3 * X), r"columns \[0, 1, 2\] hold whole numbers"),
        "zeros and ones": (
            lambda X: np.column_stack([X[:, 0], X[:, 1] > 0]),
            r'columns \[1\] hold whole numbers.* pass support=\{1: "integer"\}',
        ),
        "copies of rows": (lambda X: X[np.arange(200) // 2], "100 of 200 rows are copies of others"),
        "copies of columns": (lambda X: np.column_stack([X, 3 * X[:, 0] + 1]), "column 3 is a copy of column 0"),
    },
)
def test_ties_are_named(change, message):
    X = change(np.random.default_rng(0).normal(size=(200, 3)))
    with pytest.warns(RuntimeWarning, match=message):
        quick(num_steps=1).fit(X)


def test_no_warning_of_ties_that_are_declared_or_rare():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=200), rng.poisson(3, 200), np.round(rng.normal(size=200), 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(num_steps=1, support={1: "count"}).fit(X)


def test_a_search_does_not_choose_the_noise_by_ties():
    """Of undeclared whole numbers the best noise would be none, since held-out rows have the same ties."""
    X = np.random.default_rng(0).poisson(2.0, (300, 2)).astype(float)
    best = stats.poisson.logpmf(X, 2.0).sum(1).mean()
    for noise in (0.0, 0.5):
        assert quick(noise=noise, support="count").fit(X).score(X) < best + 0.1


def test_the_points_of_the_noise_differ_between_columns():
    points = _lattice(12)
    assert ((0 <= points) & (points < 1)).all()
    np.testing.assert_allclose(points.mean(0), 0.5, atol=0.02)
    correlation = np.corrcoef(points.T) - np.eye(12)
    assert abs(correlation).max() < 0.5


@pytest.mark.parametrize("weights", [-np.ones(60), np.r_[np.nan, np.ones(59)], np.ones(3)])
def test_score_refuses_weights_that_fit_refuses(weights):
    X = np.random.default_rng(0).normal(size=(60, 2))
    density = RealNVPDensity(num_steps=2, num_components=1, random_state=0).fit(X)
    with pytest.raises(ValueError, match=r"sample.weight"):
        density.score(X, sample_weight=weights)
    assert np.isclose(density.score(X, sample_weight=2.0), density.score(X))


def test_whole_numbers_of_float32_on_a_bound():
    years = np.random.default_rng(0).integers(1900, 1903, (400, 1)).astype(np.float32)
    density = quick(support=("integer", 1900, 1902), num_steps=100).fit(years)
    p = np.exp(density.score_samples(np.array([[1900], [1901], [1902], [1903]], np.float32)))
    np.testing.assert_allclose(p, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.06)


def test_large_whole_numbers_need_float64():
    X = np.random.default_rng(0).integers(10**6, 2 * 10**6, (400, 1))
    with pytest.raises(ValueError, match=r"float32 for the noise between them; got .*: pass X in float64"):
        quick(support="integer").fit(X.astype(np.float32))
    assert np.isfinite(quick(support="integer", num_steps=20).fit(X).score(X))


@table(
    ("angles", "period", "low"),
    {
        "longitudes": (lambda rng: rng.uniform(-180, 180, 300), 360, -180),
        "hours": (lambda rng: rng.uniform(0, 24, 300), 24, 0),
        "round the north": (lambda rng: rng.normal(0, 20, 300) % 360, 360, 0),
    },
)
def test_angles_are_drawn_in_the_period_of_the_rows(angles, period, low):
    X = angles(np.random.default_rng(0))[:, None]
    samples = quick(support=("circular", period), num_steps=20).fit(X).sample(2000, random_state=0)
    assert samples.min() >= low and samples.max() <= low + period


@table(
    ("change", "message"),
    {
        "half zero": (lambda X: np.c_[np.maximum(X[:, :1], 0), X[:, 1:]], "column 0 is 0 in .* rows"),
        "a sum": (lambda X: np.c_[X, X.sum(1)], r"columns \[0, 1, 2, 3\] depend on each other linearly"),
        "proportions": (lambda X: np.exp(X) / np.exp(X).sum(1, keepdims=True), "depend on each other linearly"),
        "few rows": (lambda X: np.c_[X, X**2][:6], "6 rows of 6 columns lie in a plane"),
    },
)
def test_rows_in_a_plane_are_named(change, message):
    X = np.random.default_rng(0).normal(size=(200, 3))
    with pytest.warns(RuntimeWarning, match=message):
        quick(num_steps=2).fit(change(X))


def test_flags_have_probabilities():
    """64 values of the noise were too few for six columns: single probabilities were off by a quarter."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, 400)
    flags = np.where(rng.random((400, 6)) < 0.95, z[:, None], 1 - z[:, None]).astype(float)
    density = quick(num_couplings=16, num_steps=300, support=("integer", 0, 1)).fit(flags)
    row = np.array([[0.0, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        points = torch.as_tensor(row) + torch.rand(6000, 6, generator=torch.Generator().manual_seed(0)).double()
        exact = density.flow_().log_prob(points).exp().mean().log().item()
    assert density.score_samples(row)[0] == pytest.approx(exact, abs=0.12)


def test_bounds_may_be_arrays():
    X = np.random.default_rng(0).uniform(1, 99, (100, 2))
    for support in ([np.array([0.0, 100.0]), "real"], {0: np.array([0.0, 100.0])}, np.array([[0.0, 100.0], [0, 99.5]])):
        density = quick(num_steps=2, support=support).fit(X)
        assert density.score_samples([[-1.0, 1.0]]) == -np.inf
    with pytest.raises(ValueError, match=r"expected .real., .positive.*got None"):
        quick(support=None).fit(X)


def test_supports_may_be_a_series():
    X = np.exp(np.random.default_rng(0).normal(size=(50, 2)))
    density = quick(num_steps=2, support=pandas.Series(["positive", "real"])).fit(X)
    assert density.columns_.low.tolist() == [0.0, -np.inf]
