# SPDX-License-Identifier: Apache-2.0
"""Files of modules and of trainings: resumed is the same as uninterrupted, and a bad file is refused."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pyro_realnvp as rn
from pyro_realnvp.training import checkpoint

X = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]) + 1
NUM_STEPS = 60


def make_flow(seed=1, **options):
    torch.manual_seed(seed)
    between = lambda dim: rn.ActNorm(dim).inv  # noqa: E731
    return rn.Flow(rn.real_nvp(2, **({"num_couplings": 4, "hidden_dims": (8,), "between": between} | options)))


def run(path=None, data=X, flow=None, stop_at=None, **options):
    """A training, or nothing where it is stopped after so many steps."""
    flow = make_flow() if flow is None else flow

    def stop(history):
        if len(history.loss) == stop_at:
            raise MemoryError

    options = {"num_steps": NUM_STEPS, "validate_every": 10, "progress": False, "callbacks": [stop]} | options
    if path is not None:
        options |= {"checkpoint": path, "checkpoint_every": 7}
    try:
        history = rn.fit(flow, data, **options)
    except MemoryError:
        return None
    return flow, history, checkpoint.random_state()


def assert_same(first, second):
    (flow, history, random), (other, others_history, others_random) = first, second
    state, others_state = flow.state_dict(), other.state_dict()
    assert state.keys() == others_state.keys()
    assert all(torch.equal(state[name], others_state[name]) for name in state)
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
    assert run(path, stop_at=stop_at) is None
    torch.manual_seed(99)  # another process knows nothing of this one
    assert_same(run(path, flow=make_flow(seed=2)), run())


@pytest.mark.filterwarnings("ignore:.*steps had a loss:RuntimeWarning")
@pytest.mark.parametrize("bad", [0.1, 0.6])
def test_random_losses_skipped_steps_and_restores_are_resumed_too(tmp_path, bad):
    def noisy():
        flow = make_flow()
        flow.__class__, flow.bad = Noisy, bad
        np.random.seed(3)
        return flow

    path = tmp_path / "run.pt"
    run(path, flow=noisy(), stop_at=40)
    resumed, whole = run(path, flow=noisy()), run(flow=noisy())
    assert whole[1].skipped_steps > 0
    assert_same(resumed, whole)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("generator", [None, 7])
def test_loaders_are_resumed_in_the_middle_of_an_epoch(tmp_path, shuffle, generator):
    def loader():
        own = generator and torch.Generator().manual_seed(generator)
        return DataLoader(TensorDataset(X), batch_size=48, shuffle=shuffle, generator=own)

    path, validation = tmp_path / "run.pt", DataLoader(TensorDataset(X[:100]), batch_size=64, shuffle=True)
    run(path, loader(), stop_at=33, validation=validation)
    assert_same(run(path, loader(), validation=validation), run(None, loader(), validation=validation))


def test_loaders_with_a_batch_sampler_are_resumed(tmp_path):
    def loader():
        sampler = RandomSampler(TensorDataset(X), generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(X), batch_sampler=BatchSampler(sampler, 32, True))

    path = tmp_path / "run.pt"
    run(path, loader(), stop_at=33)
    assert_same(run(path, loader()), run(None, loader()))


def test_streams_are_resumed(tmp_path):
    class Stream:
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for _ in range(25):
                yield torch.randn(32, 2, generator=generator)

    path = tmp_path / "run.pt"
    run(path, Stream(), stop_at=40)
    assert_same(run(path, Stream()), run(None, Stream()))


@pytest.mark.parametrize("ending", ["finished", "early", "callback"])
def test_a_finished_training_is_loaded(tmp_path, ending):
    path = tmp_path / "run.pt"
    options = {"early": {"validation": -X, "patience": 10}, "callback": {"callbacks": [lambda h: len(h.loss) == 30]}}
    options = options.get(ending, {})
    flow, history, _ = run(path, **options)
    assert history.stopped == ending
    before = path.read_bytes()
    again, others_history, _ = run(path, flow=make_flow(seed=2), **options)
    assert vars(others_history) | {"seconds": 0} == vars(history) | {"seconds": 0}
    assert others_history.seconds == pytest.approx(history.seconds, abs=0.2)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), again.parameters()))
    assert path.read_bytes() == before


def test_an_interrupted_training_goes_on(tmp_path):
    def interrupt(history):
        if len(history.loss) == 30:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    _, history, _ = run(path, callbacks=[interrupt])
    assert (history.stopped, len(history.loss)) == ("interrupted", 30)
    assert_same(run(path), run())


KILL = """
import os, random, signal, sys, time
import torch
import torch._dynamo  # which the first optimizer imports
sys.path.insert(0, sys.argv[2])
import test_checkpoints as t
from pyro_realnvp import saving

torch.set_num_threads(1)
path = sys.argv[1]

def train():
    history = t.run(path, num_steps=2000, validate_every=100)[1]
    return history.loss, history.best_loss

def wait_for_some_checkpoints():
    seen, number, deadline = set(), random.randint(1, 8), time.monotonic() + 20
    while len(seen) < number and time.monotonic() < deadline:
        seen.add(os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.02))

steps, kills = set(), 0
while kills < 20:  # each child is a new process, with the imports of this one
    child = os.fork()
    if not child:
        train()
        os._exit(0)
    wait_for_some_checkpoints()
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    found = saving.read(path, "the state of a training") if os.path.exists(path) else None
    steps.add(len(found["parts"]["training"]["history"]["loss"]) if found else 0)
resumed = train()
os.remove(path)
print(kills, len(steps), resumed == train())
"""


def test_a_training_killed_at_any_moment_loses_nothing(tmp_path):
    command = [sys.executable, "-c", KILL, str(tmp_path / "run.pt"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills, steps, same = done.stdout.split()
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
    """One bit of one tensor."""
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


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, RuntimeError, "truncated or changed"),
        (empty, RuntimeError, "truncated or changed"),
        (flip, RuntimeError, "truncated or changed"),
        (old_pickle, RuntimeError, "no file of pyro_realnvp"),
        (run_code, RuntimeError, "could run code"),
        (lambda path: torch.save([1, 2], path), ValueError, "no file of pyro_realnvp"),
        (lambda path: torch.save({"state": 1}, path), ValueError, "no file of pyro_realnvp"),
        (change(version=2), ValueError, "version 2, but this pyro_realnvp reads 1"),
        (lambda path: rn.save(make_flow(), path), ValueError, "expected the state of a training"),
        (without_optimizer, RuntimeError, "not hold a whole training"),
        (weird_weights, RuntimeError, "not hold a whole training"),
        (change(random=[{}]), RuntimeError, "not hold a whole training"),
    ],
)
def test_a_bad_checkpoint_is_refused(tmp_path, monkeypatch, damage, error, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    run(path, stop_at=30)
    damage(path)
    flow = make_flow(seed=2)
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(error, match=message):
        run(path, flow=flow)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "belongs to another training: lr=0.005 there, 0.001 here"),
        ({"num_steps": 61}, "num_steps=60 there, 61 here"),
        ({"seed": 5}, "seed="),
        ({"batch_size": 16}, "batch_size=None there, 16 here"),
        ({"validation": 0.2}, "validation=0.1 there, 0.2 here"),
        ({"data": X + 1}, "rows="),
        ({"flow": make_flow(num_couplings=5)}, "another architecture: here is bijection.parts.7"),
        ({"flow": make_flow(hidden_dims=(9,))}, "out_features=9.*out_features=8"),
        ({"flow": make_flow(activation=nn.ReLU)}, r"ReLU\(\), where the file has .*Tanh\(\)"),
        ({"flow": make_flow(max_log_scale=2.0)}, "max_log_scale=2.0.*max_log_scale=3.0"),
        ({"data": X.double(), "flow": make_flow().double()}, "float64, where the file has .*float32"),
        ({"checkpoint_every": 0}, "checkpoint_every >= 1"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, options, message):
    path = tmp_path / "run.pt"
    run(path, stop_at=30)
    before = path.read_bytes()
    options = {"data": X} | options
    with pytest.raises(ValueError, match=message):
        if "checkpoint_every" in options:
            rn.fit(make_flow(), X, checkpoint=path, progress=False, **{k: options[k] for k in ["checkpoint_every"]})
        run(path, **options)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path):
    steps = []
    with pytest.raises(RuntimeError, match=r"could not be written .*No such file"):
        run(tmp_path / "nowhere" / "run.pt", callbacks=[steps.append])
    with pytest.raises(IsADirectoryError):
        run(tmp_path, callbacks=[steps.append])
    assert steps == []


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run(path, stop_at=30)
    before, calls = path.read_bytes(), []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    flow = make_flow(seed=2)
    with pytest.raises(RuntimeError, match=r"No space left on device.*: what was there before is unchanged"):
        run(path, flow=flow)
    assert calls
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]
    monkeypatch.undo()
    assert_same(run(path), run())


# -- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_flow, lambda: make_flow().bijection, lambda: make_flow().double()])
def test_what_is_saved_is_loaded(tmp_path, make):
    path = tmp_path / "flow.pt"
    module, other = make(), make()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    rn.save(module, path)
    assert rn.load(other, path) is other
    state, others_state = module.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], others_state[name]) for name in state)


def test_random_masks_are_loaded_and_are_no_other_architecture(tmp_path):
    def make():
        mask = rn.masks.random(6)
        return rn.Flow(rn.real_nvp(6, num_couplings=2, mask_cycle=[mask, ~mask]))

    path, flow = tmp_path / "flow.pt", make()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rn.save(flow, path)
    x = torch.randn(5, 6)
    torch.manual_seed(77)
    assert torch.equal(rn.load(make(), path)().log_prob(x), flow().log_prob(x))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (make_flow(), rn.Flow(rn.real_nvp(2, num_couplings=4, hidden_dims=(8,)))),
        (rn.Flow(rn.Compose([rn.Logit(0.05)]), (2,)), rn.Flow(rn.Compose([rn.Logit(0.01)]), (2,))),
        (make_flow(), make_flow().bijection),
    ],
)
def test_another_architecture_is_refused(tmp_path, there, here):
    rn.save(there, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="another architecture"):
        rn.load(here, tmp_path / "flow.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        rn.load(make_flow(), tmp_path / "flow.pt")
    with pytest.raises(RuntimeError, match="could not be written"):
        rn.save(make_flow(), tmp_path / "nowhere" / "flow.pt")
