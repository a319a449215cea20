# SPDX-License-Identifier: Apache-2.0
"""Posteriors with separate modes, whose weights and evidence are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_realnvp as rn


def swapped_clusters(y):
    """A mixture of two normals, whose means may be swapped."""
    means = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    each = dist.Normal(means[:, None], 1.0).log_prob(y)
    pyro.factor("y", (each.logsumexp(0) - math.log(2)).sum())


def factor_model(y):
    """One factor: the signs of the loadings and of the factor may be swapped together."""
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        f = pyro.sample("f", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(f[..., None] * loadings, 0.5).to_event(1), obs=y)


def two_pieces(weight=0.8, far=8.0):
    """A normalized mixture of two normals, far apart: the evidence is 1."""
    pieces = dist.Normal(torch.tensor([[-far, 0.0], [far, 3.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])).to_event(1)
    prior = dist.Normal(torch.zeros(2), 2.5 * far).to_event(1)
    z = pyro.sample("z", prior)
    log_p = (pieces.log_prob(z) + torch.tensor([weight, 1 - weight]).log()).logsumexp(0)
    pyro.factor("f", log_p - prior.log_prob(z))


def clusters(num=20):
    torch.manual_seed(0)
    return torch.cat([torch.randn(num) - 2, torch.randn(num) + 2])


def evidence_of_swapped_clusters(y):
    axis = torch.linspace(-8, 8, 801, dtype=torch.float64)
    log_likelihood = torch.zeros(801, 801, dtype=torch.float64)
    for one in y.double():
        each = dist.Normal(axis, 1.0).log_prob(one)
        log_likelihood += torch.logaddexp(each[:, None], each) - math.log(2)
    prior = dist.Normal(0.0, 5.0).log_prob(axis)
    return ((log_likelihood + prior[:, None] + prior).logsumexp((0, 1)) + 2 * (axis[1] - axis[0]).log()).item()


def fitted(model, *args, num_starts=16, num_steps=100, **options):
    guide = rn.AutoRealNVP(model, num_starts=num_starts, num_couplings=4, **options)
    rn.fit_guide(guide, *args, num_steps=num_steps, seed=0, progress=False)
    return guide, rn.diagnose(guide, *args)


def test_swapped_clusters():
    y = clusters()
    guide, diagnosis = fitted(swapped_clusters, y)
    assert diagnosis.mode_weights == pytest.approx([0.5, 0.5], abs=0.03)
    assert diagnosis.log_evidence == pytest.approx(evidence_of_swapped_clusters(y), abs=0.02)
    means = guide.sample(4000)["m"]
    assert (means[:, 0] < means[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert "2, found from 16 starts" in str(diagnosis)


@pytest.mark.parametrize("path_derivative", [True, False])
@pytest.mark.parametrize("weight", [0.8, 0.97])
def test_unequal_weights(weight, path_derivative):
    guide = rn.AutoRealNVP(lambda: two_pieces(weight), num_starts=16, num_couplings=4)
    guide.build()
    with torch.no_grad():
        guide.own("mixture").logits.sub_(torch.tensor([0.5, -0.5]))  # the weights are learned, not only started well
    rn.fit_guide(guide, num_steps=300, seed=0, path_derivative=path_derivative, progress=False)
    diagnosis = rn.diagnose(guide)
    assert diagnosis.mode_weights[0] == pytest.approx(weight, abs=0.03)
    assert diagnosis.log_evidence == pytest.approx(0.0, abs=0.03)
    z = guide.sample(4000)["z"][:, 0]
    assert (z < 0).float().mean().item() == pytest.approx(weight, abs=0.04)
    assert z[z < 0].mean().item() == pytest.approx(-8, abs=0.15)


@pytest.mark.slow
def test_a_factor_whose_sign_is_free():
    torch.manual_seed(0)
    loadings = torch.tensor([1.0, -0.8, 0.5, 1.2])
    y = torch.randn(30, 1) * loadings + 0.5 * torch.randn(30, 4)
    guide, diagnosis = fitted(factor_model, y, num_steps=400)
    assert diagnosis.mode_weights == pytest.approx([0.5, 0.5], abs=0.03)
    draws = guide.sample(4000)["loadings"]
    assert (draws[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    sign = draws[:, :1].sign()
    torch.testing.assert_close((sign * draws).mean(0), loadings, atol=0.45, rtol=0)


def test_starts_that_agree_and_a_single_start():
    def one_mode():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -2.0]), 2.0).to_event(1))

    guide, diagnosis = fitted(one_mode, num_steps=5)
    assert diagnosis.mode_weights == [1.0] and guide.get_base_dist().has_rsample
    assert "one, to which all of 16 starts have led" in str(diagnosis)
    _, diagnosis = fitted(one_mode, num_steps=5, num_starts=1)
    assert "one start, so other modes would be missed: AutoRealNVP(model, num_starts=16)" in str(diagnosis)
    assert "modes" not in str(rn.diagnose(pyro.infer.autoguide.AutoNormal(one_mode)))


def test_a_single_start_misses_a_mode():
    _, diagnosis = fitted(two_pieces, num_starts=1)
    assert diagnosis.log_evidence < -0.2


def test_state_copies_and_other_clients():
    guide, _ = fitted(two_pieces, num_steps=20)
    again = rn.AutoRealNVP(two_pieces, num_starts=16, num_couplings=4)
    again.build()
    again.load_state_dict(guide.state_dict())
    x = guide.get_posterior().sample((100,))
    torch.testing.assert_close(again.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))
    assert again.median()["z"].shape == (2,) and again.quantiles([0.1, 0.9])["z"].shape == (2, 2)
    with pyro.poutine.trace() as traced:
        guide()
    assert traced.trace.nodes["z"]["value"].shape == (2,)
    rn.fit_guide(guide, num_steps=3, num_particles=1, progress=False)  # fewer draws than modes


def test_few_draws_of_each_component_have_the_right_mean():
    base = rn.MixtureBase(1, num_components=3)
    base.start_at(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.0], [1.0], [10.0]]), torch.full((3, 1, 1), 0.1))
    for num in (1, 2, 6):
        means = [(weights * draws[:, 0]).mean() for draws, weights in (base.rsample_each(num) for _ in range(1000))]
        assert torch.stack(means).mean().item() == pytest.approx(0.3 + 2.0, abs=0.4)


def test_bad_number_of_starts():
    with pytest.raises(ValueError, match="expected num_starts >= 1; got 0"):
        rn.AutoRealNVP(two_pieces, num_starts=0)
