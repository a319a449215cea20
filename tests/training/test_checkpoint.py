# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed training ends like an uninterrupted one, and a bad file is refused."""

import errno
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import assert_same_state, points, run_python, table, train
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pyro_realnvp as rn

X = points()


make_flow = partial(helpers.make_flow, seed=1, actnorm=True)


def assert_same(first, second):
    (flow, history, random), (other, others_history, others_random) = first, second
    assert_same_state(flow, other)
    assert repr(vars(history) | {"seconds": 0}) == repr(vars(others_history) | {"seconds": 0})  # nan is equal to nan
    assert torch.equal(random.pop("torch"), others_random.pop("torch"))
    assert random == others_random


class Noisy(rn.Flow):
    """A flow whose loss draws random numbers, and which fails at some steps."""

    def forward(self, context=None):
        distribution = super().forward(context)
        log_prob = distribution.log_prob
        bad = torch.inf if self.training and np.random.rand() < self.bad else 1.0
        distribution.log_prob = lambda value: log_prob(value + 0.1 * torch.randn_like(value)) * bad
        return distribution


@pytest.mark.parametrize("stop_at", [1, 6, 7, 8, 33, 59])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, stop_at):
    path = tmp_path / "run.pt"
    assert train(path, stop_at=stop_at) is None
    torch.manual_seed(99)  # a new process has another random state
    assert_same(train(path, flow=make_flow(seed=2)), train())


@pytest.mark.filterwarnings("ignore:.*steps had a loss:RuntimeWarning")
@pytest.mark.parametrize("bad", [0.1, 0.6])
def test_random_losses_skipped_steps_and_restores_are_resumed_too(tmp_path, bad):
    def noisy():
        flow = make_flow()
        flow.__class__, flow.bad = Noisy, bad
        np.random.seed(3)
        return flow

    path = tmp_path / "run.pt"
    train(path, flow=noisy(), stop_at=40)
    resumed, whole = train(path, flow=noisy()), train(flow=noisy())
    assert whole[1].skipped_steps > 0
    assert_same(resumed, whole)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("generator", [None, 7])
def test_loaders_are_resumed_in_the_middle_of_an_epoch(tmp_path, shuffle, generator):
    def loader():
        own = generator and torch.Generator().manual_seed(generator)
        return DataLoader(TensorDataset(X), batch_size=48, shuffle=shuffle, generator=own)

    path, validation = tmp_path / "run.pt", DataLoader(TensorDataset(X[:100]), batch_size=64, shuffle=True)
    train(path, loader(), stop_at=33, validation=validation)
    assert_same(train(path, loader(), validation=validation), train(None, loader(), validation=validation))


def test_loaders_with_a_batch_sampler_are_resumed(tmp_path):
    def loader():
        sampler = RandomSampler(TensorDataset(X), generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(X), batch_sampler=BatchSampler(sampler, 32, True))

    path = tmp_path / "run.pt"
    train(path, loader(), stop_at=33)
    assert_same(train(path, loader()), train(None, loader()))


def test_streams_are_resumed(tmp_path):
    class Stream:
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for _ in range(25):
                yield torch.randn(32, 2, generator=generator)

    path = tmp_path / "run.pt"
    train(path, Stream(), stop_at=40)
    assert_same(train(path, Stream()), train(None, Stream()))


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_random_stream_is_resumed_from_its_first_batch(tmp_path, monkeypatch, looks_ahead):
    """Before the first step a vector flow looks at a batch, while an image flow does not."""
    if not looks_ahead:
        monkeypatch.setattr("pyro_realnvp.training.maximum_likelihood.start", lambda *args, **options: None)

    def stream():
        while True:
            yield torch.randn(32, 2)

    path = tmp_path / "run.pt"
    train(path, stream(), stop_at=4)  # before the first checkpoint at an interval
    torch.manual_seed(99)
    assert_same(train(path, stream()), train(None, stream()))


@pytest.mark.parametrize("ending", ["finished", "early", "callback"])
def test_a_finished_training_is_loaded(tmp_path, ending):
    path = tmp_path / "run.pt"
    options = {"early": {"validation": -X, "patience": 10}, "callback": {"callbacks": [lambda h: len(h.loss) == 30]}}
    options = options.get(ending, {})
    flow, history, _ = train(path, **options)
    assert history.stopped == ending
    before = path.read_bytes()
    again, others_history, _ = train(path, flow=make_flow(seed=2), **options)
    assert vars(others_history) | {"seconds": 0} == vars(history) | {"seconds": 0}
    assert others_history.seconds == pytest.approx(history.seconds, abs=0.2)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), again.parameters()))
    assert path.read_bytes() == before


def test_an_interrupted_training_goes_on(tmp_path):
    def interrupt(history):
        if len(history.loss) == 30:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    _, history, _ = train(path, callbacks=[interrupt])
    assert (history.stopped, len(history.loss)) == ("interrupted", 30)
    assert_same(train(path), train())


@pytest.mark.slow
def test_a_training_killed_at_any_moment_loses_nothing(tmp_path):
    script = Path(__file__).with_name("kill_and_resume.py")
    kills, steps, same = run_python(script, tmp_path / "run.pt").stdout.split()
    assert (int(kills), same) == (20, "True")
    assert int(steps) >= 10


# -- bad files -------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_here",)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """Flips one bit of one tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 500] ^= 1
    path.write_bytes(content)


def run_code(path):
    torch.save({"format": "pyro_realnvp", "version": 1, "kind": Malicious()}, path)


def old_pickle(path):
    path.write_bytes(pickle.dumps(Malicious()))


def change(**items):
    def changed(path):
        content = torch.load(path, weights_only=True)
        torch.save(content | items, path)

    return changed


def without_optimizer(path):
    content = torch.load(path, weights_only=True)
    del content["parts"]["training"]["optimizer"]
    torch.save(content, path)


def weird_weights(path):
    content = torch.load(path, weights_only=True)
    content["parts"]["training"]["average"] = {"module.0": torch.zeros(1)}
    torch.save(content, path)


@table(
    ("damage", "error", "message"),
    {
        "truncated": (truncate, RuntimeError, "truncated or changed"),
        "empty": (empty, RuntimeError, "truncated or changed"),
        "bit flipped": (flip, RuntimeError, "truncated or changed"),
        "pickle": (old_pickle, RuntimeError, "no file of pyro_realnvp"),
        "runs code": (run_code, RuntimeError, "could run code"),
        "list": (lambda path: torch.save([1, 2], path), ValueError, "no file of pyro_realnvp"),
        "other dict": (lambda path: torch.save({"state": 1}, path), ValueError, "no file of pyro_realnvp"),
        "later version": (change(version=2), ValueError, "version 2, but this pyro_realnvp reads 1"),
        "saved flow": (lambda path: rn.save(make_flow(), path), ValueError, "expected the state of a training"),
        "no optimizer": (without_optimizer, RuntimeError, "not hold a whole training"),
        "foreign average": (weird_weights, RuntimeError, "not hold a whole training"),
        "no random state": (change(random=[{}]), RuntimeError, "not hold a whole training"),
    },
)
def test_a_bad_checkpoint_is_refused(tmp_path, monkeypatch, damage, error, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    train(path, stop_at=30)
    damage(path)
    flow = make_flow(seed=2)
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(error, match=message):
        train(path, flow=flow)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before))
    assert not (tmp_path / "was_here").exists()


def frozen(flow):
    flow.bijection.parts[0].requires_grad_(False)
    return flow


@table(
    ("options", "message"),
    {
        "lr": ({"lr": 1e-3}, "belongs to another training: lr=0.005 there, 0.001 here"),
        "num_steps": ({"num_steps": 61}, "num_steps=60 there, 61 here"),
        "seed": ({"seed": 5}, "seed="),
        "batch_size": ({"batch_size": 16}, "batch_size=None there, 16 here"),
        "validation": ({"validation": 0.2}, "validation=0.1 there, 0.2 here"),
        "rows": ({"data": X + 1}, "rows="),
        "couplings": ({"flow": make_flow(num_couplings=5)}, "another architecture: here is bijection.parts.7"),
        "widths": ({"flow": make_flow(hidden_dims=(9,))}, "out_features=9.*out_features=8"),
        "activation": ({"flow": make_flow(activation=nn.ReLU)}, r"ReLU\(\), where the file has .*Tanh\(\)"),
        "bound": ({"flow": make_flow(max_log_scale=2.0)}, "max_log_scale=2.0.*max_log_scale=3.0"),
        "frozen": ({"flow": frozen(make_flow())}, r"frozen=\[\] there, \['bijection"),
        "precision": ({"data": X.double(), "flow": make_flow().double()}, "float64, where the file has .*float32"),
        "checkpoint_every": ({"checkpoint_every": 0}, "checkpoint_every >= 1"),
    },
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, options, message):
    path = tmp_path / "run.pt"
    train(path, stop_at=30)
    before = path.read_bytes()
    options = {"data": X} | options
    with pytest.raises(ValueError, match=message):
        if "checkpoint_every" in options:
            rn.fit(make_flow(), X, checkpoint=path, progress=False, **{k: options[k] for k in ["checkpoint_every"]})
        train(path, **options)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path):
    steps = []
    with pytest.raises(RuntimeError, match=r"could not be written .*No such file"):
        train(tmp_path / "nowhere" / "run.pt", callbacks=[steps.append])
    with pytest.raises(IsADirectoryError):
        train(tmp_path, callbacks=[steps.append])
    assert steps == []


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(path, stop_at=30)
    before, calls = path.read_bytes(), []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    flow = make_flow(seed=2)
    with pytest.raises(RuntimeError, match=r"No space left on device.*: what was there before is unchanged"):
        train(path, flow=flow)
    assert calls
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]
    monkeypatch.undo()
    assert_same(train(path), train())
