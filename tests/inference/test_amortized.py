# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import table
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_realnvp as rn


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


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 50])
def test_an_amortized_guide(size):
    x = 1.2 * torch.randn(400, 2)
    guide = rn.AmortizedRealNVP(rows, Encoder(), context_dim=8)
    rn.fit_guide(guide, x, size=size, num_steps=250, num_particles=4, validation_particles=32, progress=False)
    if size is None:  # rows that the guide has never seen
        new = torch.tensor([[2.0, -1.0], [0.0, 0.5], [1.0, 1.0]])
        draws = torch.stack([guide(new)["z"] for _ in range(1000)]).detach()
        assert (draws.mean(0) - 0.8 * new).abs().max() < 0.15
        assert (draws.std(0) - 0.45).abs().max() < 0.08
        assert guide(x)["scale"].shape == (400,)
    else:
        assert guide(x, size=size)["z"].shape == (50, 2)
        svi = SVI(rows, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert math.isfinite(svi.step(x, size=size))


def test_an_amortized_guide_of_a_single_dimension():
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


def global_and_local(x):
    pyro.sample("g", dist.Normal(0.0, 1.0))
    rows(x)


def bounded(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Uniform(0.0, x[:, 0] + 1))


def counts(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("k", dist.Poisson(2.0))


def test_draws_medians_and_quantiles_of_an_amortized_guide():
    x = torch.randn(30, 2)
    guide = rn.AmortizedRealNVP(rows, Encoder(), context_dim=8)
    rn.fit_guide(guide, x, num_steps=20, progress=False)
    draws, (low, high) = guide.sample(200, x[:5]), guide.quantiles([0.1, 0.9], x[:5])["z"]
    assert draws["z"].shape == (200, 5, 2) and draws["scale"].shape == (200, 5)
    median = guide.median(x[:5])["z"]
    assert ((low < median) & (median < high)).all()
    assert (draws["z"].mean(0) - median).abs().max() < 1.0 and draws["z"].std(0).min() > 0.05
    other = rn.AmortizedRealNVP(rows, Encoder(), context_dim=8).build(x, size=10)
    assert other.sample(7, x, size=10)["z"].shape == (7, 10, 2)


@table(
    ("make", "error", "message"),
    {
        "global and local sites": (
            lambda: rn.AmortizedRealNVP(global_and_local, Encoder(), context_dim=8).build(torch.ones(3, 2)),
            ValueError,
            "under the same plates.*AutoGuideList",
        ),
        "encoder too wide": (
            lambda: rn.AmortizedRealNVP(rows, nn.Linear(2, 8), context_dim=7)(torch.ones(3, 2)),
            ValueError,
            r"contexts of shape \(3, 7\).*got \(3, 8\)",
        ),
        "a support for each row": (
            lambda: rn.AmortizedRealNVP(bounded, Encoder(), context_dim=8).build(torch.rand(3, 2)),
            ValueError,
            "support of the latent site 'z' differs from row to row.*Uniform",
        ),
        "discrete": (
            lambda: rn.AmortizedRealNVP(counts, Encoder(), context_dim=8).build(torch.ones(3, 2)),
            ValueError,
            "'k' is discrete.*config_enumerate",
        ),
        "no sites": (
            lambda: rn.AmortizedRealNVP(lambda: None, Encoder(), context_dim=8).build(),
            ValueError,
            "no latent sites",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


class RowsEncoder(torch.nn.Linear):
    def forward(self, x):
        return super().forward(pyro.subsample(x, event_dim=1))


def test_latents_of_subsampled_rows_are_validated_with_their_own_draws():
    """q(z_i) = N(0.8 x_i, 0.2) is the posterior, so the ELBO reaches the evidence."""
    x = 1.25**0.5 * torch.randn(40, 1)

    def plate(x):
        return pyro.plate("rows", len(x), subsample_size=7, dim=-1)

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=pyro.subsample(x, event_dim=1))

    guide = rn.AmortizedRealNVP(model, RowsEncoder(1, 4), context_dim=4, create_plates=plate)
    history = rn.fit_guide(guide, x, num_steps=300, seed=0, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(x).sum().item()
    assert history.best_step > 0 and history.best_loss == pytest.approx(-evidence, abs=1.5)
    with pytest.raises(ValueError, match=r"expected plates that show all rows.*\['rows'\]"):
        rn.diagnose(guide, x)


class SeenEncoder(nn.Linear):
    def __init__(self):
        super().__init__(2, 8)

    def forward(self, x, seen, size=None):
        x, seen = pyro.subsample(x, event_dim=0), pyro.subsample(seen, event_dim=0)
        return super().forward(torch.stack([x * seen, seen.float()], -1)).tanh()


def missing(x, seen, size=None):
    with pyro.plate("rows", len(x), subsample_size=size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x, seen = pyro.subsample(x, event_dim=0), pyro.subsample(seen, event_dim=0)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)


def masked(x, seen, size=None):
    with pyro.plate("rows", len(x), subsample_size=size):
        x, seen = pyro.subsample(x, event_dim=0), pyro.subsample(seen, event_dim=0)
        with poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=x)


@pytest.mark.parametrize("size", [None, 50])
@pytest.mark.parametrize("model", [missing, masked])
def test_what_a_mask_takes_out_has_no_entropy(model, size):
    """An ELBO of 1057 came, where the evidence is -143, since what is masked in the model grew without bound."""
    x = 1.25**0.5 * torch.randn(200)
    seen = torch.arange(200) % 2 == 0
    plates = {} if size is None else {"create_plates": lambda x, seen, size: pyro.plate("rows", 200, size, dim=-1)}
    guide = rn.AmortizedRealNVP(model, SeenEncoder(), context_dim=8, num_couplings=2, **plates)
    history = rn.fit_guide(guide, x, seen, size=size, num_steps=300, seed=0, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(x[seen]).sum().item()
    assert history.best_loss == pytest.approx(-evidence, abs=1.5 if size is None else 3.0)
    if size is None:
        deviations = guide.sample(1000, x, seen)["z"].std(0).reshape(200, -1)[seen, 0]
        torch.testing.assert_close(deviations, torch.full((100,), 0.2**0.5), rtol=0.15, atol=0)


def test_a_guide_that_was_built_without_a_mask_finds_a_later_one():
    x = 1.25**0.5 * torch.randn(200)
    seen = torch.arange(200) % 2 == 0

    def model(batch):
        with pyro.plate("rows", 200), poutine.mask(mask=batch.get("seen", True)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=batch["x"])

    class Contexts(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"][:, None])

    guide = rn.AmortizedRealNVP(model, Contexts(1, 4), context_dim=4).build({"x": x})
    history = rn.fit_guide(guide, {"x": x, "seen": seen}, num_steps=200, seed=0, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(x[seen]).sum().item()
    assert history.best_loss == pytest.approx(-evidence, abs=1.5)


def test_a_latent_without_a_prior_is_refused():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(True))
            with poutine.mask(mask=x[:, 0] > 0):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w, 0.5), obs=x[:, 0])

    with pytest.raises(ValueError, match="the prior of the latent site 'w' is masked"):
        rn.AmortizedRealNVP(model, RowsEncoder(1, 4), context_dim=4).build(torch.randn(10, 1))


def test_a_support_that_changes_from_call_to_call_is_refused():
    def model(x, high=1.0):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, high).mask(True))
            z = pyro.sample("z", dist.Uniform(0.0, u)) if high == 0.5 else u
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    class Contexts(nn.Linear):
        def forward(self, x, high=1.0):
            return super().forward(x)

    guide = rn.AmortizedRealNVP(model, Contexts(1, 4), context_dim=4)
    x = torch.randn(5, 1)
    assert guide(x)["u"].shape == (5,) and guide(x[:3])["u"].max() < 1
    for call in (guide, guide.median):
        with pytest.raises(ValueError, match="support of the latent site 'u' differs from row to row or from call"):
            call(x, 10.0)
    learned = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="or is learned"):
        rn.AmortizedRealNVP(model, Contexts(1, 4), context_dim=4).build(x, learned)
    assert copy.deepcopy(guide)(x)["u"].shape == (5,)
    with pytest.raises(ValueError, match="support of the latent site 'z' differs"):
        rn.AmortizedRealNVP(model, Contexts(1, 4), context_dim=4).build(x[:1], 0.5)
