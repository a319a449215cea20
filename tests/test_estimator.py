# SPDX-License-Identifier: Apache-2.0
"""The scikit-learn estimator, against its conventions and against known densities."""

import math
import pickle
import re
import warnings

import joblib
import numpy as np
import pandas
import pytest
import sklearn
import torch
from helpers import interrupt_after, small_density, table
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris, make_moons
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_realnvp as rn
from pyro_realnvp.columns import Columns
from pyro_realnvp.table_flows import fading_noise, is_better, refit

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 2)) @ [[1.0, 0.8], [0.0, 0.5]] * [1.0, 100.0] + [5.0, -300.0]


def small(**options):
    return rn.RealNVPDensity(
        **({"num_couplings": 4, "hidden_dims": (8,), "num_steps": 50, "random_state": 0} | options)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* rows of 30 columns lie in a plane:RuntimeWarning")
@parametrize_with_checks(
    [small(num_couplings=2, num_steps=5), small(num_couplings=2, num_steps=5, support=(-1e6, None))]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# -- densities against the truth -------------------------------------------------------------------------------------


def test_a_gaussian_is_found_in_its_own_units():
    truth = stats.multivariate_normal(X.mean(0), np.cov(X.T))
    density = small(num_steps=400, num_couplings=6).fit(X)
    assert density.score(X) == pytest.approx(truth.logpdf(X).mean(), abs=0.1)
    samples = density.sample(5000, random_state=1)
    np.testing.assert_allclose(samples.mean(0), X.mean(0), atol=0.15 * X.std(0).max())
    assert np.corrcoef(samples.T)[0, 1] == pytest.approx(np.corrcoef(X.T)[0, 1], abs=0.1)


@pytest.mark.parametrize("num_components", ["auto", 3])
def test_a_mixture_that_training_does_not_improve_is_fitted_to_all_rows(num_components):
    """Three normals far apart: the weights are the shares of all rows, not only of those that are not held out."""
    rng = np.random.default_rng(0)
    counts = np.array([94, 150, 206])
    locs = np.repeat([[-9.0, 0.0], [0.0, 9.0], [9.0, 0.0]], counts, axis=0)
    X = locs + rng.normal(size=locs.shape)
    density = small(num_components=num_components, lr=1.0).fit(X)  # far too high
    weights = density.flow_.base().mixture_distribution.probs.detach().sort().values
    np.testing.assert_allclose(weights, counts / len(X), atol=1e-4)
    x = locs + rng.normal(size=locs.shape)
    truth = stats.multivariate_normal.logpdf(x - locs, np.zeros(2)) + np.log(np.repeat(counts, counts) / len(x))
    assert density.score(x) == pytest.approx(truth.mean(), abs=0.1)


def test_better_means_by_more_than_a_standard_error():
    """The differences of log N(x; 0, 1) and log N(x; 0, s) at x = 1, 0 are log s - (1 - s^-2) / 2 and log s."""
    x = torch.tensor([[1.0], [0.0]])

    def normal(scale):
        return rn.Flow(rn.TriangularAffine(1).start_at(torch.zeros(1), torch.tensor([[scale]])))

    # s = 0.5: 0.06 +- 0.53; s = 1: 0 +- 0; s = 1.5: 0.27 +- 0.10
    assert [is_better(normal(1.0), normal(s), x, None, None) for s in (0.5, 1.0, 1.5)] == [False, False, True]
    # s = 0.5, where the row that gains counts nine times: 3.3 +- 2.8
    assert is_better(normal(1.0), normal(0.5), x, None, torch.tensor([9.0, 1.0]))


@pytest.mark.parametrize("num_components, expected", [("auto", 2), (3, 3)])
def test_the_mixture_is_fitted_to_all_rows_in_the_coordinates_of_the_base(num_components, expected):
    """The rows to train on are one cluster, and those apart are the other, with a third of the rows."""
    torch.manual_seed(0)
    train, apart = 10 + 2 * (torch.randn(200, 2) - 8), 10 + 2 * (torch.randn(100, 2) + 8)
    to_data = rn.Standardize(2)
    to_data.mean.fill_(10.0)
    to_data.std.fill_(2.0)
    flow = rn.Flow(to_data.inv, base=rn.MixtureBase(2, num_components=3))
    refit(flow, (train, None, None), (apart, None, None), num_components=num_components, seed=0)
    base = flow.base()
    locs, probs = base.component_distribution.loc, base.mixture_distribution.probs
    assert len(locs) == expected and not flow.base.needs_data
    is_first = locs[:, 0] < 0
    torch.testing.assert_close(locs[is_first].sign().unique(), torch.tensor([-1.0]))
    assert probs[is_first].sum().item() == pytest.approx(2 / 3, abs=1e-3)
    mean = (probs[:, None] * locs).sum(0)
    torch.testing.assert_close(mean, (torch.cat([train, apart]).mean(0) - 10) / 2, rtol=0, atol=1e-3)


def test_the_size_of_a_mixture_stays_where_all_rows_would_be_counted_by_another_rule():
    train, apart = torch.randn(900, 2), torch.randn(100, 2)
    flow = rn.Flow(rn.Standardize(2), base=rn.MixtureBase(2, num_components=5))
    refit(flow, (train, None, None), (apart, None, None), num_components="auto", seed=0)
    assert flow.base.num_components == 5 and not flow.base.needs_data


def test_the_fading_noise_counts_rows_by_their_weights():
    x = torch.randn(4000, 2) * torch.tensor([1.0, 3.0])
    far, weights = torch.cat([x, 1e3 * x]), torch.cat([torch.ones(4000), torch.full((4000,), 1e-12)])
    flow = rn.Flow(rn.Compose([rn.real_nvp(2), rn.Standardize(2).inv]))
    columns = Columns("real", far.numpy())
    add = fading_noise(flow, columns, far, None, weights, 0.5, 10, torch.Generator().manual_seed(0))
    torch.testing.assert_close((add(x) - x).std(0), torch.tensor([0.5, 1.5]), rtol=0.1, atol=0)


def test_the_weights_of_rows_count_where_the_mixture_is_fitted_to_all_of_them():
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(200, 2) - 8, torch.randn(200, 2) + 8])
    weights = torch.cat([torch.full((200,), 3.0), torch.ones(200)])
    flow = rn.Flow(rn.Standardize(2), base=rn.MixtureBase(2, num_components=2))
    refit(flow, (rows[::2], None, weights[::2]), (rows[1::2], None, weights[1::2]), num_components="auto", seed=0)
    base = flow.base()
    first = base.mixture_distribution.probs[base.component_distribution.loc[:, 0] < 0].sum().item()
    assert first == pytest.approx(0.75, abs=0.06)  # 400 rows drawn by their weights: a deviation of 0.02


@pytest.mark.slow
@table(
    ("support", "low", "high"),
    {
        "real": ("real", -9, 9),
        "positive": ("positive", 0, 40),
        "by column": ([(0, 1), (-1, None)], (0, -1), (1, 40)),
        "upper bound of one": ({1: (None, 2)}, (-9, -40), (9, 2)),
    },
)
def test_densities_integrate_to_one(support, low, high):
    low, high = np.broadcast_to(low, 2), np.broadcast_to(high, 2)
    start, end = np.maximum(low, -1.5), np.minimum(high, 1.5)
    data = start + (end - start) * RNG.beta(2, 2, size=(300, 2))
    density = small(support=support).fit(data)
    edges = [np.linspace(a, b, 1501) for a, b in zip(low, high)]
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    grid = np.stack(np.meshgrid(*middles, indexing="ij"), -1).reshape(-1, 2)
    cell = np.prod([edge[1] - edge[0] for edge in edges])
    assert np.exp(density.score_samples(grid)).sum() * cell == pytest.approx(1, abs=5e-3)


@pytest.mark.slow
def test_one_column_is_a_spline():
    data = np.concatenate([RNG.normal(-2, 0.3, 500), RNG.normal(2, 0.3, 500)])[:, None]
    density = small(num_steps=600).fit(data)
    grid = np.linspace(-6, 6, 2000)[:, None]
    truth = np.logaddexp(stats.norm(-2, 0.3).logpdf(grid), stats.norm(2, 0.3).logpdf(grid)) - np.log(2)
    p = np.exp(density.score_samples(grid))
    assert p.sum() * (grid[1, 0] - grid[0, 0]) == pytest.approx(1, abs=1e-3)
    assert np.abs(p - np.exp(truth[:, 0])).mean() < 0.03
    assert density.sample(7).shape == (7, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2])
def test_a_conditional_density(dim):
    context = RNG.normal(3, 10, size=(1000, 2))
    data = 0.5 * context[:, :1] + RNG.normal(0, 0.2, size=(1000, dim))
    density = small(num_steps=600, noise=0.1).fit(data, context=context)
    test_context = RNG.normal(3, 10, size=(500, 2))
    test_data = 0.5 * test_context[:, :1] + RNG.normal(0, 0.2, size=(500, dim))
    entropy = dim * stats.norm(0, 0.2).entropy()
    assert density.score(test_data, context=test_context) == pytest.approx(-entropy, abs=0.25)
    assert density.sample(400, context=[[20.0, 0.0]]).mean() == pytest.approx(10, abs=0.3)
    draws = density.sample(3, context=[[20.0, 0.0], [-20.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(draws.mean(1), [10, -10, 0], atol=1.0)


@pytest.mark.slow
def test_weights_are_those_of_the_rows():
    """The left half of the rows has weight zero."""
    data = np.concatenate([RNG.normal(-5, 1, size=(300, 2)), RNG.normal(5, 1, size=(300, 2))])
    weights = np.repeat([0.0, 2.0], 300)
    density = small(num_steps=200).fit(data, sample_weight=weights)
    np.testing.assert_allclose(density.sample(1000, random_state=0).mean(0), 5, atol=0.4)
    assert density.score(data, sample_weight=weights) == pytest.approx(density.score(data[300:]))
    np.testing.assert_allclose(density.flow_.bijection.parts[1].inv.mean, 5, atol=0.2)
    thrice = small(num_steps=200).fit(data[300:], sample_weight=np.repeat([1.0, 3.0], 150))
    assert thrice.score(data[450:]) > thrice.score(data[300:450]) - 0.5


# -- supports --------------------------------------------------------------------------------------------------------


def test_nothing_is_outside_of_the_support():
    data = np.stack([RNG.exponential(size=300), RNG.uniform(2, 3, 300), RNG.normal(size=300)], 1)
    density = small(support=["positive", (2, 3), "real"]).fit(data)
    samples = density.sample(2000, random_state=0)
    assert (samples[:, 0] > 0).all()
    assert ((samples[:, 1] > 2) & (samples[:, 1] < 3)).all()
    scores = density.score_samples([[1.0, 2.5, 0.0], [-1.0, 2.5, 0.0], [1.0, 3.0, 0.0], [0.0, 2.5, 0.0]])
    assert np.isfinite(scores).tolist() == [True, False, False, False]
    assert (scores[1:] == -np.inf).all()
    assert density.score_samples(data[:1] - 1000).tolist() == [-np.inf]


def test_samples_at_the_edge_of_the_support_are_inside():
    data = np.clip(RNG.beta(0.3, 0.3, size=(500, 2)), 1e-6, 1 - 1e-6).astype(np.float32)
    density = small(support=(0, 1), num_steps=100).fit(data)
    assert density.history_.skipped_steps == 0
    samples = density.sample(5000, random_state=0)
    assert ((samples > 0) & (samples < 1)).all()
    assert np.isfinite(density.score_samples(samples)).all()


def test_a_constant_context_column_has_no_say():
    context = np.column_stack([RNG.normal(size=300), np.full(300, 0.1)])
    density = small().fit(X, context=context)
    assert density.context_scaler_.scale_[1] == 1
    assert density.score(X, context=context + [0, 1e-6]) == pytest.approx(density.score(X, context=context), abs=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_contexts_keep_their_own_precision(dtype):
    """Seconds since 1970, of which float32 knows every 128th."""
    seconds = 1.7e9 + RNG.uniform(0, 60, (1000, 1))
    data = ((seconds - 1.7e9) / 60 + RNG.normal(0, 0.05, (1000, 1))).astype(dtype)
    density = small(num_steps=300).fit(data, context=seconds)
    assert density.sample(500, context=[[1.7e9 + 6]], random_state=0).mean() == pytest.approx(0.1, abs=0.05)
    assert density.sample(context=seconds).dtype == dtype


def test_contexts_by_the_names_of_columns():
    frame = pandas.DataFrame({"a": RNG.normal(size=300), "b": RNG.normal(size=300)})
    density = small(num_steps=20).fit(X, context=frame)
    swapped = frame[["b", "a"]]
    for call in (
        lambda: density.score_samples(X, context=swapped),
        lambda: density.sample(context=swapped),
        lambda: density.score(X, context=frame.rename(columns={"a": "c"})),
    ):
        with pytest.raises(ValueError, match="feature names"):
            call()


@pytest.mark.parametrize("scale", [2.0**-600, 2.0**600])
def test_a_scale_whose_square_is_no_number(scale):
    scores = [small(num_steps=20).fit(rows).score_samples(rows[:9]) for rows in (X, scale * X)]
    np.testing.assert_allclose(scores[1], scores[0] - 2 * np.log(scale), atol=1e-6)


def test_rows_without_weight_may_be_anything():
    data, weights = np.abs(X), np.ones(300)
    data[0], weights[0] = -1, 0
    assert np.isfinite(small(support="positive").fit(data, sample_weight=weights).score(data, sample_weight=weights))


def test_supports_by_the_names_of_columns():
    frame = pandas.DataFrame(
        {"age": RNG.exponential(size=100), "share": RNG.uniform(size=100), "z": RNG.normal(size=100)}
    )
    density = small(support={"age": "positive", "share": (0, 1)}).fit(frame)
    assert density.feature_names_in_.tolist() == ["age", "share", "z"]
    assert density.columns_.low.tolist() == [0, 0, -np.inf]
    assert density.columns_.high.tolist() == [np.inf, 1, np.inf]
    assert density.score_samples(frame).shape == (100,)
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame[["z", "age", "share"]])


def test_supports_by_the_numbers_that_label_columns():
    frame = pandas.DataFrame({2: RNG.normal(size=100), 0: RNG.exponential(size=100)})
    assert small(support={0: "positive"}).fit(frame).columns_.low.tolist() == [-np.inf, 0]
    with pytest.raises(ValueError, match=r"expected support to name columns of \[2, 0\]; got 1"):
        small(support={1: "positive"}).fit(frame)


@table(
    ("support", "message"),
    {
        "rows outside": (
            "positive",
            r"300 of 300 rows of X lie outside of the support, such as \[.*\]: pass another support=",
        ),
        "too few": (["real"], "a support for each of the 2 columns; got 1"),
        "unknown name": ("natural", "expected 'real', 'positive', 'integer', .* got 'natural'"),
        "triple": ([(0, 1, 2), "real"], r"got \(0, 1, 2\)"),
        "empty interval": ((3, 1), "exchange or widen"),
        "name without names": ({"age": "positive"}, "name columns of 2; got 'age'"),
        "column too high": ({2: "positive"}, "got 2"),
    },
)
def test_bad_supports(support, message):
    with pytest.raises(ValueError, match=message):
        small(support=support).fit(X)


# -- scikit-learn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_is_that_of_the_rows(dtype):
    density = small().fit(X.astype(dtype))
    assert density.score_samples(X).dtype == density.sample(2).dtype == dtype
    assert next(density.flow_.parameters()).dtype == getattr(torch, np.dtype(dtype).name)


def test_random_state_decides_everything_and_nothing_else_is_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = small().fit(X), small().fit(X), small(random_state=1).fit(X)
    np.testing.assert_array_equal(first.score_samples(X), second.score_samples(X))
    assert (first.score_samples(X) != other.score_samples(X)).any()
    np.testing.assert_array_equal(first.sample(5, random_state=3), second.sample(5, random_state=3))
    assert (first.sample(5, random_state=3) != first.sample(5, random_state=4)).any()
    assert (first.sample(5) != first.sample(5)).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_copies(tmp_path):
    density = small().fit(X)
    joblib.dump(density, tmp_path / "density.joblib")
    for copy in (pickle.loads(pickle.dumps(density)), joblib.load(tmp_path / "density.joblib")):
        np.testing.assert_array_equal(copy.score_samples(X), density.score_samples(X))
    assert not hasattr(clone(density), "flow_")


@pytest.mark.slow
def test_pipelines_and_searches():
    iris = load_iris().data
    pipeline = make_pipeline(StandardScaler(), PCA(2), small()).fit(iris)
    assert pipeline.score_samples(iris).shape == (150,)
    search = GridSearchCV(small(), {"lr": [1e-6, 1e-2], "num_couplings": [2, 4]}, cv=2).fit(X)
    assert search.best_params_["lr"] == 1e-2
    assert search.best_estimator_.score(X) == pytest.approx(search.score(X))
    assert cross_val_score(small(), X, cv=3).shape == (3,)


def test_contexts_are_routed():
    context = RNG.normal(size=(300, 2))
    with sklearn.config_context(enable_metadata_routing=True):
        density = small().set_fit_request(context=True).set_score_request(context=True)
        search = GridSearchCV(density, {"num_couplings": [2, 4]}, cv=2).fit(X, context=context)
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_search_without_routing_says_how_to_switch_it_on():
    search = GridSearchCV(small(num_steps=3), {"num_couplings": [2]}, cv=2)
    with pytest.warns(UserWarning) as record:
        search.fit(X, context=RNG.normal(size=(300, 2)))
    assert any("sklearn.set_config(enable_metadata_routing=True)" in str(one.message) for one in record)


def test_a_density_behind_a_scaler():
    """The recipes of docs/training.md for samples and scores in the units of X, with and without a context."""
    pipeline = make_pipeline(StandardScaler(), small()).fit(X)
    rows = pipeline[:-1].inverse_transform(pipeline[-1].sample(2000, random_state=0))
    np.testing.assert_allclose(rows.mean(0), X.mean(0), atol=0.5 * X.std(0).max())
    assert rows.std(0) == pytest.approx(X.std(0), rel=0.3)
    scores = pipeline.score_samples(X) - np.log(pipeline[0].scale_).sum()
    truth = stats.multivariate_normal(X.mean(0), np.cov(X.T)).logpdf(X)
    assert scores.mean() == pytest.approx(truth.mean(), abs=0.5)

    context = RNG.normal(size=(300, 1))
    pipeline = make_pipeline(StandardScaler(), small()).fit(X, realnvpdensity__context=context)
    scores = pipeline[-1].score_samples(pipeline[:-1].transform(X), context=context)
    assert scores.shape == (300,) and np.isfinite(scores).all()


def test_the_flow_is_an_ordinary_one():
    density = small().fit(X)
    with torch.no_grad():
        log_prob = density.flow_().log_prob(torch.from_numpy(X))
    np.testing.assert_allclose(density.score_samples(X), log_prob, rtol=1e-6)
    assert density.history_.stopped == "finished"
    assert len(density.history_.loss) == 50


def test_verbose_shows_a_bar(capsys):
    small(verbose=True).fit(X)
    assert "50/50" in capsys.readouterr().err
    small().fit(X)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_noise_helps_where_rows_are_few():
    points = make_moons(60, noise=0.1, random_state=0)[0]
    test = make_moons(2000, noise=0.1, random_state=1)[0]
    options = {"num_steps": 500, "validation": 0, "num_couplings": 8, "hidden_dims": (32,)}
    assert small(**options, noise=0.3).fit(points).score(test) > small(**options, noise=0).fit(points).score(test)


@table(
    ("call", "message"),
    {
        "two rows": (lambda d: d.fit(X[:2]), "minimum of 3"),
        "nan": (lambda d: d.fit(np.full((10, 2), np.nan)), "NaN"),
        "constant column": (lambda d: d.fit(np.c_[X, np.ones(300)]), r"columns \[2\] are constant"),
        "negative weights": (lambda d: d.fit(X, sample_weight=-np.ones(300)), "[Nn]egative"),
        "zero weights": (lambda d: d.fit(X, sample_weight=np.zeros(300)), "weights"),
        "context rows": (lambda d: d.fit(X, context=np.ones((10, 2))), "inconsistent numbers"),
        "context inf": (lambda d: d.fit(X, context=np.full((300, 2), np.inf)), "context contains infinity"),
        "unwanted context": (lambda d: d.fit(X).score_samples(X, context=X), "context of no columns, as in fit; got 2"),
        "no context": (lambda d: d.fit(X, context=X**2).score_samples(X), "context of 2 columns, as in fit; got none"),
        "no context to sample": (
            lambda d: d.fit(X, context=X**2).sample(3),
            "context of 2 columns, as in fit; got none",
        ),
        "context too large": (
            lambda d: d.fit(X.astype(np.float32), context=X**2).score_samples(X, context=np.full(X.shape, 1e300)),
            "expected contexts that float32 holds",
        ),
        "no samples": (lambda d: d.fit(X).sample(0), "n_samples >= 1"),
        "samples of a float": (lambda d: d.fit(X).sample(2.0), "whole number n_samples >= 1; got 2.0"),
        "negative part": (lambda d: d.set_params(validation=-0.1).fit(X), "validation from 0 to 1"),
        "negative noise": (lambda d: d.set_params(noise=-1).fit(X), "noise >= 0"),
        "all held out": (lambda d: d.set_params(validation=1.0).fit(X), "two rows"),
    },
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    density = small(device="cuda").fit(X)
    assert next(density.flow_.parameters()).is_cuda
    assert density.sample(5).shape == (5, 2)
    assert density.score(X) == pytest.approx(small().fit(X).score(X), abs=0.5)


def test_a_narrow_direction_is_found():
    random = np.random.default_rng(0)
    a = random.normal(size=(2000, 1))
    X = np.c_[a, a + 1e-4 * random.normal(size=(2000, 1))]
    exact = -np.log(2 * np.pi) - 1 - np.log(1e-4)
    density = rn.RealNVPDensity(num_steps=100, random_state=0).fit(X)
    assert density.score(X) == pytest.approx(exact, abs=0.1)
    assert np.abs(np.diff(density.sample(1000, random_state=0), axis=1)).std() < 2e-4


@pytest.mark.parametrize("given", ["column", "context"])
@pytest.mark.parametrize(
    "dtype, spread, noise", [("float64", 1e8, 1.0), ("float64", 1e8, 1e-3), ("float32", 1.0, 1e-5)]
)
@pytest.mark.filterwarnings("ignore:column 1 is a copy of column 0 up to:RuntimeWarning")
def test_a_difference_far_below_the_spread(given, dtype, spread, noise):
    """As the seconds between two times: below 1e-6 of the spread it was lost, with ten nats."""
    rng = np.random.default_rng(0)
    begin = 17 * spread * (dtype == "float64") + spread * rng.normal(size=(1000, 1))
    end = (begin + noise * rng.normal(size=begin.shape)).astype(dtype)
    begin = begin.astype(dtype)
    X, context = (np.hstack([begin, end]), None) if given == "column" else (end, begin)
    density = small_density(noise=0.0).fit(X, context=context)
    exact = -0.5 * math.log(2 * math.pi * math.e) * X.shape[1] - math.log(noise)
    exact -= math.log(spread) if given == "column" else 0
    assert density.score(X, context=context) == pytest.approx(exact, abs=0.2)


def test_columns_that_follow_from_the_context_are_named():
    C = np.random.default_rng(0).normal(size=(100, 2))
    X = np.c_[np.random.default_rng(1).normal(size=100), 3 * C[:, 0] - C[:, 1] + 5]
    with pytest.warns(RuntimeWarning, match=r"columns \[1\] of X follow from the context"):
        small_density().fit(X, context=C)


def test_extreme_held_out_rows_have_the_numbers_of_the_rows_of_X():
    X, numbers = np.random.default_rng(0).normal(size=(200, 2)), []
    X[[5, 80, 137]] = [[300, -300], [-300, 300], [300, 300]]  # too many to be left out of the scales
    for seed in range(10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small_density(random_state=seed, validation=0.3).fit(X)
        texts = [str(w.message) for w in caught if str(w.message).startswith("the held-out rows")]
        numbers += [int(k) for text in texts for k in re.search(r"rows \[(.*?)\]", text)[1].split(",")]
    assert numbers and set(numbers) <= {5, 80, 137}


def test_threads_give_the_same_fit_and_leave_the_callers_generator_alone():
    X = load_iris().data
    density = rn.RealNVPDensity(num_steps=20, num_couplings=2, random_state=0)
    alone = cross_val_score(density, X, cv=4)
    torch.manual_seed(0)
    with joblib.parallel_backend("threading", n_jobs=4):
        together = cross_val_score(density, X, cv=4)
    assert np.array_equal(alone, together)
    drawn = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3), drawn)


@pytest.mark.parametrize("where", ["rows", "contexts", "positive"])
def test_a_few_extreme_rows_do_not_set_the_scales(where):
    """A fill value for a context made the estimator ignore the contexts, and one in X cost three nats."""
    rng = np.random.default_rng(0)

    def draw(num):
        c = rng.normal(size=(num, 1))
        return np.hstack([c + 0.1 * rng.normal(size=(num, 1)), rng.normal(size=(num, 1))]), c

    (X, C), (test, test_C) = draw(600), draw(2000)
    entropy = 1 + math.log(2 * math.pi) + math.log(0.1)
    density = rn.RealNVPDensity(num_couplings=4, num_steps=400, random_state=0)
    if where == "positive":  # in whose coordinates the row is an ordinary one
        density.set_params(support={1: "positive"})
        X[:, 1], test[:, 1] = np.exp(X[:, 1]), np.exp(test[:, 1])
        X[7, 1] = 1e2
        density.fit(X, context=C)
    else:
        (C if where == "contexts" else X)[7, 0] = 1e6
        with pytest.warns(RuntimeWarning, match=f"1 of .* rows of {'context' if where == 'contexts' else 'X'} hold"):
            density.fit(X, context=C)
    # A row that is far away takes most of the steps in which it is met.
    assert density.score(test, context=test_C) > -entropy - (1.5 if where == "rows" else 0.15)


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_a_density_that_is_narrow_given_its_context(noise):
    """As that of a simulator's outputs given its inputs: three nats were lost in 2000 steps."""
    rng = np.random.default_rng(0)
    directions = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]])

    def draw(num):
        C = rng.normal(size=(num, 3)) * [1, 1e-3, 100] + [5, 0, 0]
        X = C / [1, 1e-3, 100] @ directions
        return X + noise * rng.standard_t(5, size=X.shape), C

    (X, C), (test, test_C) = draw(600), draw(2000)
    density = rn.RealNVPDensity(num_couplings=4, num_steps=300, random_state=0).fit(X, context=C)
    truth = stats.t.logpdf((test - test_C / [1, 1e-3, 100] @ directions) / noise, 5).sum(1).mean() - 2 * np.log(noise)
    assert density.score(test, context=test_C) > truth - 0.2
    samples = density.sample(2000, context=test_C, random_state=0)
    residuals = samples - test_C / [1, 1e-3, 100] @ directions
    np.testing.assert_allclose(residuals.std(0), noise * np.sqrt(5 / 3), rtol=0.15)


@pytest.mark.parametrize("wrong", [-999.0, 1e6])
@pytest.mark.filterwarnings("ignore:.* of context hold values that are far:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.* steps had a loss:RuntimeWarning", "ignore:the held-out rows:RuntimeWarning")
def test_a_wrong_context_does_not_decide_the_regression(wrong):
    rng = np.random.default_rng(0)
    C = rng.normal(size=(600, 1))
    X = 3 * C + 0.01 * rng.normal(size=(600, 1))
    C[7] = wrong
    density, others = rn.RealNVPDensity(num_steps=20, random_state=0), np.arange(600) != 7
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.01)
    assert density.fit(X, context=C).score(X[others], context=C[others]) == pytest.approx(-entropy, abs=0.1)


def test_a_rare_class_with_much_noise_counts():
    """A regression that leaves out its residuals fixed a scale at which the class lay 600 deviations away."""
    rng = np.random.default_rng(0)
    y = rng.choice(3, 3000, p=[0.6, 0.395, 0.005])
    X = (np.array([0.0, 5.0, -3.0])[y] + np.array([0.1, 0.1, 60.0])[y] * rng.normal(size=3000))[:, None]
    density = rn.RealNVPDensity(num_steps=300, random_state=0).fit(X, context=np.eye(3)[y])
    assert density.score(X, context=np.eye(3)[y]) > 0.5


def test_contexts_of_rows_without_weight_do_not_decide_which_are_extreme():
    rng = np.random.default_rng(0)
    X, C = rng.normal(size=(1025, 2)), rng.normal(size=(1025, 1))
    C[1000:] += 1000
    density = rn.RealNVPDensity(num_steps=3, num_couplings=2, random_state=0)
    density.fit(X, context=C, sample_weight=(np.arange(1025) >= 1000).astype(float))
    assert density.context_scaler_.mean_[0] == pytest.approx(1000, abs=1)


def test_the_scale_of_large_weights_does_not_matter():
    """Sums of their squares overflowed in float32."""
    X = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    one, other = (
        rn.RealNVPDensity(num_steps=5, random_state=0).fit(X, sample_weight=np.full(100, w)).score(X)
        for w in (1.0, 1e30)
    )
    assert one == pytest.approx(other)


def test_a_refit_forgets_the_context():
    density = small().fit(X, context=X**2)
    density.fit(X)
    assert density.n_context_in_ == 0 and not hasattr(density, "context_scaler_")


def test_clusters_of_which_the_context_says_little():
    """The mixture from which the flow starts reads no context; it was kept, as if the context said nothing."""
    rng = np.random.default_rng(1)

    def draw(num):
        c, which = rng.normal(size=(num, 1)), rng.choice([-6, 6], num)
        x = which + 0.7 * c[:, 0] + rng.normal(size=num)
        pieces = [stats.norm.logpdf(x, piece + 0.7 * c[:, 0]) for piece in (-6, 6)]
        y = rng.normal(size=num)
        return np.stack([x, y], 1), c, np.logaddexp(*pieces) - np.log(2) + stats.norm.logpdf(y)

    X, c, _ = draw(400)
    density = rn.RealNVPDensity(num_steps=250, num_couplings=4, random_state=1).fit(X, context=c)
    X, c, log_p = draw(2000)
    assert (log_p - density.score_samples(X, context=c)).mean() < 0.1  # and 0.2 without the context


@pytest.mark.parametrize("after", [30, 60])
def test_an_interrupt_reaches_the_caller_and_loses_nothing(monkeypatch, after):
    """A search went on, and compared a training that was cut off with others."""
    X = np.concatenate([RNG.normal(-4, 1, (100, 2)), RNG.normal(4, 1, (100, 2))])
    interrupt_after(monkeypatch, after)
    density = small(num_steps=40)
    with pytest.raises(KeyboardInterrupt):
        density.fit(X)
    assert len(density.history_.loss) in (30, 40, 20) and np.isfinite(density.score(X))


@pytest.mark.filterwarnings("ignore:the held-out rows")
def test_heavy_tails_of_many_rows():
    """From 1000 rows on, the flow started as one normal, whose tails it kept: 1.67 nats worse than with fewer rows."""
    draws = stats.t(1.5)
    X, test = draws.rvs((1200, 1), random_state=0), draws.rvs((5000, 1), random_state=1)
    density = rn.RealNVPDensity(num_steps=300, random_state=0).fit(X)
    assert draws.logpdf(test).mean() - density.score(test) < 0.15


def test_a_refit_keeps_the_rule_of_the_mixture():
    """The rows are heavy-tailed, and their logarithms, of which the mixture is made, are not."""
    rng = np.random.default_rng(0)

    def draw(num):
        scale = np.where(rng.random(num) < 0.75, 0.25, 1.2)
        return np.exp(scale[:, None] * rng.normal(size=(num, 2)))

    density = rn.RealNVPDensity(support="positive", num_steps=10, random_state=0).fit(draw(1080))
    assert density.score(draw(4000)) > -1.4
