# SPDX-License-Identifier: Apache-2.0
"""The laws that every bijection obeys, over the registry."""

import copy
import gc
import io
import pickle
import weakref
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import NETWORKS, count_evaluations, few
from hypothesis import given
from hypothesis import strategies as st
from registry import CASES, bijections, bounds_of, event_of, outputs, values
from torch.func import functional_call, jacrev, vmap
from torch.optim import swa_utils

import pyro_realnvp as rn
from pyro_realnvp.bijections.foreign import Foreign
from pyro_realnvp.inference.coordinates import FromRelative

over_registry = pytest.mark.parametrize("case", CASES, ids=repr)
over_plain = pytest.mark.parametrize("case", [case for case in CASES if case.plain], ids=repr)


def base_of(f, validate_args=None):
    """A base whose support is f's domain."""
    zeros = torch.zeros(event_of(f), dtype=torch.float64)
    low, high = bounds_of(f)
    base = dist.Normal(zeros, 1.0, validate_args=validate_args)
    if low > -1e9 or high < 1e9:
        base = dist.Uniform(zeros + max(low, -50.0), zeros + min(high, 50.0), validate_args=validate_args)
    return base.to_event(f.domain.event_dim)


def flow_of(f):
    shape = f.forward_shape(event_of(f))
    return rn.Flow(f, shape[len(shape) - f.codomain.event_dim :], base=lambda: base_of(f, validate_args=False)).double()


def batch_of(x, event_dim):
    return x.shape[: x.dim() - event_dim]


def autograd_ladj(f, x):
    """log|det dy/dx| of each event, from the Jacobian."""
    x = x.expand(f.inverse_shape(f.forward_shape(x.shape))).clone().requires_grad_()
    batch_shape = batch_of(x, f.domain.event_dim)
    entries = f(x).reshape(*batch_shape, -1) if x.numel() else x.reshape(*batch_shape, 0)
    rows = [torch.autograd.grad(entry.sum(), x, retain_graph=True)[0] for entry in entries.unbind(-1)]
    if not rows:
        return x.new_zeros(batch_shape)
    jacobian = torch.stack([row.reshape(*batch_shape, -1) for row in rows], -2)
    return torch.linalg.slogdet(jacobian).logabsdet


def test_registry_is_complete():
    def below(cls):
        return {cls}.union(*(below(c) for c in cls.__subclasses__()))

    public = {
        c for c in below(rn.Bijection) if c.__module__.startswith("pyro_realnvp") and not c.__name__.startswith("_")
    }
    # Foreign wraps transforms of Pyro and torch, which need not obey all laws. The case "mixed" contains some of them.
    # FromRelative belongs to a model; its tests are in tests/inference/test_models.py.
    others = {rn.Bijection, rn.Coupling, Foreign, FromRelative}
    assert public - others == {case.covers for case in CASES}


@over_registry
@given(data=st.data())
def test_round_trip(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, magnitude=case.largest))
    y, ladj = f.forward_and_ladj(x)
    back, back_ladj = f.inverse_and_ladj(y)
    torch.testing.assert_close(back, x.expand_as(back), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-6, atol=1e-6)
    x, ladj = f.inverse_and_ladj(y)
    torch.testing.assert_close(f.forward_and_ladj(x)[0], y, rtol=1e-6, atol=1e-6)


@over_registry
@given(data=st.data())
def test_ladj_is_that_of_the_jacobian(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f))
    expected = autograd_ladj(f, x)
    torch.testing.assert_close(f.forward_and_ladj(x)[1].expand_as(expected), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(f.log_abs_det_jacobian(x, f(x)).expand_as(expected), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(autograd_ladj(f.inv, f(x).detach()), -expected, rtol=1e-6, atol=1e-6)


@over_registry
@given(data=st.data())
def test_shapes_and_dtypes(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64] if case.plain else [torch.float64]))
    f, x = f.to(dtype), x.to(dtype)
    y, ladj = f.forward_and_ladj(x)
    assert y.shape == f.forward_shape(x.shape) and ladj.shape == batch_of(y, f.codomain.event_dim)
    back, back_ladj = f.inverse_and_ladj(y)
    assert back.shape == f.inverse_shape(y.shape) and back_ladj.shape == batch_of(back, f.domain.event_dim)
    assert {y.dtype, ladj.dtype, back.dtype, back_ladj.dtype} == {dtype}
    assert f.domain.event_dim == f.codomain.event_dim == len(f.event_shape) == f.event_dim
    batch_shape = batch_of(x, f.event_dim)
    for wrong in [batch_shape + (7,) * f.event_dim, ()] if f.event_dim else []:
        with pytest.raises(ValueError, match="expected"):
            f(torch.zeros(wrong, dtype=dtype))


@over_registry
@given(data=st.data())
def test_gradients_are_finite(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, magnitude=case.largest)).requires_grad_()
    y, ladj = f.forward_and_ladj(x)
    grads = torch.autograd.grad((y.sum() + ladj.sum()), [x, *f.parameters()], allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)


@over_registry
@given(data=st.data())
def test_one_evaluation(case, data):
    f = data.draw(bijections(case))
    y = data.draw(outputs(f))
    d = dist.TransformedDistribution(base_of(f), [f])
    in_compose = dist.TransformedDistribution(base_of(f), [rn.Compose([f, T.AffineTransform(0.0, 1.0)])])
    inverse_of_inverse = dist.TransformedDistribution(base_of(f), [rn.Compose([f]).inv.inv])
    one = {1} if any(isinstance(m, NETWORKS) for m in f.modules()) else set()
    for p in (d, in_compose, inverse_of_inverse):
        assert count_evaluations(f, lambda p=p: p.log_prob(y)) == one
        assert count_evaluations(f, lambda p=p: p.log_prob(p.rsample())) == one

    def ladj_of_both():
        x = f.inv(y)
        f.inv.log_abs_det_jacobian(y, x), f.log_abs_det_jacobian(x, y), f(x)

    assert count_evaluations(f, ladj_of_both) == one
    flow = flow_of(f)
    assert count_evaluations(f, lambda: flow().log_prob(y)) == one
    assert count_evaluations(f, lambda: flow().log_prob(flow().rsample())) == one
    assert count_evaluations(f, lambda: flow().rsample_and_log_prob((2,))) == one


# An edit may change the domain, so that a value lies outside of it. Both results are nan then, and count as equal.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def fused_adam_step(f):
    opt = torch.optim.Adam(f.parameters(), lr=0.1, fused=True)
    for p in f.parameters():
        p.grad = torch.ones_like(p)
    opt.step()


@torch.no_grad()
def add_in_place(f):
    for p in f.parameters():
        p.add_(0.1)


def assign_data(f):
    for p in f.parameters():
        p.data = p.data + 0.1


def load_other_state(f):
    f.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in f.state_dict().items()})


@torch.no_grad()
def edit_buffers(f):
    for b in f.buffers():
        if b.is_floating_point():
            b.mul_(1.1)


@over_registry
@pytest.mark.parametrize("edit", [fused_adam_step, add_in_place, assign_data, load_other_state, edit_buffers])
@few(10)
@given(data=st.data())
def test_never_stale(case, edit, data):
    f = data.draw(bijections(case))
    if not (list(f.parameters()) if edit is fused_adam_step else True):
        return
    with torch.set_grad_enabled(data.draw(st.booleans(), label="grad")):
        x = data.draw(values(f, batch_shapes=((), (3,))))
        y = f(x)  # all outputs stay alive, as if a user kept them
        x_of_y = f.inv(data.draw(outputs(f, batch_shapes=((), (3,)))))
        edit(f)
        fresh = copy.deepcopy(f)
        for value in (x.clone(), x_of_y.clone()):
            assert_identical(f(value), fresh.forward_and_ladj(value)[0])
        assert_identical(f.inv(y), fresh.inverse_and_ladj(y)[0])
        assert_identical(f(x_of_y), fresh.forward_and_ladj(x_of_y)[0])
        assert_identical(f.log_abs_det_jacobian(x, y), fresh.forward_and_ladj(x)[1])
        d = dist.TransformedDistribution(base_of(f), [f])
        expected = dist.TransformedDistribution(base_of(f), [fresh]).log_prob(y)
        assert_identical(d.log_prob(y), expected)


@over_registry
@given(data=st.data())
def test_grad_mode_is_not_mixed_up(case, data):
    f = data.draw(bijections(case))
    y = data.draw(outputs(f, batch_shapes=((3,),)))
    d = dist.TransformedDistribution(base_of(f), [f])
    with torch.no_grad():
        sample = d.sample((3,))
        d.log_prob(y), d.log_prob(sample)
    trained = [p for p in f.parameters() if p.requires_grad]
    for value in (y, sample):
        loss = d.log_prob(value).sum()
        assert loss.requires_grad == bool(trained)
        if trained:
            assert all(g is not None for g in torch.autograd.grad(loss, trained))
    for _ in range(3):  # full-batch training on one tensor
        if trained:
            d.log_prob(y).sum().backward()


@over_registry
@given(data=st.data())
def test_in_place_edits_of_values_are_seen(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    with torch.no_grad():
        y = f(x)
        y.mul_(0.9)
        torch.testing.assert_close(f.inv(y), f.inv(y.clone()), rtol=0, atol=0)
        y = f(x)
        x.mul_(0.9)
        torch.testing.assert_close(f.inv(y), f.inv(y.clone()), rtol=0, atol=0)
    y = f(x).detach()
    y.requires_grad_()
    assert torch.autograd.grad(f.inv(y).sum(), y)[0].shape == y.shape


@over_registry
@given(data=st.data())
def test_two_draws_scored_out_of_order(case, data):
    f = data.draw(bijections(case))
    d = dist.TransformedDistribution(base_of(f), [f])
    first, second = d.rsample((3,)), d.rsample()
    torch.testing.assert_close(d.log_prob(first), d.log_prob(first.clone()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.log_prob(second), d.log_prob(second.clone()), rtol=1e-6, atol=1e-6)


@over_registry
@few(3)
@given(data=st.data())
def test_memory_dies_with_the_output(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),))).clone().requires_grad_()
    alive = weakref.ref(x)
    y = f(x)
    f.log_abs_det_jacobian(x, y)
    x2 = f.inv(y.detach())
    f.inv.log_abs_det_jacobian(y, x2)
    del x, y, x2
    gc.collect()
    assert alive() is None
    assert all(m._memo._last is None for m in f.modules() if isinstance(m, rn.Bijection))


@over_registry
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "inverse"])
@few(3)
@given(data=st.data())
def test_an_input_dies_with_the_output_of_the_last_evaluation(case, forward, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    f = f if forward else f.inv
    x = (x if forward else f.inv(x)).detach().clone().requires_grad_()
    alive = weakref.ref(x)
    y = f(x)
    ladj = f.log_abs_det_jacobian(x, y)
    assert y.grad_fn is not None and ladj is not None
    del x, y, ladj
    gc.collect()
    assert alive() is None


@over_registry
@given(data=st.data())
def test_copies_and_pickles(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    before = len(pickle.dumps(f))
    some_y = data.draw(outputs(f, batch_shapes=((3,),)))
    y, x_of_y = f(x), f.inv(some_y)
    assert len(pickle.dumps(f)) == before or not case.plain, "a pickle carries cached data"
    buffer = io.BytesIO()
    torch.save(f, buffer)
    buffer.seek(0)
    for clone in (
        copy.deepcopy(f),
        pickle.loads(pickle.dumps(f)),
        torch.load(buffer, weights_only=False),
        copy.copy(f),
    ):
        torch.testing.assert_close(clone(x), y, rtol=0, atol=0)
        torch.testing.assert_close(clone.inv(some_y), x_of_y, rtol=0, atol=0)
    clone = copy.deepcopy(f.inv)
    torch.testing.assert_close(clone(some_y), x_of_y, rtol=0, atol=0)


@over_plain
@given(data=st.data())
def test_state_dict_restores_the_function(case, data):
    """This holds for random masks and permutations too, since they are part of the state."""
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    fresh = copy.deepcopy(f)
    for module in fresh.modules():
        if isinstance(module, rn.Permute):
            rn.Permute.__init__(module, torch.randperm(module.event_shape[0]))
    load = fresh.double()
    for p in load.parameters():
        torch.nn.init.normal_(p)
    load.load_state_dict(f.state_dict())
    torch.testing.assert_close(load(x), f(x), rtol=0, atol=0)
    assert set(f.inv.state_dict()) == {f"bijection.{k}" for k in f.state_dict()} or isinstance(f, rn.Inverse)


@over_registry
@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}, {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}],
    ids=["mean", "moving mean", "moving mean of each"],
)
@few(3)
@given(data=st.data())
def test_averages_of_equal_weights_and_buffers_are_the_same_function(case, options, data):
    """An average of buffers (Lightning's ``WeightAveraging``) leaves masks, permutations and bounds as they are."""
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    model = torch.nn.ModuleList([flow_of(f), torch.nn.Linear(1, 1)])  # torch cannot average a model without weights
    average = swa_utils.AveragedModel(model, use_buffers=True, **options)
    for _ in range(4):
        average.update_parameters(model)
    y = f(x).detach()
    torch.testing.assert_close(average.module[0].bijection(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(average.module[0].bijection.inv(y), f.inverse_and_ladj(y)[0], rtol=1e-9, atol=1e-9)
    state = average.module.state_dict()
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            assert torch.equal(state[name], value), name


@over_registry
@given(data=st.data())
def test_inverse_is_a_module(case, data):
    f = data.draw(bijections(case))
    assert f.inv.inv is f and f.inv is f.inv
    assert {id(p) for p in f.inv.parameters()} == {id(p) for p in f.parameters()}
    assert f.with_cache(0) is f and f.with_cache(1) is f
    independent = torch.distributions.IndependentTransform(f, 1)
    x = data.draw(values(f, batch_shapes=((3,),)))
    if f.forward_shape(x.shape) == x.shape:
        torch.testing.assert_close(independent.log_abs_det_jacobian(x, f(x)), f.log_abs_det_jacobian(x, f(x)).sum(-1))


@over_registry
@given(data=st.data())
def test_density_in_pyro(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((), (1,), (3,), (2, 3))))  # torch cannot validate an empty batch
    y, ladj = f.forward_and_ladj(x)
    expected = base_of(f).log_prob(x) - ladj
    composed = dist.transforms.ComposeTransformModule([f, dist.transforms.AffineTransform(0.0, 1.0)])
    flow = flow_of(f)
    for d in (
        dist.TransformedDistribution(base_of(f), [f]),
        dist.TransformedDistribution(base_of(f), [composed]),
        dist.TransformedDistribution(base_of(f), [f.inv.inv]),
        flow(),
    ):
        torch.testing.assert_close(d.log_prob(y), expected.expand(d.log_prob(y).shape), rtol=1e-5, atol=1e-5)
        assert d.rsample((5,)).shape == (5,) + d.batch_shape + d.event_shape
        assert d.expand((4,) + d.batch_shape).sample().shape == (4,) + d.batch_shape + d.event_shape
        assert d.support.check(y).all()


@over_plain
@few(5)
@given(data=st.data())
def test_torch_func(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    if f.forward_shape(event_of(f))[: -f.event_dim or None] != ():
        return  # f has a batch of contexts, which vmap over the events cannot split
    y, ladj = f.forward_and_ladj(x)
    torch.testing.assert_close(vmap(f)(x), y)
    torch.testing.assert_close(vmap(f.inv)(y), f.inverse_and_ladj(y)[0])
    jacobian = vmap(jacrev(f))(x).reshape(3, y[0].numel(), y[0].numel())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj, rtol=1e-6, atol=1e-6)
    doubled = {k: 2 * p for k, p in f.named_parameters()}
    called = functional_call(f, doubled, (x,))
    clone = copy.deepcopy(f)
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(2)
    torch.testing.assert_close(called, clone(x))
    torch.testing.assert_close(f(x), y, rtol=0, atol=0)  # the replaced parameters have left no trace


@pytest.mark.slow
@over_plain
@few(1)
@given(data=st.data())
def test_compiles(case, data):
    f = data.draw(bijections(case))
    y = data.draw(outputs(f, batch_shapes=((3,),)))
    d = dist.TransformedDistribution(
        base_of(f, validate_args=False), [f], validate_args=False
    )  # torch's checks of values cannot be compiled
    flow = flow_of(f)
    torch._dynamo.reset()
    # AOTAutograd, which also traces the backward pass, sees Pyro's plain path and a flow's once each.
    for p, backends in ((d, ("aot_eager", "eager")), (flow(), ("eager", "aot_eager"))):
        compiled = torch.compile(p.log_prob, fullgraph=True, backend=backends[0])
        torch.testing.assert_close(compiled(y), p.log_prob(y))
        draw = torch.compile(lambda p=p: p.rsample((3,)), fullgraph=True, backend=backends[1])
        assert draw().shape == p.rsample((3,)).shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@over_plain
@few(2)
@given(data=st.data())
def test_traces(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,),)))
    f.requires_grad_(False)
    traced = torch.jit.trace(lambda x: f.forward_and_ladj(x), (x,), check_trace=False)
    for got, want in zip(traced(0.9 * x), f.forward_and_ladj(0.9 * x)):
        torch.testing.assert_close(got, want)
