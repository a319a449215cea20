# SPDX-License-Identifier: Apache-2.0
"""fit_guide, diagnose, neutra, amortised guides and flow priors."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.importance import psis_diagnostic
from test_guides import YEAR, Y, fitted, two_modes, uncentred
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp.inference.warm_start import Normal, best_normal

# -- warm start --------------------------------------------------------------------------------------------------------


def test_the_warm_start_is_exact_where_the_posterior_is_normal():
    scale = torch.diag(torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)) @ torch.tensor(
        [[1.0, 0, 0], [0.999, 0.04, 0], [0.5, 0.5, 0.7]], dtype=torch.float64
    )
    target = dist.MultivariateNormal(torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64), scale_tril=scale)
    start = Normal(torch.zeros(3, dtype=torch.float64), 0.1 * torch.eye(3, dtype=torch.float64))
    found = best_normal(target.log_prob, start)
    torch.testing.assert_close(found.loc, target.loc)
    torch.testing.assert_close(found.scale_tril, scale, rtol=1e-6, atol=1e-9)


def test_the_warm_start_stays_inside_the_support():
    start = Normal(torch.full((1,), 1e-3, dtype=torch.float64), torch.full((1, 1), 1e-4, dtype=torch.float64))
    found = best_normal(lambda z: torch.where(z > 0, 3 * z.log() - z, torch.nan).sum(), start)
    assert 2.0 < found.loc < 3.5 and 0.5 < found.scale_tril < 2.5


# -- fit_guide ---------------------------------------------------------------------------------------------------------


def test_fit_guide_takes_pyros_guides_and_learns_the_model():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = 3 * torch.randn(200)
    guide = AutoNormal(model)
    history = rn.fit_guide(guide, x, num_steps=300, lr=0.05, progress=False)
    assert pyro.param("scale").item() == pytest.approx(3.0, rel=0.15)
    assert history.validation_steps[0] == 0 and history.best_loss < history.validation_loss[0]


def test_a_model_that_cannot_be_vectorised():
    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.ones(3, 2) @ beta, 1.0).to_event(1), obs=torch.ones(3))

    guide = rn.AutoRealNVP(model, num_couplings=2)
    with pytest.warns(RuntimeWarning, match="cannot be vectorised over particles.*x.sum"):
        rn.fit_guide(guide, num_steps=3, num_particles=2, validation_particles=4, progress=False)
    with pytest.warns(RuntimeWarning, match="vectorised"):
        report = rn.diagnose(guide, num_samples=100)
    precision = torch.eye(2) + 3 * torch.ones(2, 2)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 2 * torch.ones(3, 3)).log_prob(torch.ones(3))
    assert report.log_evidence == pytest.approx(exact.item(), abs=0.01) and precision.det() > 0


def test_steps_that_are_not_finite_are_skipped_and_reported():
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(z)
        pyro.factor("f", torch.zeros_like(z) if len(calls) % 3 else -torch.inf * torch.ones_like(z))

    guide = rn.AutoRealNVP(model, warm_start=False)
    with pytest.warns(RuntimeWarning, match="were skipped.*lower lr"):
        history = rn.fit_guide(guide, num_steps=12, validation_particles=0, num_particles=1, progress=False)
    assert 0 < history.skipped_steps < 12
    assert all(p.isfinite().all() for p in guide.parameters())


def test_the_path_derivative_has_no_noise_where_the_guide_is_exact():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0]), 0.5).to_event(1))

    norms = {}
    for path_derivative in (True, False):
        guide = rn.AutoRealNVP(model, num_couplings=2).build()
        start = {name: p.clone() for name, p in guide.named_parameters()}
        rn.fit_guide(
            guide, num_steps=20, path_derivative=path_derivative, validation_particles=0, averaging=0.0, progress=False
        )
        moved = [(p - start[name]).square().sum() for name, p in guide.named_parameters()]
        norms[path_derivative] = sum(moved).sqrt().item()
    assert norms[True] < 0.1 * norms[False]


# -- diagnose ----------------------------------------------------------------------------------------------------------


def test_diagnose_agrees_with_pyro_and_tells_good_from_poor():
    def wide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def narrow():
        pyro.sample("z", dist.Normal(0.0, 0.4))

    poor = rn.diagnose(narrow, model=wide, num_samples=4000)
    assert poor.pareto_k > 0.7 and "poor: train longer" in str(poor)
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


# -- neutra ------------------------------------------------------------------------------------------------------------


def test_neutra_draws_from_the_posterior_in_the_models_sites():
    guide = fitted(uncentred, YEAR, Y, num_steps=20)
    posterior = rn.neutra(guide, YEAR, Y, num_samples=200, warmup_steps=100, num_chains=2, progress=False)
    assert posterior.samples["a"].shape == (400,) and posterior.divergences == 0
    exact = guide.sample(20_000)  # the warm start is exact here
    for name in "ab":
        draws = posterior.samples[name]
        assert abs(draws.mean() - exact[name].mean()) < 0.25 * exact[name].std()
        assert draws.std() / exact[name].std() == pytest.approx(1.0, abs=0.2)
        assert posterior.r_hat[name] < 1.05 and posterior.effective_sample_size[name] > 50
    assert "0 divergences" in str(posterior) and posterior.min_ess_per_second > 0
    assert all(p.requires_grad for p in guide.parameters())


def test_neutra_evaluates_the_flow_once_for_each_potential():
    guide = fitted(two_modes, num_steps=20)
    counts = {"network": 0, "model": 0}
    network = next(m for m in guide.modules() if isinstance(m, rn.MLP))
    network.register_forward_hook(lambda *_: counts.__setitem__("network", counts["network"] + 1))

    def counted():
        counts["model"] += 1
        two_modes()

    rn.neutra(guide, model=counted, num_samples=4, warmup_steps=2, progress=False)
    assert counts["network"] <= counts["model"] + 2  # and once for all draws at the end of each chain


# -- amortised guides --------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x, size=None):
        return self.net(pyro.subsample(x, event_dim=1))


def rows(x, size=None):
    with pyro.plate("rows", len(x), subsample_size=size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        batch = pyro.subsample(x, event_dim=1)
        pyro.sample("x", dist.Normal(z, 0.5 * scale[..., None]).to_event(1), obs=batch)


@pytest.mark.parametrize("size", [None, 50])
def test_an_amortised_guide(size):
    x = 1.2 * torch.randn(400, 2)
    guide = rn.AmortizedRealNVP(rows, Encoder(), context_dim=8)
    rn.fit_guide(guide, x, size=size, num_steps=400, num_particles=4, validation_particles=32, progress=False)
    if size is None:  # rows that it has never seen
        new = torch.tensor([[2.0, -1.0], [0.0, 0.5], [1.0, 1.0]])
        draws = torch.stack([guide(new)["z"] for _ in range(2000)]).detach()
        assert (draws.mean(0) - 0.8 * new).abs().max() < 0.15
        assert (draws.std(0) - 0.45).abs().max() < 0.08
        assert guide(x)["scale"].shape == (400,)
    else:
        assert guide(x, size=size)["z"].shape == (50, 2)
        svi = SVI(rows, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert math.isfinite(svi.step(x, size=size))


def test_an_amortised_guide_of_a_single_dimension():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(300)
    guide = rn.AmortizedRealNVP(
        lambda x: model(x), nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)), context_dim=4
    )
    rn.fit_guide(guide, x, model=model, num_steps=300, progress=False)
    with poutine.trace() as trace:
        guide(torch.tensor([2.0] * 5000))
    draws = trace.trace.nodes["z"]["value"].detach()
    assert draws.mean() == pytest.approx(1.0, abs=0.15) and draws.std() == pytest.approx(0.5**0.5, abs=0.1)


def test_neural_posterior_estimation():
    theta = torch.randn(3000, 2)
    x = theta + 0.5 * torch.randn(3000, 2)
    posterior = rn.Flow(rn.real_nvp(2, num_couplings=4, context_dim=2))
    rn.fit(posterior, theta, context=x, num_steps=400, progress=False, seed=0)
    draws = posterior(torch.tensor([1.0, -1.0])).sample((4000,))
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.8, -0.8]), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.2**0.5), atol=0.07, rtol=0)


# -- flow priors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, rn.AutoRealNVP])
def test_a_flow_as_a_prior_under_svi(make):
    flow = rn.Flow(rn.real_nvp(2, num_couplings=4))
    x = torch.randn(100, 2) * 0.3 + torch.tensor([2.0, -1.0])

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", flow())
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    options = {"warm_start": False, "num_couplings": 2} if make is rn.AutoRealNVP else {}
    guide = make(model, **options)
    rn.fit_guide(
        guide, x, num_steps=300, lr=0.02, num_particles=2, validation_particles=8, max_grad_norm=1e3, progress=False
    )
    assert (flow().sample((2000,)).mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 0.35


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_flow_as_a_prior_under_nuts():
    flow = rn.Flow(rn.Compose([rn.real_nvp(2, num_couplings=2), dist.transforms.ExpTransform()])).requires_grad_(False)

    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", flow())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(2, 2))

    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].shape == (20, 2, 2) and (mcmc.get_samples()["z"] > 0).all()


def other_site():
    pyro.sample("other", dist.Normal(0.0, 1.0))


def two_sites():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    other_site()


def vanishing():
    vanishing.calls += 1
    pyro.sample("z" if vanishing.calls < 6 else "other", dist.Normal(torch.zeros(()), 1.0))


vanishing.calls = 0


def global_and_local(x):
    pyro.sample("g", dist.Normal(0.0, 1.0))
    rows(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rn.fit_guide(lambda: None), ValueError, "pass model="),
        (
            lambda: rn.fit_guide(fitted(two_modes, num_steps=1), model=two_sites),
            ValueError,
            r"the latent sites \['other'\]",
        ),
        (
            lambda: rn.fit_guide(fitted(two_sites, num_steps=1), model=other_site),
            ValueError,
            r"which the model does not have",
        ),
        (
            lambda: rn.fit_guide(rn.AutoRealNVP(vanishing, warm_start=False), num_steps=20, progress=False),
            ValueError,
            r"\['other'\] are new, \['z'\] are gone",
        ),
        (lambda: rn.fit_guide(rn.AutoRealNVP(two_modes), num_steps=0), ValueError, "num_steps >= 1"),
        (lambda: rn.fit_guide(lambda: two_modes(), model=two_modes), ValueError, "nothing to fit"),
        (lambda: rn.neutra(rn.AutoRealNVP(two_modes)), RuntimeError, r"not trained: call fit_guide"),
        (lambda: rn.neutra(rn.AutoRealNVP(two_modes).build()), RuntimeError, r"not trained: call fit_guide"),
        (lambda: rn.neutra(AutoNormal(two_modes)), TypeError, "with a transform"),
        (lambda: rn.neutra(fitted(two_modes, num_steps=1), num_samples=2), ValueError, "num_samples >= 4"),
        (
            lambda: rn.AmortizedRealNVP(global_and_local, Encoder(), context_dim=8).build(torch.ones(3, 2)),
            ValueError,
            "under the same plates.*AutoGuideList",
        ),
        (
            lambda: rn.AmortizedRealNVP(rows, nn.Linear(2, 8), context_dim=7)(torch.ones(3, 2)),
            ValueError,
            r"contexts of shape \(3, 7\).*got \(3, 8\)",
        ),
        (lambda: rn.AmortizedRealNVP(lambda: None, Encoder(), context_dim=8).build(), ValueError, "no latent sites"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("function", [rn.fit_guide, rn.diagnose, rn.neutra], ids=lambda function: function.__name__)
def test_a_model_whose_argument_has_the_name_of_an_option_is_refused(function):
    def model(y, num_samples=3, lr=0.1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, lr * num_samples), obs=y)

    y = torch.tensor(1.0)
    name = "lr" if function is rn.fit_guide else "num_samples"
    guide = rn.AutoRealNVP(model)
    guide.build(y).mark_trained()
    with pytest.raises(ValueError, match=rf"\['{name}'\] have the names of options of {function.__name__}"):
        function(guide, y)


def test_arguments_by_position_or_bound_are_not_mistaken_for_options():
    def model(y, num_samples, lr=0.1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, lr * num_samples), obs=y)

    y = torch.tensor(1.0)
    rn.fit_guide(rn.AutoRealNVP(model), y, 10, 0.1, num_steps=2, progress=False)
    bound = functools.partial(model, num_samples=10, lr=0.1)
    rn.fit_guide(rn.AutoRealNVP(bound), y, num_steps=2, progress=False)
