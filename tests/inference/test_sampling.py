# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import YEAR, Y, fitted, rough, table, two_modes, uncentered
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

import pyro_realnvp as rn
from pyro_realnvp.inference.chains import Chains
from pyro_realnvp.inference.convergence import effective_sample_size

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))


def draw(guide, *args, **options):
    return rn.sample_posterior(guide, *args, **{"seed": 0, "progress": False} | options)


def assert_near(draws, name, function, mean, deviation):
    """The mean and the deviation of a function of a site are within 4 Monte Carlo errors of the exact ones."""
    values = function(draws.by_chain[name]).double()
    for these, exact in ((values, mean), ((values - mean).square(), deviation**2)):
        assert abs(these.mean() - exact) < 4 * these.std() / effective_sample_size(these) ** 0.5


def assert_share(draws, name, is_true, share):
    """A condition on a site holds for this share of the draws, within 4 Monte Carlo errors."""
    values = is_true(draws.by_chain[name]).double()
    assert abs(values.mean() - share) < 4 * (share * (1 - share) / effective_sample_size(values)) ** 0.5


def exact_schools():
    """Mean and deviation of mu, log tau and theta[0], by quadrature over log tau, given which all else is normal."""
    log_tau = torch.linspace(-12, 8, 20001, dtype=torch.float64)
    variance = log_tau.exp()[:, None].square() + ERRORS.double().square()
    log_p = dist.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau
    precision = 1 / 25 + (1 / variance).sum(1)
    mean = (EFFECTS / variance).sum(1) / precision
    log_p = log_p + dist.Normal(0.0, variance.sqrt()).log_prob(EFFECTS.double()).sum(1)
    log_p = log_p + precision * mean.square() / 2 - (25 * precision).log() / 2
    weights = log_p.softmax(0)
    share = log_tau.exp().square() / variance[:, 0]  # of the effect in the mean of theta[0] given mu
    theta = share * EFFECTS[0] + (1 - share) * mean
    theta_variance = share * ERRORS[0].square() + (1 - share).square() / precision
    moments = {"mu": (mean, 1 / precision), "log tau": (log_tau, 0.0 * mean), "theta": (theta, theta_variance)}
    result = {}
    for name, (means, variances) in moments.items():
        first = (weights * means).sum()
        result[name] = first.item(), ((weights * (means.square() + variances)).sum() - first**2).sqrt().item()
    return result


@pytest.mark.slow
def test_eight_schools():
    exact = exact_schools()
    guide = fitted(schools, num_steps=300)
    draws = draw(guide)
    assert draws.max_r_hat < 1.01 and draws.min_ess > 5000
    assert_near(draws, "mu", lambda mu: mu, *exact["mu"])
    assert_near(draws, "tau", torch.log, *exact["log tau"])
    assert_near(draws, "theta", lambda theta: theta[..., 0], *exact["theta"])


@pytest.mark.slow
def test_the_funnel():
    draws = draw(fitted(funnel, num_steps=500))
    assert_near(draws, "v", lambda v: v, 0.0, 3.0)
    v = draws.samples["v"].sort().values
    levels = dist.Normal(0.0, 3.0).cdf(v).double()
    assert (levels - torch.linspace(0, 1, len(v))).abs().max() * draws.min_ess**0.5 < 1.95
    # Given v, each x is normal.
    noise = (draws.samples["x"] * (-draws.samples["v"] / 2).exp()[:, None]).unflatten(0, (256, -1))
    draws.samples["noise"] = noise.flatten(0, 1)
    assert_near(draws, "noise", lambda x: x[..., 4], 0.0, 1.0)


SCALES = torch.tensor([0.1, 1.0, 10.0])


def scaled():
    pyro.sample("z", dist.Normal(torch.tensor([1.0, 0.0, 0.0]), SCALES).to_event(1))
    pyro.sample("g", dist.Gamma(3.0, 2.0))


@pytest.mark.slow
@table(
    "guide",
    {
        "too narrow": lambda: rough(scaled, {"z": torch.tensor([1.0, 0.0, 0.0]), "g": torch.tensor(1.0)}, 0.05),
        "beside": lambda: rough(scaled, {"z": torch.tensor([3.0, 2.0, 30.0]), "g": torch.tensor(0.1)}, 0.3),
        "too wide": lambda: rough(scaled, {"z": torch.zeros(3), "g": torch.tensor(1.0)}, 3.0),
    },
)
def test_a_bad_guide_gives_right_draws(guide):
    draws = draw(guide(), num_samples=60, warmup_steps=300)
    for k, (mean, deviation) in enumerate(zip([1.0, 0.0, 0.0], SCALES.tolist())):
        assert_near(draws, "z", lambda z, k=k: z[..., k], mean, deviation)
    assert_near(draws, "g", lambda g: g, 1.5, 0.75**0.5)
    grid = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    cdf = dist.Gamma(3.0, 2.0).log_prob(grid).exp().cumsum(0) * (grid[1] - grid[0])
    for level in (0.05, 0.5, 0.95):
        quantile = grid[(cdf < level).sum()]
        assert_share(draws, "g", lambda g, q=quantile: g < q, level)


@pytest.mark.slow
def test_two_modes_that_the_guide_covers():
    draws = draw(fitted(two_modes, num_steps=600))
    assert_share(draws, "z", lambda z: z[..., 0] < 0, 0.3 * 0.97725 + 0.7 * 0.02275)


@pytest.mark.slow
def test_modes_far_apart_have_their_weights_even_if_the_guide_has_others():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        left, right = (dist.Normal(m, 0.5).log_prob(z[0]) for m in (-3.0, 3.0))
        mixture = torch.logaddexp(math.log(0.2) + left, math.log(0.8) + right) + dist.Normal(0.0, 1.0).log_prob(z[1])
        pyro.factor("mixture", mixture - dist.Normal(0.0, 10.0).log_prob(z).sum())

    guide = fitted(model, num_steps=100, num_starts=16)
    with torch.no_grad():
        guide.mixture.logits.sub_(guide.mode_weights().log())  # now both weights are a half
    torch.testing.assert_close(guide.mode_weights(), torch.tensor([0.5, 0.5]))
    draws = draw(guide)
    assert draws.max_r_hat < 1.01
    assert_share(draws, "z", lambda z: z[..., 0] < 0, 0.2)
    assert_near(draws, "z", lambda z: z[..., 1], 0.0, 1.0)


def test_the_draws_of_a_known_regression_and_what_comes_with_them():
    guide = fitted(uncentered, YEAR, Y, num_steps=20)
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    draws = draw(guide, YEAR, Y, num_samples=20, warmup_steps=60)
    design = torch.stack([torch.ones(60), YEAR], 1).double()
    prior = torch.tensor([1e-6, 1e-4]).double()
    covariance = torch.linalg.inv(prior.diag() + design.T @ design / 0.25)
    mean = covariance @ design.T @ Y.double() / 0.25
    for k, name in enumerate("ab"):
        assert_near(draws, name, lambda x: x, mean[k].item(), covariance[k, k].sqrt().item())
    assert draws.samples["a"].shape == (256 * 20,) and draws.by_chain["a"].shape == (256, 20)
    for values in (draws.divergences, draws.acceptance, draws.jumps, draws.energy):
        assert values.shape == (256, 20)
    assert draws.divergences.dtype == torch.bool and not draws.divergences.any()
    assert draws.jumps.float().mean() > 0.9 and 0.5 < draws.acceptance.mean() <= 1
    # Half of the kinetic and half of the potential energy of each of two coordinates, apart from a constant.
    assert draws.energy.std() == pytest.approx(2**0.5, abs=0.1)
    assert all(torch.equal(state[name], value) for name, value in guide.state_dict().items())
    assert all(p.requires_grad for p in guide.parameters())
    again = draw(guide, YEAR, Y, num_samples=20, warmup_steps=60)
    assert torch.equal(draws.samples["a"], again.samples["a"])
    other = draw(guide, YEAR, Y, num_samples=20, warmup_steps=60, seed=1)
    assert not torch.equal(draws.samples["a"], other.samples["a"])
    in_pieces = draw(guide, YEAR, Y, num_samples=20, warmup_steps=60, memory=10_000)
    assert_near(in_pieces, "b", lambda x: x, mean[1].item(), covariance[1, 1].sqrt().item())


@config_enumerate
def of_all_kinds():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    pyro.sample("tril", dist.LKJCholesky(2, 1.0))
    top = pyro.sample("top", dist.Gamma(2.0, 1.0))
    low = pyro.deterministic("low", -top)
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("below", dist.Uniform(low, top))
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(torch.stack([0.0 * top, top])[z], 0.5), obs=torch.tensor([0.1, 2.0, 2.3]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the largest R-hat")
def test_all_kinds_of_sites_are_those_of_neutra():
    guide = fitted(of_all_kinds, num_steps=100)
    ours = draw(guide, num_samples=20)
    theirs = rn.neutra(guide, num_samples=4, warmup_steps=4, progress=False)
    assert {name: values.shape[1:] for name, values in ours.samples.items()} == {
        name: values.shape[1:] for name, values in theirs.samples.items()
    }
    assert ours.samples.keys() == {"weights", "tril", "top", "below"}
    assert (ours.samples["below"].abs() < ours.samples["top"][:, None, None]).all()
    tril = ours.samples["tril"]
    torch.testing.assert_close((tril @ tril.mT).diagonal(dim1=1, dim2=2), torch.ones(256 * 20, 2))
    weighted = rn.diagnose(guide, num_samples=20_000)
    assert weighted.pareto_k < 0.7 and weighted.effective_sample_size > 5000
    better = weighted.resample(20_000)
    for name in ("weights", "tril", "top", "below"):
        spread = 4 * better[name].std(0) / 5000**0.5
        assert ((ours.samples[name].mean(0) - better[name].mean(0)).abs() <= spread + 1e-6).all()
    assert math.isfinite(ours.min_ess)  # though entries of the Cholesky factor never vary


@pytest.mark.slow
def test_subsampled_rows_count_in_full():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 1

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 100, subsample_size=40) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    precision = 100 + 1 / 100
    draws = draw(fitted(model, num_steps=20), num_samples=20, warmup_steps=60)
    assert_near(draws, "m", lambda m: m, x.sum().item() / precision, precision**-0.5)


def test_double_precision():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1e-8).to_event(1))

    draws = draw(fitted(model, num_steps=5), num_samples=20, warmup_steps=60)
    assert draws.samples["z"].dtype == draws.energy.dtype == torch.float64
    assert_near(draws, "z", lambda z: z[..., 1], 0.0, 1e-8)


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_guide_of_pyros(make):
    guide = make(uncentered)
    rn.fit_guide(guide, YEAR, Y, num_steps=20, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = draw(guide, YEAR, Y, num_samples=4, warmup_steps=4, num_chains=8)
    assert draws.samples["b"].shape == (32,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the largest R-hat")
def test_a_model_that_cannot_be_mapped_gets_fewer_chains():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 0.0 * z if z.item() > 0 else -0.5 * z * z)

    with pytest.warns(RuntimeWarning, match="cannot be mapped"):
        guide = fitted(model, num_steps=5)
    with pytest.warns(RuntimeWarning, match="cannot be mapped"):
        draws = draw(guide, num_samples=100, warmup_steps=60)
    assert draws.by_chain["z"].shape == (16, 100)
    assert_share(draws, "z", lambda z: z < 0, 0.5**0.5 / (1 + 0.5**0.5))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_chains_that_have_not_converged_are_reported():
    guide = rough(scaled, {"z": torch.tensor([1.0, 0.0, 0.0]), "g": torch.tensor(1.0)}, 0.01)
    with pytest.warns(RuntimeWarning, match=r"R-hat is .* effective sample size .*: take a larger num_samples"):
        draw(guide, num_samples=4, warmup_steps=1, num_chains=64)


def test_ctrl_c_leaves_the_draws_so_far(monkeypatch):
    guide, whole, calls = fitted(two_modes, num_steps=5), Chains.iterate, []

    def interrupted(self, adapt=False):
        calls.append(adapt)
        if len(calls) == stops[0]:
            raise KeyboardInterrupt
        return whole(self, adapt)

    monkeypatch.setattr(Chains, "iterate", interrupted)
    stops = [10 + 7]
    with pytest.warns(RuntimeWarning, match="interrupted after 6 of 20 draws"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the largest")
            draws = draw(guide, num_samples=20, warmup_steps=10)
    assert draws.by_chain["z"].shape == (256, 6, 2) and draws.energy.shape == (256, 6)
    for stops[0] in (5, 10 + 3):  # in the warmup; before there are enough draws
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            draw(guide, num_samples=20, warmup_steps=10)
    assert all(p.requires_grad for p in guide.parameters())


def never_finite():
    def model(bad):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -torch.inf * bad + 0.0 * z.sum() if bad else 0.0 * z.sum())

    return fitted(model, 0.0, num_steps=1)


def without_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


@table(
    ("make", "error", "message"),
    {
        "not built": (lambda: draw(rn.AutoRealNVP(two_modes)), RuntimeError, r"not trained: call fit_guide"),
        "not trained": (lambda: draw(rn.AutoRealNVP(two_modes).build()), RuntimeError, r"not trained: call fit_guide"),
        "other guide": (lambda: draw(AutoNormal(two_modes)), TypeError, "with a transform"),
        "no latents": (lambda: draw(fitted(without_latents)), RuntimeError, "no latent variables"),
        "never finite": (lambda: draw(never_finite(), 1.0), ValueError, "not finite at any of 1024 draws.*train"),
        "few samples": (lambda: draw(fitted(two_modes, num_steps=1), num_samples=2), ValueError, "num_samples >= 4"),
        "no warmup": (lambda: draw(fitted(two_modes, num_steps=1), warmup_steps=0), ValueError, "warmup_steps >= 1"),
        "few chains": (
            lambda: draw(fitted(two_modes, num_steps=1), num_chains=2),
            ValueError,
            r"num_chains >= 4.*got 2.*neutra",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_guide_without_a_transform_is_refused():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    guide = AutoLowRankMultivariateNormal(model)
    rn.fit_guide(guide, num_steps=5, progress=False)
    with pytest.raises(TypeError, match=r"a guide with a transform.*got AutoLowRankMultivariateNormal"):
        rn.sample_posterior(guide, progress=False)


def test_divergences_are_named():
    """The neck of this posterior was hardly entered, with an R-hat of 1.001 and thousands of effective draws."""

    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] * z[..., 1], scale), obs=torch.tensor(0.5))

    guide = rn.AutoRealNVP(model, num_couplings=4)
    rn.fit_guide(guide, num_steps=100, seed=0, progress=False)
    with pytest.warns(RuntimeWarning, match=r"% of the trajectories have diverged.*LocScaleReparam"):
        rn.sample_posterior(guide, num_samples=100, warmup_steps=100, num_chains=64, progress=False)
