# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import helpers
import numpy as np
import pandas
import pyro.distributions as dist
import pytest
import torch
from helpers import parameters, table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_realnvp as rn
from pyro_realnvp.training.held_out import HeldOutLoss
from pyro_realnvp.training.rows import Batch

make_flow = partial(helpers.make_flow, hidden_dims=(16,))
run = partial(helpers.fit, num_steps=60, validate_every=20)


@pytest.fixture
def x():
    return 0.5 * torch.randn(400, 2) + 1


def test_learns_and_keeps_the_best(x):
    flow = make_flow()
    history = run(flow, x, num_steps=200)
    assert history.stopped == "finished"
    assert len(history.loss) == 200
    assert history.validation_steps == list(range(0, 201, 20))
    assert history.best_loss == min(history.validation_loss) < 1.8  # a perfect fit scores 1.45
    assert history.validation_steps[history.validation_loss.index(history.best_loss)] == history.best_step
    assert history.skipped_steps == history.restores == 0


def test_the_weights_that_stay_are_the_best_seen(x):
    """The training moves away from the validation data, so the start is the best."""
    flow, elsewhere = make_flow(), -x
    with pytest.warns(RuntimeWarning, match="the training has raised the held-out loss"):
        history = run(flow, x, validation=elsewhere, averaging=0.0)
    assert history.best_step == 0
    with torch.no_grad():
        assert -flow().log_prob(elsewhere).mean().item() == pytest.approx(history.best_loss, abs=1e-5)


def test_a_trained_flow_never_gets_worse(x):
    flow = make_flow()
    run(flow, x, num_steps=300, seed=0)
    before = flow().log_prob(x).mean().item()
    with pytest.warns(RuntimeWarning, match="keeps the weights it came with"):
        history = run(flow, x, num_steps=10, lr=0.1, seed=0)
    assert history.best_step == 0 and flow().log_prob(x).mean().item() == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("value", [1e20, 1e4])
def test_a_single_extreme_row_does_not_choose_the_weights(x, value):
    held_out = x[:100].clone()
    held_out[3, 1] = value
    flow = make_flow()
    with pytest.warns(RuntimeWarning, match=r"the held-out rows \[3\] are far from all others"):
        history = run(flow, x[100:], validation=held_out, num_steps=200)
    assert history.best_step > 100 and -flow().log_prob(x).mean() < 1.7


def test_many_extreme_rows_are_the_fault_of_the_flow(x):
    held_out = x[:100].clone()
    held_out[:30] += 1e4
    flow = make_flow()
    validate = HeldOutLoss(flow, [Batch(held_out, None)])
    assert validate() == pytest.approx(-flow().log_prob(held_out).double().mean().item(), rel=1e-6)
    assert validate.extreme == []


def test_weights_do_not_get_worse_where_an_extreme_row_comes_back():
    """A row counted only after it had become likely enough. So weights that are worse at every row were the best."""

    class Losses:
        def __init__(self, *losses):
            self.losses = list(losses)

        def __call__(self):
            return self

        def log_prob(self, x):
            return -self.losses.pop(0)

        def parameters(self):
            return iter([torch.zeros(1)])

    good = torch.linspace(0.5, 2.5, 120, dtype=torch.float64)
    bad = good + 0.1
    good[-1], bad[-1] = 24.0, 400.0
    validate = HeldOutLoss(Losses(bad, good, bad), [Batch(torch.zeros(120, 1), None)])
    assert validate() > 1.1 * validate() and validate() > 1.1 * good.mean()
    assert validate.extreme == [119]


@pytest.mark.filterwarnings("ignore:the training has raised")
def test_stops_early(x):
    history = run(make_flow(), x, validation=-x, patience=20, num_steps=500)
    assert history.stopped == "early"
    assert len(history.loss) == 20
    assert len(run(make_flow(), x, validation=-x, patience=None).loss) == 60


def test_is_reproducible(x):
    def once(seed=None):
        torch.manual_seed(1)
        flow = make_flow()
        history = run(flow, x, seed=seed)
        return parameters(flow), history.loss

    for seed in (None, 3):
        (first, losses), (second, again) = once(seed), once(seed)
        assert torch.equal(first, second)
        assert losses == again
    assert not torch.equal(once(3)[0], once(4)[0])


@pytest.mark.filterwarnings("ignore:the training has raised")
def test_goes_on_from_where_it_is(x):
    flow = make_flow()
    run(flow, x, num_steps=200)
    with torch.no_grad():
        before = -flow().log_prob(x).mean().item()
    history = run(flow, x, num_steps=1, lr=1e-6)
    assert history.loss[0] == pytest.approx(before, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_arrays_tensors_and_loaders(x, dtype):
    c = torch.randn(400, 3)
    for data, context in (
        (x.to(dtype), c.to(dtype)),
        (x.numpy().astype(np.float64), c.numpy()),
        (DataLoader(TensorDataset(x.to(dtype), c.to(dtype)), batch_size=64), None),
    ):
        flow = make_flow(context_dim=3).to(dtype)
        history = run(flow, data, context=context)
        assert len(history.loss) == 60
        assert flow(c[0].to(dtype)).sample().dtype == dtype
    flow = make_flow().to(dtype)
    loader = DataLoader(x.to(dtype), batch_size=50)
    history = run(flow, loader, validation=DataLoader(x.to(dtype), batch_size=100))
    with torch.no_grad():
        assert -flow().log_prob(x.to(dtype)).mean().item() == pytest.approx(history.best_loss, abs=1e-5)


def test_without_validation(x):
    flow = make_flow()
    history = run(flow, x, validation=0, batch_size=len(x))
    assert history.best_step == 60
    assert history.best_loss == pytest.approx(np.mean(history.loss[-20:]))


def test_other_modules_that_return_distributions(x):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(self.loc, 0.5), 1)

    model = Model()
    run(model, x, num_steps=300, lr=0.1)
    torch.testing.assert_close(model.loc.detach(), torch.ones(2), atol=0.1, rtol=0)


def test_without_validation_noise_does_not_choose_earlier_weights():
    """The flow learns from a stream of fresh data, but the mean loss of 20 steps is too noisy to show the progress."""
    stream = (0.5 * torch.randn(8, 2) + 1 for _ in range(300))
    history = run(make_flow(), stream, num_steps=300, lr=1e-3)
    assert history.best_step == 300
    assert history.validation_loss[-1] < history.validation_loss[0]


def test_callbacks_are_called_after_each_step_and_one_may_stop(x):
    seen = []

    def look(history):
        seen.append((len(history.loss), len(history.validation_loss), history.seconds))

    history = run(make_flow(), x, callbacks=[look, lambda history: len(history.loss) == 30, lambda history: "no"])
    assert [step for step, *_ in seen] == list(range(1, 31))
    assert [validations for _, validations, _ in seen] == [1] * 19 + [2] * 11
    assert all(early < late for (*_, early), (*_, late) in zip(seen, seen[1:]))
    assert history.stopped == "callback"
    assert history.validation_steps == [0, 20, 30]


def test_an_error_in_a_callback_is_raised_and_loses_nothing(x):
    def fail(history):
        if len(history.loss) == 50:
            raise OSError("no network")

    flow = make_flow()
    with pytest.raises(OSError, match="no network"):
        run(flow, x, callbacks=[fail])
    assert -flow().log_prob(x).mean() < 2.6


@pytest.mark.filterwarnings("ignore:the training has raised")
def test_augment_changes_what_is_trained_on_and_nothing_else(x):
    calls = []

    def shift(batch):
        calls.append(len(batch))
        return batch + 10

    flow = make_flow()
    history = run(flow, x, augment=shift, validation=x, batch_size=50, num_steps=200, lr=0.05)
    assert calls == [50] * 200
    assert history.best_loss > 2.5  # the held-out rows were not augmented
    assert history.loss[-1] < history.loss[0] / 5


@pytest.mark.parametrize(("num_steps", "warmup"), [(9, 0.1), (19, 0.05), (1, 0.5), (1, 0.1), (3, 0.0)])
def test_short_warmups(x, num_steps, warmup):
    history = run(make_flow(), x, num_steps=num_steps, warmup=warmup)
    assert len(history.loss) == num_steps


def test_numpys_scalars_are_options(x, tmp_path):
    options = {"lr": np.float64(1e-3), "batch_size": np.int64(32), "patience": np.int64(50), "seed": np.int64(3)}
    options |= {"validation": np.float32(0.1), "num_steps": np.int64(9), "checkpoint": tmp_path / "run.pt"}
    first, again = run(make_flow(), x, **options), run(make_flow(), x, **options)
    assert first.loss == again.loss


def test_a_callback_may_answer_with_numpys_true(x):
    assert len(run(make_flow(), x, callbacks=[lambda history: np.mean(history.loss) < 1e9]).loss) == 1
    assert len(run(make_flow(), x, callbacks=[lambda history: {"a": 1}, lambda history: 1]).loss) == 60


def test_the_users_precision_stays(x):
    run(make_flow(), x, num_steps=2)
    assert torch.get_float32_matmul_precision() == "highest"


class Exploding(rn.Flow):
    """Returns a loss that is not finite in some steps."""

    def __init__(self, bad_steps):
        super().__init__(rn.real_nvp(2, num_couplings=4, hidden_dims=(16,)))
        self.bad_steps, self.calls = bad_steps, 0

    def forward(self, context=None):
        distribution = super().forward(context)
        if self.training:
            self.calls += 1
            if self.calls in self.bad_steps:
                log_prob = distribution.log_prob
                distribution.log_prob = lambda value: log_prob(value) * torch.inf
        return distribution


def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(x):
    flow = Exploding({5, 6, 30})
    with pytest.warns(RuntimeWarning, match="3 of 60 steps"):
        history = run(flow, x)
    assert history.skipped_steps == 3
    assert [math.isnan(loss) for loss in history.loss].count(True) == 3
    assert parameters(flow).isfinite().all()
    assert history.best_loss < 2.6


def test_a_skipped_first_step_warns_of_nothing_else(x):
    with pytest.warns(RuntimeWarning) as caught:
        history = run(Exploding({1, 2}), x)
    assert history.skipped_steps == 2 and ["2 of 60 steps" in str(w.message) for w in caught] == [True]


def test_repeated_skips_restore_the_best_weights(x):
    flow = Exploding(set(range(30, 40)))
    with pytest.warns(RuntimeWarning, match="restored 1 times"):
        history = run(flow, x)
    assert (history.restores, history.stopped) == (1, "finished")
    flow = Exploding(set(range(30, 10_000)))
    with pytest.warns(RuntimeWarning, match="restored 3 times"):
        history = run(flow, x, num_steps=500)
    assert history.stopped == "diverged"
    assert history.best_step == 20
    assert parameters(flow).isfinite().all()


class Interrupting(rn.Flow):
    def forward(self, context=None):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == self.stop_at:
            raise self.error
        return super().forward(context)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_interrupt_loses_nothing(x, error):
    flow = Interrupting(rn.real_nvp(2, num_couplings=4, hidden_dims=(16,)))
    flow.stop_at, flow.error = 55, error
    if isinstance(error, KeyboardInterrupt):
        history = run(flow, x)
        assert history.stopped == "interrupted"
        assert history.validation_steps == [0, 20, 40, 51]  # what came after the last validation is validated too
    else:
        with pytest.raises(MemoryError):
            run(flow, x)
    with torch.no_grad():
        assert -flow().log_prob(x).mean() < 2.6


def test_the_mode_of_the_flow_is_given_back(x):
    for mode in (True, False):
        flow = make_flow(between=lambda dim: rn.BatchNorm(dim).inv).train(mode)
        run(flow, x)
        assert flow.training is mode


def test_normalization_layers_end_where_the_best_weights_were(x):
    flow = make_flow(between=lambda dim: rn.BatchNorm(dim).inv)
    history = run(flow, x, validation=x)
    with torch.no_grad():
        assert -flow.eval()().log_prob(x).mean().item() == pytest.approx(history.best_loss, abs=1e-5)


def test_the_bar_shows_the_losses(x, capsys):
    run(make_flow(), x, progress=True)
    shown = capsys.readouterr().err
    assert "60/60" in shown
    assert "best=" in shown
    assert "loss=" in shown


@table(
    ("data", "kwargs", "error", "message"),
    {
        "three columns": (torch.randn(100, 3), {}, ValueError, r"x of shape \(N, 2\); got \(100, 3\)"),
        "one axis": (torch.randn(2), {}, ValueError, r"x of shape \(N, 2\)"),
        "integers": (torch.zeros(100, 2, dtype=torch.int64), {}, TypeError, "torch.float32; got torch.int64"),
        "half precision": (torch.randn(100, 2).half(), {}, TypeError, "torch.float32; got torch.float16"),
        "double precision": (torch.randn(100, 2).double(), {}, TypeError, "torch.float32; got torch.float64"),
        "integer array": (np.zeros((100, 2), dtype=int), {}, TypeError, "an array of int64"),
        "list": ([[0.0, 1.0]], {}, TypeError, "got list"),
        "data frame": (pandas.DataFrame({"a": [0.0, 1.0]}), {}, TypeError, "got DataFrame"),
        "masked array": (np.ma.masked_array(np.random.randn(100, 2)), {}, TypeError, "got MaskedArray"),
        "other device": (torch.randn(100, 2, device="meta"), {}, ValueError, "x on meta"),
        "nan": (torch.full((100, 2), torch.nan), {}, ValueError, "nan or inf in 100 of 100 rows of x"),
        "inf in one row": (torch.tensor([[0.0, torch.inf]] + 99 * [[0.0, 1.0]]), {}, ValueError, "in 1 of 100 rows"),
        "constant column": (
            torch.tensor([[1.0, 2.0], [1.0, 3.0]] * 20),
            {},
            ValueError,
            r"columns \[0\] of x are constant",
        ),
        "no rows": (torch.randn(0, 2), {}, ValueError, "at least two rows of x; got 0"),
        "one row": (torch.randn(1, 2), {}, ValueError, "at least two rows of x; got 1"),
        "batch above the rows": (torch.randn(100, 2), {"batch_size": 200}, ValueError, "batch_size from 1 to 90"),
        "batch of none": (torch.randn(100, 2), {"batch_size": 0}, ValueError, "batch_size from 1"),
        "nothing held out": (torch.randn(5, 2), {}, ValueError, "holds out 0"),
        "one row left": (torch.randn(100, 2), {"validation": 0.99}, ValueError, "trains on 1"),
        "validation columns": (
            torch.randn(100, 2),
            {"validation": torch.randn(10, 3)},
            ValueError,
            r"x of shape \(N, 2\); got \(10, 3\)",
        ),
        "unwanted context": (torch.randn(100, 2), {"context": torch.randn(100, 3)}, ValueError, "takes no context"),
        "context rows": (torch.randn(100, 2), {"context": torch.randn(50, 3)}, ValueError, "for each of the 100 rows"),
        "dataset below a batch": (
            DataLoader(torch.randn(3, 2), batch_size=8, drop_last=True),
            {},
            ValueError,
            "got none: is its dataset smaller",
        ),
        "three tensors": (DataLoader(TensorDataset(*3 * [torch.randn(9, 2)])), {}, ValueError, "batches of 3 tensors"),
        "no steps": (torch.randn(100, 2), {"num_steps": 0}, ValueError, "num_steps >= 1"),
        "validation every zero": (torch.randn(100, 2), {"validate_every": 0}, ValueError, "validate_every >= 1"),
    },
)
def test_bad_input(data, kwargs, error, message):
    flow = make_flow()
    before = parameters(flow)
    with pytest.raises(error, match=message):
        run(flow, data, **kwargs)
    assert torch.equal(parameters(flow), before)


def test_a_conditional_flow_needs_its_context(x):
    with pytest.raises(ValueError, match="width 3; got none"):
        run(make_flow(context_dim=3), x)


def test_a_bijection_is_no_flow(x):
    with pytest.raises(TypeError, match="pass Flow"):
        run(rn.real_nvp(2), x)


def test_nothing_to_fit(x):
    with pytest.raises(ValueError, match="nothing to fit"):
        run(make_flow().requires_grad_(False), x)
    with pytest.raises(ValueError, match="nothing to fit"):
        run(rn.Flow(rn.Standardize(2).inv), x)


def test_a_frozen_encoder_in_eval_mode_stays_as_it_is():
    encoder = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval().requires_grad_(False)
    context = 3 * torch.randn(300, 3) + 1
    before = encoder(context)
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, context_dim=2), embedding=encoder)
    for mode in (True, False):
        flow.train(mode)
        encoder.eval()
        rn.fit(flow, torch.randn(300, 2), context=context, num_steps=5, seed=0, progress=False)
        assert torch.equal(encoder(context), before)
        assert (flow.training, encoder[1].training) == (mode, False)


def test_a_training_that_no_held_out_row_can_judge_says_so():
    base = rn.Base(dist.Uniform, low=-torch.full((2,), 9.0), high=torch.full((2,), 9.0))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2), base=base)
    with pytest.warns(RuntimeWarning, match="no validation had a finite loss"):
        rn.fit(flow, torch.rand(500, 2), validation=torch.full((9, 2), 50.0), num_steps=5, standardize=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", 0.0), ("max_grad_norm", -1.0), ("max_grad_norm", None), ("averaging", 50.0), ("warmup", -1.0)]
    + [("patience", 0), ("validate_every", 7.5), ("weight_decay", -1.0)],
)
def test_an_option_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"expected {option}"):
        rn.fit(rn.Flow(rn.real_nvp(2)), torch.randn(50, 2), progress=False, **{option: value})


def test_an_extreme_row_of_a_start_that_says_nothing(x):
    """All other losses were equal at first, so that no limit was found, and no weights were the best."""
    x, held_out = 0.7 * torch.randn(2000, 2), 0.7 * torch.randn(200, 2)
    held_out[7, 0] = 5.5
    base = rn.Base(dist.Uniform, low=-5 * torch.ones(2), high=5 * torch.ones(2))
    flow = rn.Flow(rn.Compose([rn.Spline(2)]), base=base)
    with pytest.warns(RuntimeWarning, match=r"the held-out rows \[7\]"):
        history = run(flow, x, validation=held_out, num_steps=200, lr=0.02, standardize=False, seed=0)
    assert history.best_step > 100 and flow().log_prob(x).mean() > -2.6
