# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import fitted, table
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from pyro.infer.importance import psis_diagnostic

import pyro_realnvp as rn

ONES = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
RESPONSE = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.7 * torch.randn(30, generator=torch.Generator().manual_seed(1))


def test_diagnose_agrees_with_pyro_and_tells_good_from_poor():
    def wide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def narrow():
        pyro.sample("z", dist.Normal(0.0, 0.4))

    poor = rn.diagnose(narrow, model=wide, num_samples=4000)
    assert poor.pareto_k > 0.7 and "poor: train longer" in str(poor) == repr(poor)
    pyro.set_rng_seed(1)
    ours = rn.diagnose(narrow, model=wide, num_samples=2000)
    pyro.set_rng_seed(1)
    theirs = [float(psis_diagnostic(wide, narrow, num_particles=2000)) for _ in range(5)]
    assert min(theirs) - 0.3 < ours.pareto_k < max(theirs) + 0.3
    good = rn.diagnose(wide, model=wide)
    assert good.effective_sample_size == pytest.approx(2000) and good.log_evidence == pytest.approx(0.0, abs=1e-5)


def test_resampling_corrects_a_guide():
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    def guide():
        pyro.sample("z", dist.Normal(1.0, 1.5))

    report = rn.diagnose(guide, model=model, num_samples=20_000)
    draws = report.resample(20_000)["z"]
    assert draws.mean() == pytest.approx(2.0, abs=0.05) and draws.std() == pytest.approx(0.5**0.5, abs=0.03)
    exact = dist.Normal(1.0, 2**0.5).log_prob(torch.tensor(3.0)).item()
    assert abs(report.log_evidence - exact) < 4 * report.log_evidence_error


def of_a_mean():
    m = pyro.sample("m", dist.Normal(1.0, 2.0))
    with pyro.plate("rows", 30):
        pyro.sample("y", dist.Normal(m, 1.5), obs=RESPONSE)


def of_a_rate():
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("rows", len(ONES)):
        pyro.sample("y", dist.Bernoulli(p), obs=ONES)


def of_a_regression():
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", 30):
        pyro.sample("y", dist.Normal(X @ b, 0.7), obs=RESPONSE)


@pytest.mark.slow
@table(
    ("model", "evidence"),
    {
        "conjugate normal": (
            of_a_mean,
            dist.MultivariateNormal(torch.ones(30), 2.25 * torch.eye(30) + 4.0).log_prob(RESPONSE).item(),
        ),
        "beta and Bernoulli": (
            of_a_rate,
            (torch.lgamma(torch.tensor([7.0, 5.0, 5.0])) - torch.lgamma(torch.tensor([2.0, 3.0, 12.0]))).sum().item(),
        ),
        "linear regression": (
            of_a_regression,
            dist.MultivariateNormal(torch.zeros(30), 0.49 * torch.eye(30) + 4 * X @ X.T).log_prob(RESPONSE).item(),
        ),
    },
)
def test_the_evidence_of_models_that_have_a_known_one(model, evidence):
    report = rn.diagnose(fitted(model, num_steps=200), num_samples=10_000)
    assert report.log_evidence_error < 0.01
    assert abs(report.log_evidence - evidence) < 4 * report.log_evidence_error + 1e-3
    assert f"log evidence           {report.log_evidence:.3f} +- {report.log_evidence_error:.3f} nats" in str(report)


def test_a_heavy_tail_of_small_differences_is_called_good():
    log_weights = 1e-3 * torch.linspace(1e-3, 1, 4000).pow(-0.8).sort().values
    report = rn.Diagnosis(1.36, 0.0, 0.0, 0.0, 3990.0, log_weights, {})
    assert "1.36, the tail of small differences: good" in str(report)


def test_a_point_estimate_has_no_importance_weights():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def with_a_constant():
        model()
        pyro.sample("w", dist.Delta(torch.ones(2)).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 0.5**0.5))
        pyro.sample("w", dist.Delta(torch.ones(2)).to_event(1))

    for point in (AutoDelta(model), AutoLaplaceApproximation(model)):
        with pytest.raises(ValueError, match="the guide gives the site 'z' the same value in all 2000 draws"):
            rn.diagnose(point)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0)).item()
    assert rn.diagnose(guide, model=with_a_constant).log_evidence == pytest.approx(evidence, abs=1e-5)


def test_a_point_mass_in_a_part_of_the_latents():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("s", dist.Normal(z.sum(), 1.0))

    def one_entry():
        draw = pyro.sample("draw", dist.Normal(0.0, 1.0).expand([2]), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(torch.stack([draw[0], torch.tensor(0.3)])).to_event(1))
        pyro.sample("s", dist.Normal(0.0, 2.0))

    def determined(log_density):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        draw = dist.Normal(0.0, 2.0).rsample()
        s = z.sum() + (draw if log_density else 0.0)
        pyro.sample("s", dist.Delta(s, log_density=dist.Normal(z.sum(), 2.0).log_prob(s) if log_density else 0.0))

    with pytest.raises(ValueError, match="gives an entry of the site 'z' the same value in all 100 draws"):
        rn.diagnose(one_entry, model=model, num_samples=100)
    with pytest.raises(ValueError, match="have 3 coordinates, and the guide draws only 2; the others are functions"):
        rn.diagnose(partial(determined, False), model=model, num_samples=100)
    report = rn.diagnose(partial(determined, True), model=model)
    assert abs(report.log_evidence) < 4 * report.log_evidence_error
    with pytest.raises(ValueError, match="expected num_samples >= 2; got 1"):
        rn.diagnose(partial(determined, True), model=model, num_samples=1)


@pytest.mark.parametrize("block", [2, 3, 4, 7])
def test_all_rows_of_a_loop_that_shows_some_of_them(block):
    """The sites of a loop are named by their rows, so no row may come twice in a pass."""
    x = torch.linspace(-1.0, 3.0, 10)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for row in pyro.plate("rows", 10, subsample_size=block):
            pyro.sample(f"x{row}", dist.Normal(z, 1.0), obs=x[row])

    guide = rn.AutoRealNVP(model, num_couplings=2)
    covariance = torch.eye(10) + torch.ones(10, 10)
    evidence = dist.MultivariateNormal(torch.zeros(10), covariance).log_prob(x).item()
    assert rn.diagnose(guide, num_samples=200).log_evidence == pytest.approx(evidence, abs=0.02)


def test_a_subsampled_plate_inside_of_a_loop_over_a_subsample():
    x = torch.linspace(-1.0, 3.0, 24).reshape(4, 6)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for group in pyro.plate("groups", 4, subsample_size=2):
            with pyro.plate(f"rows{group}", 6, subsample_size=3) as rows:
                pyro.sample(f"x{group}", dist.Normal(z, 1.0), obs=x[group, rows])

    with pytest.raises(ValueError, match=r"plate 'rows\d' draws a subsample.* let all other plates show all"):
        rn.diagnose(rn.AutoRealNVP(model, num_couplings=2), num_samples=200)


@pytest.mark.parametrize("make", [AutoNormal, rn.AutoRealNVP])
def test_a_site_with_one_possible_value(make):
    """As the weights of a mixture of one component are, where evidences over the number of components are compared."""

    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(1)))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("rows", 5):
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
            pyro.sample("x", mixture, obs=torch.arange(5.0))

    guide = make(model)
    rn.fit_guide(guide, num_steps=300, seed=0, progress=False)
    covariance = torch.eye(5) + torch.ones(5, 5)
    evidence = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(torch.arange(5.0)).item()
    assert rn.diagnose(guide).log_evidence == pytest.approx(evidence, abs=0.2)


@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [
        (dist.Beta(0.1, 0.1), lambda z: dist.Bernoulli(z)),
        (dist.Uniform(-1e6, 1e6), lambda z: dist.Normal(z, 0.1)),
    ],
)
def test_latents_with_too_few_digits_are_named(prior, likelihood):
    """In single precision, a fifth of the mass lay within rounding of a bound, or all draws had eight values."""

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("y", likelihood(z), obs=torch.tensor(1.0))

    guide = rn.AutoRealNVP(model, num_couplings=4)
    rn.fit_guide(guide, num_steps=50, progress=False, seed=0)
    with pytest.warns(RuntimeWarning, match="draws of the latent 'z' gather at an end"):
        rn.diagnose(guide)


def hidden_by_obs_mask():
    with pyro.plate("rows", 2):
        mask = torch.ones(2, dtype=torch.bool)
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0), obs=torch.zeros(2), obs_mask=mask)


def hidden_by_mask():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("b", dist.Normal(0.0, 1.0))


def empty():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(0), 1.0).to_event(1))


def far_from_zero():
    """Some of 2000 draws are equal by chance, since the steps are a ten thousandth of the standard deviation."""
    a = pyro.sample("a", dist.Normal(2000.0, 10.0))
    pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(1995.0))


def correlations():
    """The diagonal is 1 up to rounding, and so is the last entry of a factor."""
    matrix = pyro.sample("matrix", dist.LKJ(3, 50.0))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 5000.0))
    pyro.factor("y", -(matrix[0, 1] ** 2) - factor[1, 0] ** 2)


@pytest.mark.filterwarnings("ignore:the model cannot be mapped")
@pytest.mark.parametrize("model", [hidden_by_obs_mask, hidden_by_mask, empty, far_from_zero, correlations])
def test_sites_that_are_no_latents_and_draws_that_are_equal_by_chance(model):
    guide = rn.AutoRealNVP(model)
    guide.build()
    report = rn.diagnose(guide)
    assert report.log_evidence == pytest.approx(report.elbo, abs=0.05)
