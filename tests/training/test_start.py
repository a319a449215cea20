# SPDX-License-Identifier: Apache-2.0
import copy
import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from helpers import small, table
from sklearn.datasets import make_moons

import pyro_realnvp as rn

FAR = "are far from the base"


def far_rows(num=2000):
    """Years and prices: independent normals, whose entropy is known."""
    return torch.randn(num, 2) * torch.tensor([5.0, 1e5]) + torch.tensor([2015.0, 3e5])


ENTROPY = math.log(2 * math.pi * math.e) + math.log(5.0) + math.log(1e5)


def run(flow, x, num_steps=100, **options):
    return rn.fit(flow, x, num_steps=num_steps, progress=False, seed=0, **options)


def test_far_rows_are_standardized_by_a_layer():
    flow, x = rn.Flow(rn.real_nvp(2, num_couplings=4)), far_rows()
    with pytest.warns(RuntimeWarning, match=r"columns \[0, 1\] of x are far from the base \(column 0 is about 2015"):
        run(flow, x)
    layer = flow.bijection.parts[-1].inv
    assert isinstance(layer, rn.Standardize)
    torch.testing.assert_close(layer.std, torch.tensor([5.0, 1e5]), rtol=0.1, atol=0)
    assert -flow().log_prob(far_rows(20_000)).mean().item() == pytest.approx(ENTROPY, abs=0.03)
    run(flow, x)  # the second time there is nothing to do, and no warning


@pytest.mark.parametrize("unit", [100.0, 0.01])
@pytest.mark.parametrize("kind", ["normal", "mixture"])
def test_a_base_that_was_placed_at_the_data(kind, unit):
    """Couplings read numbers of that size, and about a nat was lost, without a word."""
    y = unit * torch.tensor(make_moons(1000, noise=0.05, random_state=0)[0])
    flow = rn.Flow(small(2), base=PLACED[kind](y)).double()
    to_data = rn.Standardize(2).double().fit(y)
    same = rn.Flow(rn.Compose([copy.deepcopy(flow.bijection), to_data.inv]), base=PLACED[kind](to_data(y)))
    before = flow().log_prob(y)
    with pytest.warns(RuntimeWarning, match=r"columns \[0, 1\] of the base are far from 0 or"):
        run(flow, y, num_steps=1, lr=1e-9)
    torch.testing.assert_close(flow().log_prob(y), before, rtol=0, atol=1e-4)
    assert len(flow.bijection.parts) == 3
    losses = [run(each, y, lr=1e-2).loss for each in (flow, same)]  # nothing is left to do, and there is no warning
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0][-1] < losses[0][0] - 0.1


PLACED = {
    "normal": lambda y: rn.Base(dist.Normal, loc=y.mean(0), scale=y.std(0)),
    "mixture": rn.MixtureBase.for_rows,
}


def test_a_loader_and_bounded_columns():
    x = torch.stack([1e5 * torch.randn(2000).exp(), torch.rand(2000)], -1)
    loader = torch.utils.data.DataLoader(x, batch_size=500, shuffle=True)
    unbound = rn.Unbound([0.0, 0.0], [torch.inf, 1.0])
    flow = rn.Flow(rn.Compose([small(2), unbound.inv]))
    with pytest.warns(RuntimeWarning, match=r"columns \[0\] of x are far from the base"):
        run(flow, loader)
    assert [type(part.inv).__name__ for part in flow.bijection.parts[1:]] == ["Standardize", "Unbound"]
    entropy = math.log(1e5) + 0.5 * math.log(2 * math.pi * math.e)
    assert -flow().log_prob(x).mean().item() == pytest.approx(entropy, abs=0.15)


def test_far_contexts_are_standardized_by_an_embedding():
    """theta ~ N(0, 1), x = 1000 + theta + N(0, 1/2), so that theta given 1001 is N(0.8, 0.2)."""
    torch.manual_seed(0)
    theta = torch.randn(4000, 2)
    x = 1000 + theta + 0.5 * torch.randn(4000, 2)
    flow = rn.Flow(rn.real_nvp(2, num_couplings=4, context_dim=2))
    with pytest.warns(
        RuntimeWarning, match=r"columns \[0, 1\] of the context .* the flow now has embedding=Standardize\(2\)"
    ):
        run(flow, theta, num_steps=400, context=x)
    draws = flow(torch.tensor([1001.0, 999.0])).sample((5000,))
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.8, -0.8]), atol=0.08, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.447), atol=0.05, rtol=0)


@table(
    "x, context",
    {
        "standard": (lambda: torch.randn(500, 2), None),
        "a few extreme rows": (lambda: torch.cat([torch.randn(499, 2), torch.full((1, 2), 1e3)]), None),
        "heavy tails": (lambda: dist.StudentT(1.0).sample((500, 2)), None),
        "rare labels": (lambda: torch.randn(500, 2), lambda: torch.eye(20)[torch.arange(500) % 20]),
    },
)
def test_data_near_the_base_change_nothing(x, context):
    x, context = x(), None if context is None else context()
    flow = rn.Flow(small(2, context_dim=0 if context is None else context.shape[1]))
    parts = list(flow.bijection.parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the held-out rows|the training has raised|.*steps had a loss")
        run(flow, x, num_steps=2, context=context)
    assert list(flow.bijection.parts) == parts and flow.embedding is None


def test_the_user_may_opt_out():
    flow = rn.Flow(small(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the training has raised|.*steps had a loss")
        run(flow, far_rows(), num_steps=2, standardize=False)
    assert len(flow.bijection.parts) == len(small(2).parts)


def test_a_trained_flow_keeps_its_layers():
    flow = rn.Flow(small(2))
    run(flow, 2 * torch.randn(500, 2))
    with pytest.warns(RuntimeWarning, match="the flow is no longer new"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the training has raised|.*steps had a loss")
        run(flow, far_rows(), num_steps=2)
    assert len(flow.bijection.parts) == len(small(2).parts)


def test_a_trained_spline_far_from_its_rows_keeps_its_layers():
    """It is the identity beyond its bound, as a new flow is everywhere."""
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, hidden_dims=(8,), coupling=rn.SplineCoupling))
    run(flow, 2 * torch.rand(500, 2) - 1, num_steps=50)
    before = flow().log_prob(torch.zeros(2)).item()
    with pytest.warns(RuntimeWarning, match="the flow is no longer new"):
        run(flow, torch.rand(500, 2) + 50, num_steps=1, lr=1e-9)
    assert flow().log_prob(torch.zeros(2)).item() == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize(
    "part", [lambda: rn.Permute(torch.tensor([1, 0])), lambda: rn.InvertibleLinear(2, permutation=torch.tensor([1, 0]))]
)
def test_a_permutation_is_new(part):
    """Each entry of the base goes to where the permutation takes it."""
    base = rn.Base(dist.Normal, loc=torch.tensor([100.0, 0.0]), scale=torch.tensor([20.0, 1.0]))
    flow = rn.Flow(rn.Compose([small(2), part(), small(2)]), base=base)
    x = far_rows()
    with pytest.warns(RuntimeWarning, match="of the base are far"), pytest.warns(RuntimeWarning, match=FAR):
        run(flow, x, num_steps=1, lr=1e-9)
    draws = flow().sample((5000,))
    torch.testing.assert_close((draws.mean(0) - x.mean(0)) / x.std(0), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(draws.std(0), x.std(0), rtol=0.1, atol=0)


def test_events_of_several_vectors():
    """They trained in raw units, and were twice as far from the data as they had to be, without a word."""
    x = 50 * torch.randn(1000, 3, 2) + 1000
    flow = rn.Flow(small(2), event_shape=(3, 2))
    with pytest.warns(RuntimeWarning, match=FAR):
        run(flow, x)
    entropy = 6 * (0.5 * math.log(2 * math.pi * math.e) + math.log(50))
    assert -flow().log_prob(x).mean().item() == pytest.approx(entropy, abs=0.1)
    conditional = rn.Flow(rn.real_nvp(2, num_couplings=2, context_dim=1), event_shape=(3, 2))
    with pytest.warns(RuntimeWarning, match=FAR):
        run(conditional, x, context=torch.randn(1000, 1), num_steps=10)
    assert -conditional(torch.zeros(1000, 1)).log_prob(x).mean().item() == pytest.approx(entropy, abs=0.5)


def test_a_base_at_the_data_of_several_vectors_stays():
    loc = torch.arange(4.0)[:, None] * 1000 + torch.zeros(4, 3)
    x = loc + torch.randn(300, 4, 3)
    flow = rn.Flow(small(3), event_shape=(4, 3), base=rn.Base(dist.Normal, loc=loc, scale=torch.ones(4, 3)))
    before = flow().log_prob(x)
    run(flow, x, num_steps=1, lr=1e-9)
    torch.testing.assert_close(flow().log_prob(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("far", [1.0, 1e4])
def test_events_that_have_other_sizes_than_the_base(far):
    simplex = torch.distributions.StickBreakingTransform()
    flow, x = rn.Flow(rn.Compose([small(3), simplex])), dist.Dirichlet(torch.ones(4)).sample((300,))
    run(flow, x, num_steps=3)
    reshape = torch.distributions.ReshapeTransform((2, 2), (4,))
    flow = rn.Flow(rn.Compose([reshape, small(4)]))
    if far > 1:
        with pytest.warns(RuntimeWarning, match=FAR):
            run(flow, far * torch.randn(300, 4), num_steps=3)
    else:
        run(flow, torch.randn(300, 4), num_steps=3)


@pytest.mark.parametrize("df", [1.0, 2.0])
def test_a_base_without_moments_that_was_placed_at_the_data(df):
    base = rn.Base(dist.StudentT, df=torch.tensor(df), loc=torch.full((2,), 500.0), scale=torch.full((2,), 100.0))
    x = base().sample((2000,))
    flow = rn.Flow(small(2), base=base)
    before = flow().log_prob(x)
    with pytest.warns(RuntimeWarning, match="of the base are far"):
        run(flow, x, num_steps=1, lr=1e-9)
    torch.testing.assert_close(flow().log_prob(x), before, rtol=1e-3, atol=1e-2)


def test_a_trained_mixture_keeps_reading_its_own_contexts():
    z = torch.randn(500, 2)
    context = 30 * (z[:, :1] + 0.5 * torch.randn(500, 1))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2).requires_grad_(False))
    flow.base = rn.MixtureBase(2, num_components=2, context_dim=1)
    run(flow, z, context=context, num_steps=50, standardize=False)
    before = flow(context).log_prob(z)
    run(flow, z, context=context, num_steps=1, lr=1e-12)
    torch.testing.assert_close(flow(context).log_prob(z), before, rtol=0, atol=1e-3)


def test_an_embedding_that_passes_on_far_contexts():
    """The flow learned nothing from them."""
    z = torch.randn(500, 2)
    context = 5000 + 100 * (z + 0.5 * torch.randn(500, 2))
    network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

    def flow(*first):
        embedding = torch.nn.Sequential(*first, network)
        return rn.Flow(rn.real_nvp(2, num_couplings=2, context_dim=3), embedding=embedding)

    with pytest.warns(RuntimeWarning, match=r"columns \[0, 1\] of the context .* begin the embedding with Standardize"):
        run(flow(), z, context=context, num_steps=1)
    run(flow(rn.Standardize(2).fit(context)), z, context=context, num_steps=1)


def test_a_trained_flow_keeps_reading_its_own_contexts():
    z = torch.randn(500, 2)
    context = 30 * (z + 0.5 * torch.randn(500, 2))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, context_dim=2))
    run(flow, z, context=context, num_steps=50, standardize=False)
    before = flow(context).log_prob(z)
    run(flow, z, context=context, num_steps=1, lr=1e-9)
    assert flow.embedding is None
    torch.testing.assert_close(flow(context).log_prob(z), before, rtol=0, atol=1e-3)


def test_a_frozen_mixture_stays_as_it_is():
    flow = rn.Flow(small(2), base=rn.MixtureBase(2, num_components=3))
    before = flow.base.requires_grad_(False).start_locs.clone()
    run(flow, torch.randn(500, 2), num_steps=2)
    assert torch.equal(flow.base.start_locs, before)


def test_a_base_elsewhere_is_the_scale():
    base = rn.Base(dist.Normal, loc=torch.tensor([100.0, 0.0]), scale=torch.tensor([20.0, 1.0]))
    x = torch.randn(500, 2) * torch.tensor([20.0, 1.0]) + torch.tensor([100.0, 0.0])
    flow = rn.Flow(small(2), base=base)
    with pytest.warns(RuntimeWarning, match=r"columns \[0\] of the base"):
        run(flow, x, num_steps=2)
    of_base, of_x = (pytest.warns(RuntimeWarning, match=rf"columns \[0\] of {name}") for name in ("the base", "x"))
    with of_base, of_x:
        run(flow := rn.Flow(small(2), base=base), 10 * x, num_steps=2)
    torch.testing.assert_close(
        flow.bijection(torch.tensor([120.0, 0.0])), torch.tensor([1200.0, 0.0]), rtol=0.1, atol=5.0
    )


def test_a_saved_flow_loads_into_one_with_the_layer(tmp_path):
    flow, x = rn.Flow(small(2)), far_rows()
    with pytest.warns(RuntimeWarning, match=FAR):
        run(flow, x, num_steps=10)
    rn.save(flow, tmp_path / "flow.pt")
    other = rn.Flow(rn.Compose([small(2), rn.Standardize(2).inv]))
    rn.load(other, tmp_path / "flow.pt")
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x))


def test_a_resumed_training_gets_the_same_layer(tmp_path):
    x, options = far_rows(), {"checkpoint": tmp_path / "fit.pt", "checkpoint_every": 10}
    flows = [rn.Flow(small(2)), rn.Flow(small(2))]
    flows[1].load_state_dict(flows[0].state_dict())
    with pytest.warns(RuntimeWarning, match=FAR):
        run(flows[0], x, callbacks=[lambda history: len(history.loss) == 20], **options)
    with pytest.warns(RuntimeWarning, match=FAR):
        run(flows[1], x, **options)
    torch.testing.assert_close(flows[1].bijection.parts[-1].inv.mean, flows[0].bijection.parts[-1].inv.mean)


def test_extreme_rows_that_have_set_the_scale_of_the_flows_own_standardization_are_named():
    x = torch.randn(2000, 2)
    x[:5] *= 1e4
    flow = rn.Flow(rn.Compose([rn.real_nvp(2, num_couplings=2), rn.Standardize(2).fit(x).inv]))
    with pytest.warns(RuntimeWarning, match="a few extreme rows have set the scale of its own Standardize"):
        rn.fit(flow, x, num_steps=2, validation=0, progress=False)


def test_a_layer_that_is_added_has_the_mode_of_its_flow():
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2)).eval()
    with pytest.warns(RuntimeWarning, match="Standardize"):
        rn.fit(flow, 100 * torch.randn(60, 2), num_steps=2, progress=False)
    assert not any(module.training for module in flow.modules())


def test_rows_far_from_a_base_of_another_dtype():
    flow, x = rn.Flow(rn.real_nvp(2, num_couplings=2).double()), far_rows().double()
    with pytest.warns(RuntimeWarning, match=FAR):
        run(flow, x, num_steps=20)
    assert flow().log_prob(x).isfinite().all()
