# SPDX-License-Identifier: Apache-2.0
"""Helpers of several test files: flows, short trainings, models with known posteriors, counts of network passes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value

import pyro_realnvp as rn
from pyro_realnvp.training import checkpoint

TESTS = Path(__file__).parent
NETWORKS = rn.MLP, rn.ConvResNet


def table(names, rows):
    """`pytest.mark.parametrize` with the keys of the rows as ids."""
    return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))


def few(of_twenty):
    """Settings for expensive laws: `of_twenty` examples for every 20 of cheap laws, in each profile."""
    return hypothesis.settings(max_examples=max(1, hypothesis.settings.default.max_examples * of_twenty // 20))


def run_python(*command, **options):
    """Runs another Python, which finds this package and the modules of the tests. Fails if that Python fails."""
    path = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, **{"capture_output": True, "text": True, "env": env} | options)
    assert done.returncode == 0, done.stderr
    return done


def small_density(**options):
    """An estimator that fits in a moment."""
    small = {"num_couplings": 2, "hidden_dims": (8,), "num_steps": 20, "num_components": 1, "random_state": 0}
    return rn.RealNVPDensity(**small | options)


# -- flows -----------------------------------------------------------------------------------------------------------


def saved_bytes(call, without=()):
    """What the call returns, and the bytes that autograd keeps for its backward pass, some tensors left out."""
    left_out = {t.untyped_storage().data_ptr() for t in without}
    # The tensors are kept alive, since the address of a freed one could be used again and would be counted once.
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call()
    return output, sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in left_out)


def perturb(f, scale=0.2):
    """Moves every parameter away from its initial value, at which all flows are the identity."""
    with torch.no_grad():
        for p in f.parameters():
            p.add_(scale * torch.randn_like(p))
    return f


def make_flow(dim=2, *, seed=None, actnorm=False, num_couplings=4, hidden_dims=(8,), **options):
    """A small new flow; with a seed, always the same one."""
    if seed is not None:
        torch.manual_seed(seed)
    if actnorm:
        options["between"] = lambda dim: rn.ActNorm(dim).inv
    return rn.Flow(rn.real_nvp(dim, num_couplings=num_couplings, hidden_dims=hidden_dims, **options))


def small(dim, **options):
    """The bijection of `make_flow`."""
    return make_flow(dim, **options).bijection


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_same_state(module, other):
    """Asserts that two modules have the same state, bit for bit."""
    state, others_state = module.state_dict(), other.state_dict()
    assert state.keys() == others_state.keys()
    assert all(torch.equal(state[name], others_state[name]) for name in state)


def count_evaluations(f, call):
    """The set of the numbers of times that `call` evaluates the conditioners of f."""
    counts = {m: 0 for m in f.modules() if isinstance(m, NETWORKS)}
    handles = [m.register_forward_hook(lambda m, *_: counts.__setitem__(m, counts[m] + 1)) for m in counts]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return set(counts.values())


# -- trainings -------------------------------------------------------------------------------------------------------


def points(number=400):
    """Two columns of different scales, always the same rows."""
    return torch.randn(number, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]) + 1


def fit(flow, data, **options):
    """A short silent training that is always the same."""
    return rn.fit(flow, data, **{"num_steps": 40, "validate_every": 10, "seed": 0, "progress": False} | options)


def train(path=None, data=None, flow=None, stop_at=None, **options):
    """The flow, the history and the random state after a training; None if the training fails at step `stop_at`."""
    flow = make_flow(seed=1, actnorm=True) if flow is None else flow

    def stop(history):
        if len(history.loss) == stop_at:
            raise MemoryError

    options = {"num_steps": 60, "seed": None, "callbacks": [stop]} | options
    if path is not None:
        options |= {"checkpoint": path, "checkpoint_every": 7}
    try:
        history = fit(flow, points() if data is None else data, **options)
    except MemoryError:
        return None
    return flow, history, checkpoint.random_state()


# -- guides ----------------------------------------------------------------------------------------------------------

YEAR = torch.arange(1950.0, 2010.0)
Y = 5.0 + 0.03 * YEAR + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(0))


def uncentered(year, y):
    """A linear regression whose a and b correlate at -0.99997 and whose scales differ by a factor of 2000."""
    a = pyro.sample("a", dist.Normal(0.0, 1000.0))
    b = pyro.sample("b", dist.Normal(0.0, 100.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b * year, 0.5), obs=y)


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    left, right = (dist.Normal(m, 0.5).log_prob(z[..., 0]) for m in (-1.0, 1.0))
    mixture = torch.logaddexp(math.log(0.3) + left, math.log(0.7) + right) + dist.Normal(0.0, 1.0).log_prob(z[..., 1])
    pyro.factor("mixture", mixture - dist.Normal(0.0, 10.0).log_prob(z).sum(-1))


def fitted(model, *args, num_steps=200, **options):
    guide = rn.AutoRealNVP(model, num_couplings=4, **options)
    rn.fit_guide(guide, *args, num_steps=num_steps, progress=False)
    return guide


def rough(model, values, scale, *, shift=0.0):
    """A guide of independent normals of one scale about given values, without a training."""
    guide = rn.AutoRealNVP(model, warm_start=False, init_scale=scale, init_loc_fn=init_to_value(values=values)).build()
    guide.transform.parts[-1].start_loc.add_(shift)
    guide.mark_trained()
    return guide


def interrupt_after(monkeypatch, steps):
    """Lets the trainings of the estimators be interrupted after so many steps in all."""
    left = iter(range(steps))

    def augment(x):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr("pyro_realnvp.estimator.fading_noise", lambda *_: augment)
