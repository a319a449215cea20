# SPDX-License-Identifier: Apache-2.0
"""Faults that were found in other libraries and must not happen here."""

import copy
import math
import os
import sys
import threading
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import count_evaluations, perturb, small
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import DenseNN, PyroModule, PyroSample
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp import masks
from pyro_realnvp.bijections import foreign


def standard(dim, dtype=torch.float32):
    return dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1)


def narrow_model():
    pyro.sample("z", dist.Normal(5.0, 0.1).expand([4]).to_event(1))


@pytest.mark.slow
def test_a_flow_guide_moves_every_coordinate():
    guide = AutoNormalizingFlow(narrow_model, partial(rn.real_nvp, num_couplings=4))
    svi = SVI(
        narrow_model,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.996}),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    for _ in range(500):
        svi.step()
    z = Predictive(narrow_model, guide=guide, num_samples=4000)()["z"].squeeze(1)
    torch.testing.assert_close(z.mean(0), torch.full((4,), 5.0), rtol=0.02, atol=0)
    torch.testing.assert_close(z.std(0), torch.full((4,), 0.1), rtol=0.15, atol=0)


def test_a_stack_that_never_changes_an_entry_is_refused():
    def coupling(mask):
        return rn.AffineCoupling(mask, rn.MLP(mask.num_kept, 2 * mask.num_changed))

    with pytest.raises(ValueError, match=r"never changes entries \[0, 1\]"):
        rn.Compose([coupling(masks.half(4)) for _ in range(4)])
    with pytest.raises(ValueError, match=r"never changes entries \[0, 1\]"):
        rn.real_nvp(4, mask_cycle=[masks.half(4)])
    with pytest.raises(ValueError, match=r"never changes entries \[0, 1\]"):
        rn.Compose([coupling(masks.half(4)), rn.ActNorm(4).inv, coupling(masks.half(4)).inv])
    shared = coupling(masks.half(4))
    with pytest.raises(ValueError, match="never changes"):
        rn.Compose([shared, shared])
    rn.Compose([coupling(masks.half(4)), rn.Permute(torch.tensor([2, 3, 0, 1])), coupling(masks.half(4))])
    rn.Compose([coupling(masks.half(4)), rn.Permute(torch.tensor([2, 3, 0, 1])).inv, coupling(masks.half(4))])
    rn.Compose([coupling(masks.half(4)), rn.ActNorm(4)])  # one coupling may be a part of a larger flow


def test_scoring_after_an_edit_is_not_stale():
    flow, x = perturb(small(3, hidden_dims=(16,))), torch.randn(5, 3)
    d = dist.TransformedDistribution(standard(3), [flow])
    before = d.log_prob(x)
    with torch.no_grad():
        flow.parts[0].conditioner.last.bias.add_(0.5)
    assert not torch.equal(d.log_prob(x), before)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_what_a_bijection_returns_may_be_written_into(with_gradients):
    """The memory gave out its own log-determinant, and the very tensor that a user had once passed."""
    f = perturb(small(2))
    x = torch.randn(5, 2)
    expected = f.log_abs_det_jacobian(x, f.forward_and_ladj(x)[0]).clone()
    with torch.set_grad_enabled(with_gradients):
        y = f(x)
        ladj, back = f.log_abs_det_jacobian(x, y), f.inv(y)
    before = x.clone()
    with torch.no_grad():
        ladj += 10
        back += 5
    assert torch.equal(x, before)
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(f.log_abs_det_jacobian(x, y), expected)
        torch.testing.assert_close(f.inv.log_abs_det_jacobian(y, x), -expected)
        torch.testing.assert_close(f.inv(y), x)


@pytest.mark.parametrize(
    "read", [lambda f, y: f.inv(y), lambda f, y: torch.func.grad(lambda t: (f.inv(y) * t).sum())(torch.ones(5, 2))]
)
def test_a_memory_that_was_read_in_another_mode_is_not_stale(read):
    """A copy without a version counter, of the inference mode or of torch.func, seemed to be fresh for ever."""
    f = perturb(small(2))
    d = dist.TransformedDistribution(standard(2), [f])
    with torch.no_grad():
        y = d.sample((5,))
    with torch.inference_mode():
        read(f, y)
    read(f, y)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.1)
    torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))
    assert d.log_prob(y).requires_grad


def test_the_way_back_keeps_the_memory():
    f, x = perturb(small(2)), torch.randn(5, 2)

    def there_and_back():
        y = f(x)
        for _ in range(3):
            back = f.inv(y)
            f.log_abs_det_jacobian(back, y)
            f.log_abs_det_jacobian(x, y)

    assert count_evaluations(f, there_and_back) == {1}


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.Adam, fused=True), torch.optim.SGD], ids=["fused Adam", "SGD"]
)
def test_a_kept_sample_is_rescored_after_training(optimizer):
    """Fused optimizers change parameters without raising their version counters."""
    flow, x = perturb(small(3, hidden_dims=(16,))), torch.randn(5, 3)
    d = dist.TransformedDistribution(standard(3), [flow])
    opt = optimizer(flow.parameters(), lr=0.1)
    with torch.no_grad():
        sample = d.sample((7,))
        latent = flow.inv(x)
        before = d.log_prob(sample)
    d.log_prob(x).mean().backward()
    opt.step()
    with torch.no_grad():
        assert not torch.equal(d.log_prob(sample), before)
        torch.testing.assert_close(d.log_prob(sample), d.log_prob(sample.clone()))
        assert not torch.equal(flow.inv(x), latent)


def test_full_batch_training_on_one_tensor():
    flow, x = small(3, hidden_dims=(16,)), torch.randn(50, 3) * 0.3
    d = dist.TransformedDistribution(standard(3), [flow])
    opt = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = -d.log_prob(x).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_scoring_under_no_grad_before_training():
    flow, x = perturb(small(3, hidden_dims=(16,))), torch.randn(5, 3)
    d = dist.TransformedDistribution(standard(3), [flow])
    with torch.no_grad():
        z = d.log_prob(x), flow.inv(x)
    d.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert len(z) == 2


def test_permutations_and_masks_are_part_of_the_state():
    def make():
        couplings = [rn.AffineCoupling(masks.random(6), rn.MLP(3, 6)) for _ in range(2)]
        return rn.Compose(
            [couplings[0], T.permute(6), rn.Permute(torch.randperm(6)), couplings[1], rn.InvertibleLinear(6)]
        )

    torch.manual_seed(1)
    saved, x = perturb(make()), torch.randn(5, 6)
    torch.manual_seed(2)
    fresh = make()
    assert not torch.allclose(fresh(x), saved(x))
    fresh.load_state_dict(saved.state_dict())
    torch.testing.assert_close(fresh(x), saved(x), rtol=0, atol=0)
    torch.testing.assert_close(fresh.inv(x), saved.inv(x), rtol=0, atol=0)
    fresh.to("meta")
    assert {t.device.type for t in fresh.state_dict().values()} == {"meta"}
    assert fresh.parts[0].mask.order.device.type == fresh.parts[2].inverse_permutation.device.type == "meta"


def test_copies_after_use_with_a_foreign_part():
    flow, x = rn.Compose([small(2, hidden_dims=(16,)), T.Spline(2), T.AffineTransform(1.0, 2.0)]), torch.randn(5, 2)
    flow(x), flow.inv(x), dist.TransformedDistribution(standard(2), [flow]).log_prob(x)
    torch.testing.assert_close(copy.deepcopy(flow)(x), flow(x))


def test_a_foreign_part_is_not_stale():
    flow, x = rn.Compose([small(2, hidden_dims=(16,)), T.Spline(2)]), torch.randn(5, 2)
    d = dist.TransformedDistribution(standard(2), [flow])
    for _ in range(3):
        d.log_prob(x).sum().backward()
    before = d.log_prob(x)
    with torch.no_grad():
        flow.parts[1].transform.unnormalized_heights.add_(torch.randn(2, 8))
    assert not torch.equal(d.log_prob(x), before)


def test_the_inverse_of_a_foreign_part_is_not_stale():
    transform = T.AffineTransform(torch.zeros(2), torch.ones(2))
    f, y = rn.Compose([transform.inv]), torch.randn(5, 2)
    x = f(y)
    f.log_abs_det_jacobian(y, x)
    transform.scale = torch.full((2,), 3.0)
    torch.testing.assert_close(f.log_abs_det_jacobian(y, x), torch.full((5, 2), -math.log(3)))


class Scaled(torch.nn.Module):
    """A conditioner with all kinds of plain attributes, each of which changes what it returns."""

    def __init__(self):
        super().__init__()
        self.net = rn.MLP(1, 2, hidden_dims=(8,))
        self.weight = torch.ones(2)
        self.factors = {"one": torch.ones(2), "more": [1.0, torch.ones(2)]}
        self.activation = torch.tanh
        self.shift = None

    def forward(self, x, context=None):
        one, (number, two) = self.factors["one"], self.factors["more"]
        raw = self.activation(self.net(x)) * self.weight * one * number * two
        return raw if self.shift is None else raw + self.shift


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net, "weight", torch.full((2,), 2.0)),
        lambda net: net.weight.mul_(2.0),
        lambda net: net.factors.update(one=torch.full((2,), 2.0)),
        lambda net: net.factors["more"].__setitem__(0, 2.0),
        lambda net: net.factors["more"][1].mul_(2.0),
        lambda net: setattr(net, "activation", torch.sin),
        lambda net: setattr(net, "shift", 1.0),
        lambda net: setattr(net, "forward", lambda x, context=None: x.expand(-1, 2)),
        lambda net: setattr(net.net, "forward", lambda x, context=None: x.expand(-1, 2)),
    ],
)
def test_plain_attributes_of_a_conditioner_of_ones_own_are_not_stale(edit):
    net = perturb(Scaled())
    f, x = rn.AffineCoupling(masks.half(2), net), torch.randn(5, 2)
    y = f(x)
    before = f.log_abs_det_jacobian(x, y)
    assert f.log_abs_det_jacobian(x, y) is before  # remembered
    edit(net)
    torch.testing.assert_close(f.log_abs_det_jacobian(x, y), f.forward_and_ladj(x)[1])


class OwnCache(torch.nn.Linear):
    _cached = 1.0

    def forward(self, x):
        return self._cached * super().forward(x)


@pytest.mark.parametrize("net", [DenseNN(1, [4], [2]), PyroModule[nn.Linear](1, 2), nn.GRU(1, 2), OwnCache(1, 2)])
def test_networks_of_torch_and_pyro_are_remembered(net):
    class First(nn.Module):
        """A recurrent layer also returns its state."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            out = self.net(x)
            return out[0] if isinstance(out, tuple) else out

    f, x = rn.AffineCoupling(masks.half(2), First()), torch.randn(5, 2)
    y = f(x)
    before = f.log_abs_det_jacobian(x, y)
    assert f.log_abs_det_jacobian(x, y) is before
    net._cached = 2.0
    assert f.log_abs_det_jacobian(x, y) is not before
    torch.testing.assert_close(f.log_abs_det_jacobian(x, y), f.forward_and_ladj(x)[1])


def test_functions_of_a_bijection_of_ones_own_are_not_stale():
    class Scale(rn.Bijection):
        elementwise = True

        def __init__(self, scale):
            super().__init__((2,))
            self.scale = scale

        def forward_and_ladj(self, x, context=None):
            return x * self.scale(), 2 * self.scale().log().expand(x.shape[:-1])

        def inverse_and_ladj(self, y, context=None):
            return y / self.scale(), -2 * self.scale().log().expand(y.shape[:-1])

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    x = torch.randn(5, 2)
    for old, new in (
        (lambda: one, lambda: two),
        (one.clone, two.clone),
        (partial(torch.abs, one), partial(torch.abs, two)),
    ):
        f = Scale(old)
        y = f(x)
        assert f.log_abs_det_jacobian(x, y).sum() == 0
        f.scale = new
        torch.testing.assert_close(f.log_abs_det_jacobian(x, y), torch.full((5,), 2 * math.log(2)))


def test_a_part_replaced_by_another_part_is_not_stale():
    one, two = perturb(small(2)), perturb(small(2))
    f = rn.Compose([one, one, two])
    d = dist.TransformedDistribution(standard(2), [f])
    y = d.rsample((5,))
    before = d.log_prob(y)
    f.parts[1] = two
    assert not torch.equal(d.log_prob(y), before)
    torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))


class Grouped(nn.Module):
    """A conditioner whose plain attributes matter by how they are nested, named and shared."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([perturb(rn.MLP(1, 2, hidden_dims=(4,))) for _ in range(2)])
        self.active = self.experts[0]
        self.heads = nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Sequential(nn.Linear(2, 2))])
        self.register_buffer("low", torch.tensor(0.25))
        self.register_buffer("high", torch.tensor(0.5))
        self.groups = [[1.0, 2.0], [3.0]]
        self.options = {"scale": 0.5}
        self.scale = torch.ones(1)
        self.times = self.scale.mul
        self.shift = self._shift

    def _shift(self, raw, by=[0.0]):  # noqa: B006
        return raw + by[0]

    def forward(self, x):
        first, last = (sum(group) for group in self.groups)
        raw = first * self.active(x) + last * x
        raw = self.high * self.heads["first"](raw) - self.low * self.heads["last"](raw)
        raw = self.blocks[1](2 * self.blocks[0](raw))
        raw = raw * self.options["scale"] if "scale" in self.options else raw + self.options["shift"]
        return self.times(self.shift(raw))


def rename(held, *names):
    """Gives what a dictionary holds other names, in the same order."""
    values = list(held.values())
    held.clear()
    held.update(zip(names, values, strict=True))


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net, "active", net.experts[1]),
        lambda net: setattr(net, "groups", [[1.0], [2.0, 3.0]]),
        lambda net: net.groups[1].append(net.groups[0].pop()),
        lambda net: net.groups[1].insert(0, net.groups[0].pop()),
        lambda net: rename(net.heads._modules, "last", "first"),
        lambda net: rename(net._buffers, "high", "low"),
        lambda net: net.blocks[1].insert(0, net.blocks[0].pop(1)),
        lambda net: net.options.__setitem__("shift", net.options.pop("scale")),
        lambda net: setattr(net, "options", {"shift": 0.5}),
        lambda net: net.scale.mul_(2.0),
        lambda net: Grouped._shift.__defaults__[0].__setitem__(0, 1.0 + Grouped._shift.__defaults__[0][0]),
    ],
)
def test_how_a_conditioner_holds_its_attributes_is_not_stale(edit):
    net = Grouped()
    f, x = rn.AffineCoupling(masks.half(2), net), torch.randn(5, 2)
    y = f(x)
    before = f.log_abs_det_jacobian(x, y)
    assert f.log_abs_det_jacobian(x, y) is before
    edit(net)
    assert not torch.equal(f.log_abs_det_jacobian(x, y), before)


def test_what_pyro_draws_at_each_reading_is_not_remembered():
    net = PyroModule[nn.Linear](1, 2)
    net.weight = PyroSample(lambda self: dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
    f, x = rn.AffineCoupling(masks.half(2), net), torch.randn(5, 2)
    found, y = [], None
    for weight in (torch.tensor([[2.0], [1.0]]), torch.tensor([[-2.0], [1.0]])):
        with poutine.condition(data={"weight": weight}):
            y = f(x) if y is None else y
            found.append(f.log_abs_det_jacobian(x, y))
    assert not torch.equal(*found)


class Slotted(nn.Linear):
    __slots__ = ("times",)


@pytest.mark.parametrize(("net", "name", "value"), [(Scaled(), "array", np.ones(2)), (Slotted(1, 2), "times", 2.0)])
def test_a_conditioner_with_what_nobody_can_watch_is_not_remembered(net, name, value):
    setattr(perturb(net), name, value)
    f, x = rn.AffineCoupling(masks.half(2), net), torch.randn(5, 2)
    y = f(x)
    assert f.log_abs_det_jacobian(x, y) is not f.log_abs_det_jacobian(x, y)


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.tensor([2.0]), torch.full((4,), 2.0), 2.0])
def test_a_scale_of_one_number_counts_for_each_entry(scale):
    """Torch's AffineTransform of a vector counts it once."""
    x = torch.randn(5, 4)
    transform = T.AffineTransform(torch.zeros(4), scale, event_dim=1)
    for f, sign in ((rn.Compose([transform]), 1), (rn.Compose([transform.inv]), -1)):
        expected = torch.full((5,), sign * 4 * math.log(2))
        torch.testing.assert_close(f.log_abs_det_jacobian(x, f(x)), expected)
        torch.testing.assert_close(f.inv.log_abs_det_jacobian(f(x), x), -expected)


def test_an_elu_takes_the_values_below_zero():
    """Pyro declares positive numbers as its codomain."""
    x = torch.randn(20, 4)
    for f in (rn.Compose([T.ELUTransform()]), rn.Compose([T.ELUTransform().inv]).inv, rn.Compose([T.elu(), T.elu()])):
        y = f(x)
        assert y.min() < 0
        torch.testing.assert_close(f.inv(y.clone()), x, rtol=1e-4, atol=1e-4)
        flow = rn.Flow(f, event_shape=(4,))
        assert flow().log_prob(y.clone()).isfinite().all()


@pytest.mark.slow
def test_a_log_scale_beyond_the_bound_comes_back():
    """Behind a hard clip the raw value runs away, and it never returns, since its gradient is zero there."""
    mask = masks.half(2)
    f = rn.AffineCoupling(mask, rn.MLP(1, 2, hidden_dims=(32,)))
    opt = torch.optim.Adam(f.parameters(), lr=1e-2)

    def steps_until(scale, wanted, limit):
        for step in range(limit):
            latent, ladj = f.inverse_and_ladj(torch.randn(256, 2) * torch.tensor([1.0, scale]))
            loss = (0.5 * latent.square().sum(-1) - ladj).mean() + math.log(2 * math.pi)
            if loss < wanted:
                return step
            opt.zero_grad()
            loss.backward()
            opt.step()
        return limit

    steps_until(1e-4, -math.inf, 3000)  # the best log-scale, -9.2, lies far beyond the bound of 3
    raw, _ = f.read(torch.zeros(1, 1), None)
    assert f.log_scale(raw).item() < -2.5
    assert steps_until(1.0, 2.95, 3000) < 1500  # a perfect fit scores 2.84


def test_float32_round_trip_of_a_deep_flow():
    """A new and a perturbed flow of 32 couplings in 20 dimensions, with inputs of standard deviation 10."""
    x = 10 * torch.randn(1000, 20)
    flow = rn.real_nvp(20, num_couplings=32)
    assert torch.equal(flow.inv(flow(x).clone()), x)
    perturb(flow, 0.05)
    for there in (flow, flow.inv):
        y = there(x)
        assert (y - x).abs().max() > 1
        assert ((there.inv(y.clone()) - x).abs() / x.abs().clamp(min=1)).max() < 1e-3


@pytest.mark.parametrize("batch_shape", [(3,), (2, 3), ()], ids=str)
def test_conditional_flows_have_the_batch_shape_of_their_context(batch_shape):
    flow = perturb(small(2, hidden_dims=(16,), context_dim=4))
    d = dist.ConditionalTransformedDistribution(standard(2), [flow]).condition(torch.randn(*batch_shape, 4))
    assert d.batch_shape == batch_shape
    assert d.sample().shape == (*batch_shape, 2)
    assert d.sample((5,)).shape == (5, *batch_shape, 2)
    assert d.log_prob(torch.zeros(2)).shape == batch_shape
    assert d.log_prob(torch.zeros(*batch_shape, 2)).shape == batch_shape
    assert d.log_prob(torch.zeros(7, *(1 for _ in batch_shape), 2)).shape == (7, *batch_shape)


def test_conditional_flows_train_their_parameters_and_their_encoder():
    encoder, flow = nn.Linear(6, 4), perturb(small(2, hidden_dims=(16,), context_dim=4))
    d = dist.ConditionalTransformedDistribution(standard(2), [flow]).condition(encoder(torch.randn(3, 6)))
    d.log_prob(torch.randn(3, 2)).sum().backward()
    assert all(p.grad is not None for p in (*encoder.parameters(), *flow.parameters()))
    assert copy.deepcopy(d.transforms[0])(torch.zeros(3, 2)).shape == (3, 2)


def test_modules_keep_working_in_torchs_wrappers():
    flow, x = perturb(small(3, hidden_dims=(16,))), torch.randn(4, 3)
    assert len(list(flow.inv.parameters())) == len(list(flow.parameters())) > 0
    assert flow.with_cache(0) is flow
    independent = torch.distributions.IndependentTransform(flow, 1)
    assert independent.log_abs_det_jacobian(x, flow(x)).shape == ()
    mapped = torch.vmap(flow)(x)
    torch.testing.assert_close(flow(x), mapped)
    flow.inv(x).sum().backward()


class TestNormalizationIsNotConsumedByAccident:
    def flow(self):
        return rn.Flow(small(3, hidden_dims=(16,), between=lambda dim: rn.ActNorm(dim).inv))

    def norms(self, flow):
        return [m for m in flow.modules() if isinstance(m, rn.ActNorm)]

    def test_only_a_training_pass_over_data_initializes(self):
        flow, x = self.flow(), torch.randn(50, 3) * 2 + 5
        flow().sample((10,)), flow().rsample((10,))  # sampling
        with torch.no_grad():
            flow().log_prob(x)  # scoring
        flow.eval()
        flow().log_prob(x)
        flow.train()
        flow().log_prob(x[:1])  # a single row
        assert not any(norm.initialized for norm in self.norms(flow))
        flow().log_prob(x)
        assert all(norm.initialized for norm in self.norms(flow))

    def test_the_flag_is_saved(self):
        flow, x = self.flow(), torch.randn(50, 3) * 2 + 5
        flow().log_prob(x)
        fresh = self.flow()
        fresh.load_state_dict(flow.state_dict())
        before = fresh().log_prob(x)
        fresh().log_prob(10 * x)  # a training pass would initialize again
        torch.testing.assert_close(fresh().log_prob(x), before, rtol=0, atol=0)

    def test_single_rows_and_constant_columns_leave_finite_values(self):
        for make in (rn.ActNorm, rn.BatchNorm):
            f = make(3)
            for x in (torch.randn(1, 3), torch.randn(3), torch.ones(10, 3)):
                y, ladj = f.forward_and_ladj(x)
                assert y.isfinite().all()
                assert ladj.isfinite().all()

    def test_scoring_does_not_move_the_statistics(self):
        f, x = rn.BatchNorm(3), torch.randn(50, 3) + 5
        with torch.no_grad():
            f(x)
        f.eval()
        f(x)
        f.train()
        f.inv(x)
        assert torch.equal(f.mean, torch.zeros(3))
        f(x)
        assert (f.mean > 0.3).all()
        mean = f.mean.clone()
        f(torch.full((5, 3), torch.nan))
        assert torch.equal(f.mean, mean)


def test_parameters_that_were_only_lent_are_not_remembered():
    """functional_call replaces the parameters for the duration of one call."""
    flow, x = perturb(small(3, hidden_dims=(16,))), torch.randn(5, 3)
    flow.inv(flow(x))
    with torch.no_grad():
        expected = flow.inv(flow(x).clone())
        y = torch.func.functional_call(flow, {k: 2 * p for k, p in flow.named_parameters()}, (x,))
        torch.testing.assert_close(flow.inv(y), flow.inv(y.clone()), rtol=0, atol=0)
        torch.testing.assert_close(expected, x, rtol=1e-4, atol=1e-4)
        flow.parts[0].max_log_scale = 0.1
        y = flow(x)
        flow.parts[0].max_log_scale = 3.0
        torch.testing.assert_close(flow.inv(y), flow.inv(y.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("foreign", [None, T.affine_coupling, T.spline_coupling, T.affine_autoregressive])
def test_threads_share_a_flow(foreign):
    """A bijection remembers its last evaluation, and must not mix up those of several threads. Nor must it let them
    meet in a transform of Pyro's, which keeps on itself what its log-determinant needs."""
    parts = [small(2, hidden_dims=(16,))] + ([] if foreign is None else [foreign(2, hidden_dims=[8])])
    flow = perturb(rn.Flow(rn.Compose(parts))).eval()
    answers, errors = [], []

    def serve():
        try:
            for _ in range(60):
                with torch.no_grad():
                    x = flow().sample((20,))
                    answers.append(torch.allclose(flow().log_prob(x), flow().log_prob(x.clone()), atol=1e-3))
                    z = flow.bijection.inv(x)
                    ladj = flow.bijection.log_abs_det_jacobian(z, x)
                    answers.append(torch.allclose(ladj, flow.bijection.forward_and_ladj(z)[1], atol=1e-3))
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and len(answers) == 720 and all(answers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_a_thread_is_in_a_transform_of_pyros():
    """The child has a copy of the lock, but not the thread that would open it."""
    lock = foreign._ONE_THREAD.lock
    held, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        os._exit(not foreign._ONE_THREAD.lock.acquire(timeout=5))
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
