# SPDX-License-Identifier: Apache-2.0
"""AutoRealNVP against known posteriors, and everything that users do with a guide."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import YEAR, Y, count_evaluations, fitted, table, two_modes, uncentered
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    init_to_value,
)
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp.inference.base import GuideBase


def test_an_uncentered_regression_with_defaults():
    design = torch.stack([torch.ones(60), YEAR], 1).double()
    precision = design.T @ design / 0.25 + torch.diag(torch.tensor([1e-6, 1e-4], dtype=torch.float64))
    mean = torch.linalg.solve(precision, design.T @ Y.double() / 0.25)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    guide = rn.AutoRealNVP(uncentered)
    rn.fit_guide(guide, YEAR, Y, num_steps=200, progress=False)
    draws = guide.sample(20_000)
    for k, name in enumerate("ab"):
        assert abs(draws[name].double().mean() - mean[k]) < 0.02 * sd[k]
        assert abs(draws[name].double().std() / sd[k] - 1) < 0.02


@pytest.mark.slow
def test_trap_1_a_tight_posterior_through_two_supports():
    def model():
        pyro.sample("free", dist.Normal(torch.full((4,), 5.0), 0.1).to_event(1))
        pyro.sample("positive", dist.LogNormal(torch.full((4,), 5.0), 0.1).to_event(1))

    draws = fitted(model).sample(20_000)
    for values in (draws["free"], draws["positive"].log()):
        torch.testing.assert_close(values.mean(0), torch.full((4,), 5.0), rtol=0.02, atol=0)
        torch.testing.assert_close(values.std(0), torch.full((4,), 0.1), rtol=0.02, atol=0)


def correlated(dim=10):
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    covariance = root @ root.T / dim + 0.05 * torch.eye(dim)

    def model():
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(dim), covariance))
        pyro.sample("y", dist.MultivariateNormal(z, 0.5 * torch.eye(dim)), obs=torch.ones(dim))

    evidence = dist.MultivariateNormal(torch.zeros(dim), covariance + 0.5 * torch.eye(dim)).log_prob(torch.ones(dim))
    return model, evidence.item()


def test_the_elbo_reaches_the_known_evidence():
    model, evidence = correlated()
    report = rn.diagnose(fitted(model, num_steps=100))
    assert report.elbo == pytest.approx(evidence, abs=0.02)
    assert report.log_evidence == pytest.approx(evidence, abs=0.02)
    assert "good" in str(report)


@pytest.mark.slow
def test_a_mixture():
    guide = fitted(two_modes, num_steps=600)
    report = rn.diagnose(guide)
    assert report.log_evidence == pytest.approx(0.0, abs=0.03) and report.elbo > -0.1
    left = (guide.sample(4000)["z"][:, 0] < 0).float().mean()
    exact = 0.3 * 0.97725 + 0.7 * 0.02275
    assert left == pytest.approx(exact, abs=0.06)


@pytest.mark.slow
def test_a_dirichlet_site_and_a_single_dimension():
    counts = torch.tensor([3.0, 2.0, 5.0])

    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("n", dist.Multinomial(10, p), obs=counts)

    exact = dist.Dirichlet(torch.tensor([4.0, 4.0, 8.0]))
    draws = fitted(model, num_steps=100).sample(10_000)["p"]
    torch.testing.assert_close(draws.mean(0), exact.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.var(0).sqrt(), exact.variance.sqrt(), atol=0.01, rtol=0)

    def skewed():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    guide = fitted(skewed, num_steps=500)
    draws = guide.sample(20_000)["z"]
    assert draws.mean() == pytest.approx(2.0, abs=0.06) and draws.std() == pytest.approx(2**0.5, abs=0.08)
    assert guide.latent_dim == 1


def nested(x):
    """A model with nested plates, whose posteriors are all normal and known."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        group = pyro.sample("group", dist.Normal(mu, 1.0))
        with pyro.plate("rows", 4, dim=-1):
            row = pyro.sample("row", dist.Normal(group, 1.0))
            pyro.sample("x", dist.Normal(row, 1.0), obs=x)


@pytest.mark.slow
def test_nested_plates_site_by_site():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    design = torch.zeros(16, 16)  # precision of (mu, group, row)
    design[0, 0] = 1 + 3
    rhs = torch.zeros(16)
    for g in range(3):
        design[1 + g, 1 + g] = 1 + 4
        design[0, 1 + g] = design[1 + g, 0] = -1
        for r in range(4):
            k = 4 + 4 * g + r
            design[k, k] = 2
            design[k, 1 + g] = design[1 + g, k] = -1
            rhs[k] = x[g, r]
    covariance = torch.linalg.inv(design)
    mean = covariance @ rhs
    guide = fitted(nested, x, num_steps=100)
    draws = guide.sample(20_000)
    assert {name: tuple(v.shape[1:]) for name, v in draws.items()} == {"mu": (), "group": (3, 1), "row": (3, 4)}
    flat = torch.cat([draws[name].reshape(20_000, -1) for name in ("mu", "group", "row")], 1)
    torch.testing.assert_close(flat.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(flat.std(0), covariance.diagonal().sqrt(), atol=0.02, rtol=0)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(elbo.loss(nested, guide, x))


@pytest.mark.slow
def test_flat_and_masked_priors():
    def model(y):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        scale = pyro.sample("scale", dist.HalfNormal(1.0).mask(False))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = 3 + 2 * torch.randn(100)
    draws = fitted(model, y, num_steps=100).sample(5000)
    assert draws["loc"].mean() == pytest.approx(y.mean().item(), abs=0.03)
    assert draws["scale"].median() == pytest.approx(y.std().item(), abs=0.05)


@pytest.mark.slow
def test_a_trap_of_a_mode_loses_to_an_earlier_point():
    """The density of eight schools is unbounded in the neck of its funnel."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    start = rn.AutoRealNVP(model).build().sample(1000)
    assert start["tau"].median() > 0.3 and start["theta"].std(0).min() > 1.0


def test_starts_where_it_is_told():
    values = {"a": torch.tensor(3.0), "b": torch.tensor(-2.0)}
    guide = rn.AutoRealNVP(
        uncentered, init_loc_fn=init_to_value(values=values), init_scale=0.01, warm_start=False
    ).build(YEAR, Y)
    draws = guide.sample(2000)
    for name, value in values.items():
        assert draws[name].mean() == pytest.approx(value.item(), abs=0.001)
        assert draws[name].std() == pytest.approx(0.01, rel=0.1)
    for full in (False, True):
        assert rn.AutoRealNVP(uncentered, full=full).build(YEAR, Y).sample(10)["a"].isfinite().all()


def test_median_and_quantiles():
    guide = fitted(uncentered, YEAR, Y, num_steps=20)
    median, (low, high) = guide.median(), guide.quantiles([0.05, 0.95])["a"]
    assert set(median) == {"a", "b"} and low < median["a"] < high


@pytest.mark.parametrize("make", [Trace_ELBO, JitTrace_ELBO])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_pyros_svi(make):
    guide = rn.AutoRealNVP(uncentered, num_couplings=2)
    svi = SVI(uncentered, guide, pyro.optim.Adam({"lr": 1e-3}), make(num_particles=2))
    losses = [svi.step(YEAR, Y) for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert guide.is_trained


def test_disabled_gradients_are_named():
    guide = fitted(two_modes, num_steps=2)
    for function in (rn.fit_guide, rn.neutra):
        for off in (torch.no_grad, torch.inference_mode):
            with off(), pytest.raises(RuntimeError, match=f"{function.__name__} needs gradients, which are disabled"):
                function(guide, progress=False)


def test_a_guide_whose_names_belong_to_other_tensors():
    """As where a cell of a notebook is run again."""

    def make():
        flow = rn.Flow(rn.real_nvp(3, num_couplings=2))

        def guide():
            pyro.module("flow", flow)
            pyro.sample("z", flow())

        return guide

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    rn.fit_guide(make(), model=model, num_steps=1, progress=False)
    with pytest.raises(RuntimeError, match=r"none of the 12 parameters.*clear_param_store"):
        rn.fit_guide(make(), model=model, num_steps=1, progress=False)


def test_a_second_guide_does_not_get_the_parameters_of_the_first():
    first = fitted(uncentered, YEAR, Y, num_steps=20)
    second = rn.AutoRealNVP(uncentered, num_couplings=4)
    history = rn.fit_guide(second, YEAR, Y, num_steps=20, progress=False)
    assert second.is_trained and history.best_loss < math.inf
    ours, theirs = set(first.parameters()), set(second.parameters())
    assert not ours & theirs


def test_a_frozen_guide_draws_without_a_warning():
    guide = fitted(two_modes, num_steps=2).requires_grad_(False)
    guide.transform.parts[1].requires_grad_(True)
    pyro.clear_param_store()
    assert guide()["z"].shape == rn.diagnose(guide, num_samples=100).draws["z"][0].shape
    store = pyro.get_param_store()
    assert all((store.param_name(p) is not None) == p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("as_file", [False, True])
def test_the_best_state_of_the_store_comes_back(as_file, tmp_path):
    """The store holds other tensors after it, and the guide then kept its own, which no optimizer knew."""
    guide = rn.AutoRealNVP(two_modes, num_couplings=4, hidden_dims=(8,)).build()
    svi = pyro.infer.SVI(two_modes, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    store = pyro.get_param_store()
    svi.step()
    best, before = copy.deepcopy(store.get_state()), [p.detach().clone() for p in guide.parameters()]
    store.save(str(tmp_path / "store"))
    for p in guide.parameters():
        p.data.add_(1.0)
    if as_file:
        store.load(str(tmp_path / "store"))
    else:
        store.set_state(best)
    guide()
    for p, expected in zip(guide.parameters(), before):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0)
    svi.step()
    assert any(not torch.equal(p, expected) for p, expected in zip(guide.parameters(), before))


def test_a_frozen_guide_takes_what_the_store_has_loaded():
    guide = rn.AutoRealNVP(two_modes, num_couplings=2, hidden_dims=(8,)).build()
    guide()
    store = pyro.get_param_store()
    best = copy.deepcopy(store.get_state())
    expected = [p.detach().clone() for p in guide.parameters()]
    for p in guide.parameters():
        p.data.add_(1.0)
    store.set_state(best)
    guide.requires_grad_(False)
    guide()
    for p, value in zip(guide.parameters(), expected):
        torch.testing.assert_close(p, value, rtol=0, atol=0)


def test_a_replaced_parameter_counts_and_a_lent_one_stays_as_it_is():
    guide = rn.AutoRealNVP(two_modes, num_couplings=2, hidden_dims=(8,)).build()
    guide()
    lent = {name: p.detach() + 0.3 for name, p in guide.named_parameters()}
    before = {name: p.clone() for name, p in lent.items()}
    torch.func.functional_call(guide, lent, ())
    assert all(torch.equal(lent[name], value) for name, value in before.items())
    affine = guide.transform.parts[-1]
    affine.loc = nn.Parameter(torch.full_like(affine.loc, 0.5))
    guide()
    assert (affine.loc == 0.5).all()
    assert pyro.get_param_store().param_name(affine.loc) is not None


def test_parameters_that_are_not_contiguous_are_trained():
    """Pyro's store kept a copy of them, which no optimizer of the guide's has seen."""

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    encoder = nn.Linear(3, 4)
    encoder.weight = nn.Parameter(torch.randn(3, 4).T)
    x, before = torch.randn(50, 3), encoder.weight.detach().clone()
    guide = rn.AmortizedRealNVP(model, encoder, context_dim=4)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    assert not torch.equal(encoder.weight, before)
    rn.fit_guide(guide, x, num_steps=3, progress=False)


def test_states_copies_and_pickles():
    guide = fitted(uncentered, YEAR, Y, num_steps=20)
    fresh = rn.AutoRealNVP(uncentered, num_couplings=4)
    with pytest.raises(RuntimeError, match=r"call guide.build\(\*args\) first"):
        fresh.load_state_dict(guide.state_dict())
    fresh.build(YEAR, Y).load_state_dict(guide.state_dict())
    clone = copy.deepcopy(guide)
    pickled = pickle.loads(pickle.dumps(guide))
    for other in (fresh, clone, pickled):
        torch.manual_seed(0)
        expected = guide.sample(5)
        torch.manual_seed(0)
        torch.testing.assert_close(other.sample(5), expected, rtol=0, atol=0)
    rn.fit_guide(clone, YEAR, Y, num_steps=2, progress=False)
    rn.fit_guide(guide, YEAR, Y, num_steps=2, progress=False)  # the guide has kept its model, though it was pickled
    with pytest.raises(RuntimeError, match="pass model="):
        rn.fit_guide(pickled, YEAR, Y, num_steps=2, progress=False)
    rn.fit_guide(pickled, YEAR, Y, model=uncentered, num_steps=2, progress=False)
    rn.fit_guide(pickled, YEAR, Y, num_steps=2, progress=False)  # it keeps the model that it was given


def test_an_average_of_buffers_stays_trained():
    guide = fitted(uncentered, YEAR, Y, num_steps=5)
    average = torch.optim.swa_utils.AveragedModel(guide, use_buffers=True)
    for _ in range(3):
        average.update_parameters(guide)
    assert average.module.is_trained
    torch.manual_seed(0)
    expected = guide.sample(5)
    torch.manual_seed(0)
    torch.testing.assert_close(average.module.sample(5), expected)


def test_double_precision():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    guide = fitted(model, num_steps=3)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide()["z"].dtype == torch.float64 and guide.get_base_dist().sample().dtype == torch.float64


def test_one_evaluation_for_any_number_of_particles():
    guide = rn.AutoRealNVP(uncentered, num_couplings=4).build(YEAR, Y)
    for num_particles in (1, 16):
        elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        evaluations = count_evaluations(guide, lambda elbo=elbo: elbo.loss_and_grads(uncentered, guide, YEAR, Y))
        assert evaluations == {1}


@pytest.mark.filterwarnings("ignore:the guide cannot be mapped")  # Pyro's spline branches on values
def test_guide_lists():
    guide = AutoGuideList(uncentered)
    guide.append(rn.AutoRealNVP(poutine.block(uncentered, expose=["a"]), warm_start=False))
    guide.append(AutoNormal(poutine.block(uncentered, expose=["b"])))
    rn.fit_guide(guide, YEAR, Y, model=uncentered, num_steps=3, progress=False)
    assert set(guide(YEAR, Y)) == {"a", "b"}


def subsampled(x):
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def not_finite():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(z > 100, 0.0, -torch.inf))


@pytest.mark.filterwarnings("ignore::UserWarning")
@table(
    ("make", "error", "message"),
    {
        "subsampled": (lambda: rn.AutoRealNVP(subsampled).build(None), ValueError, "Use AmortizedRealNVP"),
        "discrete": (lambda: rn.AutoRealNVP(discrete).build(), ValueError, "'k' is discrete.*config_enumerate"),
        "no sites": (lambda: rn.AutoRealNVP(lambda: None).build(), RuntimeError, "no latent variables"),
        "not finite": (
            lambda: rn.AutoRealNVP(not_finite).build(),
            ValueError,
            "not finite at the sites {'f'.*init_loc_fn",
        ),
        "scale zero": (lambda: rn.AutoRealNVP(uncentered, init_scale=0.0), ValueError, "init_scale > 0"),
        "posterior before build": (lambda: rn.AutoRealNVP(uncentered).get_posterior(), RuntimeError, "guide.build"),
        "median before build": (lambda: rn.AutoRealNVP(uncentered).median(), RuntimeError, "guide.build"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


class AutoShifted(GuideBase, AutoContinuous):
    """The guide of CONTRIBUTING: z = mu + epsilon, epsilon ~ N(0, 1)."""

    def make_parameters(self, args, kwargs):
        self.loc = torch.nn.Parameter(self._init_loc())

    def get_posterior(self, *args, **kwargs):
        return dist.Normal(self.loc, 1.0).to_event(1)


def test_a_guide_of_ones_own():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, 1.0]), 1.0).to_event(1))

    guide = AutoShifted(model)
    history = rn.fit_guide(guide, num_steps=200, progress=False)
    torch.testing.assert_close(guide.loc.detach(), torch.tensor([3.0, 1.0]), atol=0.1, rtol=0)
    assert abs(history.best_loss) < 0.01 and abs(rn.diagnose(guide).log_evidence) < 0.01
    clone = copy.deepcopy(guide)
    assert torch.equal(clone.loc, guide.loc) and clone.loc is not guide.loc


@pytest.mark.parametrize("make", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger])
@pytest.mark.parametrize("path_derivative", [False, True])
def test_guides_of_pyro_that_run_the_model(make, path_derivative):
    """Their traces hold the data, whose likelihood cancelled: the guide became the prior, with a log evidence of 0."""
    y = torch.tensor([1.0, 2.0, 0.5, -0.4])

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.deterministic("twice", 2 * z)
        pyro.factor("factor", torch.tensor(0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    pyro.clear_param_store()
    guide = make(model)
    rn.fit_guide(guide, y, num_steps=300, lr=0.03, path_derivative=path_derivative, progress=False, seed=0)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 4).log_prob(y).item() + 0.5
    report = rn.diagnose(guide, y)
    assert report.log_evidence == pytest.approx(exact, abs=0.01) and report.elbo == pytest.approx(exact, abs=0.02)


def test_an_easy_guide_knows_its_model():
    class Guide(EasyGuide):
        def guide(self):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.8**0.5))

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    pyro.clear_param_store()
    guide = Guide(model)
    rn.fit_guide(guide, num_steps=300, lr=0.03, progress=False, seed=0)
    exact = dist.Normal(0.0, 5**0.5).log_prob(torch.tensor(1.0)).item()
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.01)
