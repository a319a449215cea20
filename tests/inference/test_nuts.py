# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import YEAR, Y, fitted, table, two_modes, uncentered
from pyro.infer.autoguide import AutoNormal

import pyro_realnvp as rn


@pytest.mark.slow
def test_neutra_draws_from_the_posterior_in_the_models_sites():
    guide = fitted(uncentered, YEAR, Y, num_steps=20)
    posterior = rn.neutra(guide, YEAR, Y, num_samples=200, warmup_steps=100, num_chains=2, progress=False)
    assert posterior.samples["a"].shape == (400,) and posterior.divergences.sum() == 0
    exact = guide.sample(20_000)  # the warm start is exact here
    for name in "ab":
        draws = posterior.samples[name]
        assert abs(draws.mean() - exact[name].mean()) < 0.25 * exact[name].std()
        assert draws.std() / exact[name].std() == pytest.approx(1.0, abs=0.2)
        assert posterior.r_hat[name] < 1.05 and posterior.effective_sample_size[name] > 50
    assert "0 divergences" in str(posterior) == repr(posterior) and posterior.min_ess_per_second > 0
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
    assert counts["network"] <= counts["model"] + 2  # one more evaluation maps all draws at the end of each chain


def test_nuts_starts_where_the_density_is_finite():
    """Half of the guide's draws are where the model has no density."""

    def model(is_impossible=False):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where((z > 0) & ~torch.tensor(is_impossible), 0.0, -torch.inf))

    guide = fitted(lambda *_: pyro.sample("z", dist.Normal(0.0, 1.0)), num_steps=1)
    draws = rn.neutra(guide, model=model, num_samples=100, warmup_steps=50, num_chains=4, progress=False)
    assert draws.samples["z"].min() > 0 and draws.samples["z"].mean().item() == pytest.approx(0.798, abs=0.15)
    with pytest.raises(ValueError, match="not finite at any of 100 draws of the guide"):
        rn.neutra(guide, True, model=model, progress=False)


@table(
    ("make", "error", "message"),
    {
        "not built": (lambda: rn.neutra(rn.AutoRealNVP(two_modes)), RuntimeError, r"not trained: call fit_guide"),
        "not trained": (
            lambda: rn.neutra(rn.AutoRealNVP(two_modes).build()),
            RuntimeError,
            r"not trained: call fit_guide",
        ),
        "other guide": (lambda: rn.neutra(AutoNormal(two_modes)), TypeError, "with a transform"),
        "too few samples": (
            lambda: rn.neutra(fitted(two_modes, num_steps=1), num_samples=2),
            ValueError,
            "num_samples >= 4",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
