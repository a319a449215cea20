# SPDX-License-Identifier: Apache-2.0
"""Compiled steps, reduced precision, GPUs."""

import copy
import pickle
import warnings
from functools import partial

import helpers
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import perturb, points
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

import pyro_realnvp as rn

X = points(410)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


make_flow = partial(helpers.make_flow, seed=1, num_couplings=2, actnorm=True)


def run(data=X, flow=None, **options):
    flow = make_flow() if flow is None else flow
    options = {"num_steps": 24, "validate_every": 8, "batch_size": 64} | options
    if isinstance(data, DataLoader):
        del options["batch_size"]
    return flow, helpers.fit(flow, data, **options)


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps():
    assert run(compile=True)[1].loss == pytest.approx(run()[1].loss, rel=1e-4)


@pytest.mark.slow
def test_a_short_last_batch_is_not_compiled_anew():
    """One graph serves all whole batches. The loader has five of them and a short one."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        loader = DataLoader(TensorDataset(X), batch_size=80)
        losses = run(loader, validation=X, compile=True)[1].loss
    assert losses == pytest.approx(run(loader, validation=X)[1].loss, rel=1e-4)


@pytest.mark.slow
def test_a_flow_that_cannot_be_compiled_is_trained_as_it_is_with_one_warning():
    class Branching(rn.Flow):
        def forward(self, context=None):
            torch._dynamo.graph_break()
            return super().forward(context)

    flow = make_flow()
    flow.__class__ = Branching
    with pytest.warns(RuntimeWarning, match="training goes on uncompiled") as caught:
        history = run(flow=flow, compile=True)[1]
    assert len([w for w in caught if "uncompiled" in str(w.message)]) == 1
    assert history.loss == run()[1].loss


@pytest.mark.slow
def test_without_a_compiler():
    run(compile=True)  # the first compilation imports modules that raise other warnings
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler"), "fx_graph_cache": False}):
        with pytest.warns(RuntimeWarning, match="uncompiled.*compiler") as caught:
            history = run(compile=True)[1]
    assert len(caught) == 1
    assert history.loss == run()[1].loss


def test_autocast():
    flow, history = run(autocast=torch.bfloat16)
    assert history.loss != run()[1].loss
    assert history.loss == pytest.approx(run()[1].loss, rel=0.05)
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    flow, history = run(autocast=torch.bfloat16, validation=X)
    with torch.no_grad():  # validation runs in full precision, like the flow later
        assert -flow().log_prob(X).mean().item() == pytest.approx(history.best_loss, rel=1e-5)


def test_tensor_float_is_allowed_for_the_training_only():
    before, seen = torch.get_float32_matmul_precision(), []
    run(tf32=True, callbacks=[lambda history: seen.append(torch.get_float32_matmul_precision())])
    assert (set(seen), torch.get_float32_matmul_precision()) == ({"high"}, before)


def test_device_moves_the_flow():
    flow, _ = run(device="cpu")
    assert next(flow.parameters()).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        run(device="cuda:99")


@pytest.mark.slow
def test_a_compiled_flow():
    flow, x = run()[0].eval(), torch.randn(100, 2)
    with torch.no_grad():
        expected, (draws, _) = flow().log_prob(x), seeded(flow)
        counter = CompileCounter()
        flow.compile(backend=counter)
        for _ in range(3):
            torch.testing.assert_close(flow().log_prob(x), expected)
            torch.testing.assert_close(seeded(flow)[0], draws)
        assert counter.frame_count == 2  # one whole graph for each direction
        for number in range(20, 30):  # one more compilation serves all other batch sizes
            flow().log_prob(x[:number])
        assert counter.frame_count == 3
        clone = pickle.loads(pickle.dumps(copy.deepcopy(flow)))
        torch.testing.assert_close(clone().log_prob(x), expected)
        assert counter.frame_count == 3
    flow().log_prob(x).mean().backward()
    assert all(p.grad is not None for p in flow.parameters())


def seeded(flow):
    torch.manual_seed(0)
    return flow().rsample_and_log_prob((100,))


@pytest.mark.slow
def test_a_compiled_bijection_keeps_its_rules():
    """A compiled bijection can be conditioned, its inverse is compiled too, and no result is stale."""
    flow = rn.real_nvp(2, num_couplings=2, hidden_dims=(8,), context_dim=3)
    perturb(flow, 0.3)
    x, context = torch.randn(10, 2), torch.randn(10, 3)
    expected = flow.condition(context)(x)
    counter = CompileCounter()
    flow.inv.compile(backend=counter)
    y = flow.condition(context)(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(flow.condition(context).inv(y.detach()), x)
    assert counter.frame_count == 2
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
        assert not torch.allclose(flow.condition(context)(x), expected)


@gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compile": True},
        {"compile": "reduce-overhead"},
        {"autocast": torch.bfloat16},
        {"tf32": True},
        {"compile": "reduce-overhead", "autocast": torch.bfloat16},
    ],
    ids=str,
)
def test_training_on_a_gpu(options, tmp_path):
    reference = run()[1].loss
    for data in (X, X.cuda(), X.numpy(), DataLoader(TensorDataset(X), batch_size=64, pin_memory=True)):
        flow = make_flow()
        _, history = run(data, flow, device="cuda", checkpoint=tmp_path / f"{id(data)}.pt", **options)
        assert next(flow.parameters()).is_cuda
        if not isinstance(data, DataLoader):
            assert history.loss == pytest.approx(reference, rel=0.05)


@gpu
def test_a_gpu_training_goes_on_where_it_stopped(tmp_path):
    def interrupt(history):
        if len(history.loss) == 15:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    run(device="cuda", checkpoint=path, checkpoint_every=5, callbacks=[interrupt])
    assert run(device="cuda", checkpoint=path, checkpoint_every=5)[1].loss == pytest.approx(run(device="cuda")[1].loss)


@gpu
def test_save_and_load_between_devices(tmp_path):
    flow = run(device="cuda")[0]
    rn.save(flow, tmp_path / "flow.pt")
    here = rn.load(make_flow(), tmp_path / "flow.pt")
    torch.testing.assert_close(here().log_prob(X), flow().log_prob(X.cuda()).cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gradients_that_a_compiler_makes_wrong_are_not_used():
    """As those of Pyro's splines by inductor on a CPU, with which a training ended 0.13 nats too high."""
    x = 0.5 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0))

    def run(**options):
        flow = rn.Flow(rn.Compose([T.Spline(2, count_bins=4)]), event_shape=(2,))
        flow.load_state_dict(start.state_dict())
        return rn.fit(flow, x, num_steps=3, standardize=False, progress=False, seed=0, **options).loss

    start = rn.Flow(rn.Compose([T.Spline(2, count_bins=4)]), event_shape=(2,))
    expected = run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(compile=True) == pytest.approx(expected, rel=1e-5)
        start.compile()
    messages = [str(warning.message) for warning in caught]
    assert any("compare them with those of the" in message for message in messages)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:the loss could not be compiled:RuntimeWarning")
def test_random_layers_are_compiled_all_the_same():
    """Their gradients differ from evaluation to evaluation, though the loss of a new flow does not."""
    embedding = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, hidden_dims=(8,), context_dim=3), embedding=embedding)
    rn.fit(flow, X, context=X, num_steps=2, batch_size=64, standardize=False, progress=False, compile=True)
