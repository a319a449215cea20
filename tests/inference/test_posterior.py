# SPDX-License-Identifier: Apache-2.0
import dataclasses
import pickle
import sys

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import fitted, table
from pyro import poutine
from pyro.infer import config_enumerate

import pyro_realnvp as rn

X = torch.linspace(-1, 1, 12)
COUNTS = torch.poisson((0.5 + X).exp(), generator=torch.Generator().manual_seed(0))


def counts(y=None):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    slope = pyro.deterministic("slope", 2 * b[1])
    pyro.factor("nothing", 0.0 * slope)
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Poisson((b[0] + b[1] * X).exp()), obs=y)


@pytest.fixture(scope="module")
def posterior():
    pyro.set_rng_seed(0)
    guide = fitted(counts, COUNTS, num_steps=100)
    return rn.sample_posterior(guide, COUNTS, num_samples=20, seed=0, progress=False)


def test_draws_by_chain(posterior):
    by_chain = posterior.by_chain["b"]
    assert by_chain.shape == (256, 20, 2) and torch.equal(by_chain[3, 5], posterior.samples["b"][3 * 20 + 5])
    # One chain moves little by little, and its neighbour elsewhere: the values are in the right order.
    stays = ~posterior.jumps[:, 1:] & (posterior.acceptance[:, 1:] < 0.05)
    moved = (by_chain[:, 1:] != by_chain[:, :-1]).any(-1)
    assert moved.float().mean() > 0.9 and moved[stays].float().mean() < 0.5


def test_printed(posterior):
    text = str(posterior)
    mean, deviation = posterior.samples["b"][:, 1].mean(), posterior.samples["b"][:, 1].std()
    assert f"b[1]                 {mean:>9.3g} {deviation:>9.3g}" in text
    assert f"0 divergences, acceptance {posterior.acceptance.mean():.2f}, of the guide's proposals" in text
    assert posterior.min_ess == pytest.approx(min(posterior.effective_sample_size["b"].tolist()))
    assert posterior.max_r_hat == pytest.approx(max(posterior.r_hat["b"].tolist()))
    assert posterior.min_ess_per_second == pytest.approx(posterior.min_ess / posterior.seconds)


def test_arviz(posterior):
    data = posterior.to_arviz(COUNTS, log_likelihood=True, posterior_predictive=True)
    assert set(data.groups()) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    assert data.posterior["b"].shape == (256, 20, 2)
    assert set(data.sample_stats) == {"diverging", "acceptance_rate", "energy"}
    assert data.sample_stats["diverging"].dtype == bool and (data.observed_data["y"].values == COUNTS.numpy()).all()
    b = posterior.by_chain["b"]
    rate = (b[..., :1] + b[..., 1:] * X).exp()
    exact = dist.Poisson(rate).log_prob(COUNTS)
    torch.testing.assert_close(torch.as_tensor(data.log_likelihood["y"].values), exact)
    drawn = torch.as_tensor(data.posterior_predictive["y"].values)
    assert list(data.log_likelihood) == list(data.posterior_predictive) == ["y"] and drawn.shape == (256, 20, 12)
    torch.testing.assert_close(drawn.mean((0, 1)), rate.mean((0, 1)), atol=0.15, rtol=0)
    assert arviz.loo(data).elpd_loo == pytest.approx(exact.flatten(0, 1).exp().mean(0).log().sum().item(), abs=4.0)
    assert arviz.bfmi(data).min() > 0.3
    summary = arviz.summary(data)
    assert summary["mean"]["b[0]"] == pytest.approx(posterior.samples["b"][:, 0].mean().item(), abs=1e-3)
    assert set(posterior.to_arviz().groups()) == {"posterior", "sample_stats"}
    assert posterior.to_arviz(y=COUNTS, log_likelihood=True).log_likelihood["y"].shape == (256, 20, 12)


def test_entries_that_a_mask_leaves_out_are_no_observations(posterior):
    counted = torch.arange(12) % 3 > 0

    def masked(by, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        fn = dist.Poisson((b[0] + b[1] * X).exp())
        with pyro.plate("rows", len(X)):
            if by == "obs_mask":
                pyro.sample("y", fn, obs=y, obs_mask=counted)
            elif by == "two masks and a scale":
                with poutine.scale(scale=3.0):
                    pyro.sample("y", fn.mask(counted).mask(torch.arange(12) >= 0), obs=y)
            else:
                pyro.sample("y", fn.mask(counted), obs=y)
        with poutine.mask(mask=False):
            pyro.sample("none", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    expected = posterior.to_arviz(COUNTS, log_likelihood=True).log_likelihood["y"].values[..., counted]
    for by, name in (("obs_mask", "y_observed"), ("fn.mask", "y"), ("two masks and a scale", "y")):
        rest = {"y_unobserved": torch.zeros(len(posterior.samples["b"]), 12)} if by == "obs_mask" else {}
        draws = dataclasses.replace(posterior, samples=posterior.samples | rest)
        data = draws.to_arviz(by, COUNTS, model=masked, log_likelihood=True, posterior_predictive=True)
        assert list(data.observed_data) == list(data.log_likelihood) == [name]
        assert (data.observed_data[name].values == COUNTS[counted].numpy()).all()
        assert (data.log_likelihood[name].values == expected).all()
        assert data.posterior_predictive[name].shape == expected.shape


@pytest.mark.slow
def test_draws_of_nuts_for_arviz():
    guide = fitted(counts, COUNTS, num_steps=20)
    draws = rn.neutra(guide, COUNTS, num_samples=10, warmup_steps=10, num_chains=2, progress=False)
    data = draws.to_arviz(COUNTS, log_likelihood=True)
    assert set(data.sample_stats) == {"diverging", "acceptance_rate"}
    assert data.log_likelihood["y"].shape == (2, 10, 12) and draws.acceptance.shape == (2, 10)


def test_a_pickle_needs_its_model_back(posterior):
    copy = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(copy.samples["b"], posterior.samples["b"]) and posterior.model is not None
    with pytest.raises(RuntimeError, match="lost their model: pass model="):
        copy.to_arviz(COUNTS, log_likelihood=True)
    assert copy.to_arviz(COUNTS, model=counts, log_likelihood=True).log_likelihood["y"].shape == (256, 20, 12)


def test_predictions_that_cannot_be_mapped():
    def model(y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(m, 0.01), obs=y)
        if y.item() < -1e6:
            raise AssertionError

    samples = {"m": torch.randn(8)}
    nothing = torch.zeros(2, 4)
    draws = rn.PosteriorSamples(samples, nothing.bool(), nothing, 1.0, model=model)
    with pytest.warns(RuntimeWarning, match="predictions cannot be mapped"):
        data = draws.to_arviz(torch.tensor(0.0), posterior_predictive=True)
    assert abs(torch.as_tensor(data.posterior_predictive["y"].values).flatten() - samples["m"]).max() < 0.05


def test_a_distribution_that_torch_maps_slowly_draws_without_a_warning():
    def model(y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.GammaPoisson(1e4, 1e4 * (-m).exp()).expand([2]).to_event(1), obs=y)

    draws = of(model)
    drawn = draws.to_arviz(torch.ones(2), posterior_predictive=True).posterior_predictive["y"].values
    assert drawn.shape == (4, 25, 2) and drawn.mean() == pytest.approx(1.0, abs=0.3)


@config_enumerate
def mixture(y=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(m + 10 * z, 0.1), obs=y)


def subsampled(y=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, subsample_size=2):
        pyro.sample("y", dist.Normal(m, 1.0), obs=None if y is None else y[:2])


def of(model):
    return rn.PosteriorSamples({"m": torch.zeros(100)}, torch.zeros(4, 25).bool(), torch.ones(4, 25), 1.0, model=model)


def test_new_observations_draw_what_was_summed_over():
    y = of(mixture).to_arviz(torch.zeros(2), posterior_predictive=True).posterior_predictive["y"].values
    assert 0.3 < (y > 5).mean() < 0.7 and (abs(y - 10 * (y > 5)) < 1).all()


@table(
    ("model", "args", "error", "message"),
    {
        "nothing observed": (mixture, (), ValueError, "observes nothing: pass the arguments"),
        "summed over": (mixture, (torch.zeros(2),), ValueError, "sums over discrete latents"),
        "subsamples": (subsampled, (torch.zeros(4),), ValueError, r"\['rows'\] draw subsamples.*pass model="),
        "an argument like an option": (lambda model: None, (), ValueError, r"\['model'\] have the names of options"),
    },
)
def test_bad_input(model, args, error, message):
    with pytest.raises(error, match=message):
        of(model).to_arviz(*args, log_likelihood=True)


def test_without_arviz(posterior, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_realnvp\[arviz\]'"):
        posterior.to_arviz()
