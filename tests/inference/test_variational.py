# SPDX-License-Identifier: Apache-2.0
"""fit_guide, flow priors, and models whose arguments have the names of options."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import fitted, table, two_modes
from pyro.infer import MCMC, NUTS, ReweightedWakeSleep, TraceTailAdaptive_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGaussian, AutoNormal, AutoStructured

import pyro_realnvp as rn

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


def test_a_model_that_cannot_be_mapped_runs_draw_by_draw():
    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert beta[0].item() > -100  # a branch on a value
        pyro.sample("y", dist.Normal(torch.ones(3, 2) @ beta, 1.0).to_event(1), obs=torch.ones(3))

    guide = rn.AutoRealNVP(model, num_couplings=2)
    with pytest.warns(RuntimeWarning, match=r"cannot be mapped over draws.*beta\[0\].item\(\)"):
        rn.fit_guide(guide, num_steps=3, progress=False)
    with pytest.warns(RuntimeWarning, match="cannot be mapped"):
        report = rn.diagnose(guide, num_samples=100)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 2 * torch.ones(3, 3)).log_prob(torch.ones(3))
    assert report.log_evidence == pytest.approx(exact.item(), abs=0.01)


def test_steps_that_are_not_finite_are_skipped_and_reported():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z > 1.0, -torch.inf, 0.0))

    guide = rn.AutoRealNVP(model, warm_start=False, init_scale=1.0)
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


def test_the_path_derivative_under_a_plate():
    """The rows of a plate are a site without a gradient, but no draw of the guide."""

    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 4.0, -2.0]))

    losses = []
    for path_derivative in (True, False):
        pyro.clear_param_store()
        options = {"num_steps": 5, "seed": 0, "progress": False}
        losses.append(rn.fit_guide(AutoNormal(model), path_derivative=path_derivative, **options).loss)
    assert losses[0][0] == pytest.approx(losses[1][0]) and losses[0][-1] != losses[1][-1]


@pytest.mark.parametrize("loss", [ReweightedWakeSleep(num_particles=4), TraceTailAdaptive_ELBO(num_particles=4)])
def test_losses_without_a_value_are_refused(loss):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="has no single value that a training could compare"):
        rn.fit_guide(AutoNormal(model), loss=loss, num_steps=5, progress=False)


# -- flow priors -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
    pyro.sample("z" if vanishing.calls < 40 else "other", dist.Normal(torch.zeros(()), 1.0))


vanishing.calls = 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@table(
    ("make", "error", "message"),
    {
        "no model": (lambda: rn.fit_guide(lambda: None), ValueError, "pass model="),
        "site without guide": (
            lambda: rn.fit_guide(fitted(two_modes, num_steps=1), model=two_sites),
            ValueError,
            r"the latent sites \['other'\]",
        ),
        "site without model": (
            lambda: rn.fit_guide(fitted(two_sites, num_steps=1), model=other_site),
            ValueError,
            r"which the model does not have",
        ),
        "sites change": (
            lambda: rn.fit_guide(rn.AutoRealNVP(vanishing, warm_start=False), num_steps=60, progress=False),
            ValueError,
            r"\['other'\] are new, \['z'\] are gone",
        ),
        "no steps": (lambda: rn.fit_guide(rn.AutoRealNVP(two_modes), num_steps=0), ValueError, "num_steps >= 1"),
        "no parameters": (lambda: rn.fit_guide(lambda: two_modes(), model=two_modes), ValueError, "nothing to fit"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "function", [rn.fit_guide, rn.diagnose, rn.neutra, rn.sample_posterior], ids=lambda function: function.__name__
)
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


@pytest.mark.parametrize("guide_of", [AutoStructured, AutoGaussian])
def test_a_path_derivative_of_noise_that_is_scaled_between_two_sites_is_refused(guide_of):
    """Its scale fell to a tenth, since no draw carries it."""

    def model():
        pyro.sample("z", dist.Normal(2.0, 0.5))

    options = {"conditionals": "normal"} if guide_of is AutoStructured else {}
    with pytest.raises(ValueError, match=r"in the Jacobians of the sites \['z'\] alone: leave out path_derivative"):
        rn.fit_guide(guide_of(model, **options), path_derivative=True, num_steps=1, progress=False)
    rn.fit_guide(guide_of(model, **options), num_steps=1, progress=False)
    rn.fit_guide(AutoNormal(model), path_derivative=True, num_steps=1, progress=False)
