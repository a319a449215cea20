# SPDX-License-Identifier: Apache-2.0
"""Flows inside Pyro's own inference: guides and NeuTra, each network evaluated once."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import count_evaluations, perturb, small
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTMC_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam

import pyro_realnvp as rn
from pyro_realnvp.inference.particles import particles_of


def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.exp(), 0.5).to_event(1), obs=torch.ones(3))


def trained_guide(model=model, flow=small):
    guide = AutoNormalizingFlow(model, flow)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    return guide, svi


@pytest.mark.parametrize("num_particles", [1, 8])
def test_an_svi_step_evaluates_each_network_once(num_particles):
    guide, _ = trained_guide()
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert count_evaluations(guide.transform, svi.step) == {1}


def test_a_neutra_evaluation_evaluates_each_network_once():
    guide, _ = trained_guide()
    guide.requires_grad_(False)
    warped = poutine.reparam(model, config=lambda _: NeuTraReparam(guide))
    initial, potential, _, _ = initialize_model(warped)
    point = {name: value.detach().requires_grad_() for name, value in initial.items()}
    assert count_evaluations(guide.transform, lambda: potential(point)) == {1}
    gradient = torch.autograd.grad(potential(point), list(point.values()))
    assert all(g.isfinite().all() for g in gradient)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, JitTrace_ELBO])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_pyros_gradients_of_a_mixture(elbo):
    """A draw of a mixture has no rsample, and log q was missing in the weight of its score: guides of two modes fell
    together. The exact gradient is that of Particles, which draws each component reparametrized."""

    def squares():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z[..., :1].square(), 0.3), obs=torch.tensor(1.0))

    torch.manual_seed(0)
    guide = perturb(rn.AutoRealNVP(squares, num_starts=8, num_couplings=2).build(), 0.02)
    assert len(guide.mode_weights()) > 1
    particles = particles_of(guide, guide._density(), list(guide.parameters()))
    exact = mean_gradient(guide, lambda: particles.loss(20_000, False).backward(), 3)
    loss = elbo(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    got = mean_gradient(guide, lambda: loss.loss_and_grads(squares, guide), 20)
    assert (got - exact).norm() < 0.1 * exact.norm()
    assert loss.loss(squares, guide) == pytest.approx(particles.loss(20_000, False).item(), rel=0.1)


def test_all_losses_of_a_mixture_agree():
    """TraceTMC_ELBO does not count what is observed in a guide."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("c", dist.Normal(a[..., 0].abs(), 0.4), obs=torch.tensor(3.0))

    guide = rn.AutoRealNVP(model, num_starts=8, num_couplings=2).build()
    assert len(guide.mode_weights()) > 1
    losses = [elbo(max_plate_nesting=0) for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceTMC_ELBO)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is enumerated
        values = [sum(loss.loss(model, guide) for _ in range(200)) / 200 for loss in losses]
    assert max(values) - min(values) < 0.2


def mean_gradient(guide, backward, num):
    guide.zero_grad()
    for _ in range(num):
        backward()
    return torch.cat([p.grad.flatten() for p in guide.parameters()]) / num


def test_a_guide_of_mixed_parts():
    import pyro.distributions.transforms as T

    guide, svi = trained_guide(flow=lambda dim: rn.Compose([small(dim), T.Spline(dim), T.permute(dim), small(dim)]))
    assert count_evaluations(guide.transform, svi.step) == {1}
    names = [name for name, _ in guide.transform.named_parameters()]
    assert sum("unnormalized" in name for name in names) == 4
    assert sum("conditioner" in name for name in names) == 2 * 4 * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_a_jitted_elbo():
    """The guide is not an AutoNormalizingFlow, in which Pyro cannot trace the parameters of any transform."""
    flow = rn.Flow(small(3))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
    before = flow.bijection.parts[0].conditioner.last.bias.clone()
    assert all(torch.tensor(svi.step()).isfinite() for _ in range(3))
    assert not torch.equal(flow.bijection.parts[0].conditioner.last.bias, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_a_jitted_elbo_of_relative_latents():
    """Torch cannot trace what is mapped."""
    y = torch.tensor([1.0, -1.0, 2.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(5.0))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(mu, scale))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    guide = rn.AutoRealNVP(model, num_couplings=2)
    options = {"num_particles": 500, "vectorize_particles": True, "max_plate_nesting": 1}
    jitted, plain = (
        SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), elbo(**options)) for elbo in (JitTrace_ELBO, Trace_ELBO)
    )
    assert jitted.step(y) == pytest.approx(plain.step(y), abs=0.2)
    assert guide.relative


def test_a_float64_model():
    def double_model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        assert z.dtype == torch.float64

    guide, _ = trained_guide(double_model, lambda dim: small(dim).double())
    assert guide()["z"].dtype == torch.float64


def test_a_guide_without_arguments_takes_those_of_its_build():
    """As Pyro's own do."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = rn.AutoRealNVP(model)
    guide(torch.zeros(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'hii'"):
        guide(torch.zeros(3), hii=3.0)
    assert guide()["z"].shape == (3,)
    assert Predictive(guide, num_samples=4)()["z"].shape == (4, 3)


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_forecast(is_relative):
    """Pyro's Forecaster gives the guide more covariates than those that it was made with."""

    class Walk(ForecastingModel):
        def model(self, zero_data, covariates):
            scale = (
                pyro.sample("scale", dist.LogNormal(torch.full((1,), -2.0), 1.0).to_event(1)) if is_relative else 0.1
            )
            with self.time_plate:
                drift = pyro.sample("drift", dist.Normal(torch.zeros(1), scale).to_event(1))
            self.predict(dist.Normal(0.0, torch.full((1,), 0.1)), drift.cumsum(-2))

    model, covariates = Walk(), torch.zeros(12, 1)
    data = torch.linspace(0, 5, 8).unsqueeze(-1)
    guide = rn.AutoRealNVP(model, num_couplings=2)
    forecaster = Forecaster(model, data, covariates[:8], guide=guide, num_steps=5, log_every=0)
    assert bool(guide.relative) is is_relative
    draws = forecaster(data, covariates, num_samples=200)
    assert draws.shape == (200, 4, 1)
    assert draws[:, 0].mean().item() == pytest.approx(5.0, abs=1.0)
