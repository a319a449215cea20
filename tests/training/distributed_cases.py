# SPDX-License-Identifier: Apache-2.0
"""Trainings that give the same result in one process and in many. Under torchrun each process writes its results to a
file."""

import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_realnvp as rn

X = torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
C = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(400, generator=torch.Generator().manual_seed(2))


def processes():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


FAR = 1000 + 50 * X
EXTREME = torch.cat([1e6 * X[:1], X[:1], 1e6 * X[1:2], X[1:40]])  # both extreme rows come to one process


def train(data=X, base=None, trained_by=None, **options):
    """What a training of a flow gives. The flow of one process may have been trained before."""
    torch.manual_seed(rank())  # each process starts with other weights and permutations; fit copies those of the first
    between = lambda dim: rn.ActNorm(dim).inv  # noqa: E731
    context_dim = 2 if "context" in options else 0
    couplings = rn.real_nvp(3, num_couplings=4, hidden_dims=(8,), between=between, context_dim=context_dim)
    flow = rn.Flow(rn.Compose([couplings, rn.Permute(torch.arange(3).roll(rank()))]), base=base).double()
    if rank() == trained_by:
        for bijection in flow.modules():
            if isinstance(bijection, rn.ActNorm):
                bijection.initialize(X + 1)
    options = {"num_steps": 40, "validate_every": 10, "seed": 0, "batch_size": 48, "progress": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = rn.fit(flow, data, **options)
    return {
        "layers": [type(module).__name__ for module in flow.modules()],
        "weights": torch.cat([p.detach().flatten() for p in flow.parameters()]).tolist(),
        "loss": history.loss,
        "validation_loss": history.validation_loss,
        "best_step": history.best_step,
        "stopped": history.stopped,
    }


def loader():
    sampler = DistributedSampler(TensorDataset(X), processes(), rank(), drop_last=True)
    return DataLoader(TensorDataset(X), batch_size=48 // processes(), sampler=sampler, drop_last=True)


def callbacks():
    """The callbacks of this process: only the last process has one."""
    return [lambda history: len(history.loss) == 25] if rank() == processes() - 1 else []


def refused(**options):
    try:
        train(**options)
    except ValueError as error:
        return {"refused": str(error) if processes() > 1 else ""}
    return {"refused": ""}


CASES = {
    "rows": train,
    "context and weights": lambda: train(context=C, weights=WEIGHTS),
    "loader": lambda: train(loader(), validation=X[:101]),
    "early": lambda: train(validation=-X, patience=10),
    "callback": lambda: train(callbacks=callbacks()),
    "one row held out": lambda: train(validation=X[:1]),
    "far rows and a mixture": lambda: train(FAR, base=rn.MixtureBase(3, num_components=2)),
    "far rows, the second was trained": lambda: train(FAR, trained_by=1),
    "extreme rows held out": lambda: train(validation=EXTREME),
    "compiled": lambda: train(compile=True),
    "no sampler": lambda: refused(data=DataLoader(TensorDataset(X), batch_size=24)),
    "odd batch": lambda: refused(batch_size=33),
}


def killed_once(folder):
    """A training whose second process kills itself once."""

    def kill(history):
        if rank() == 1 and len(history.loss) == 25 and not (folder / "was_killed").exists():
            (folder / "was_killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return train(checkpoint=folder / "run.pt" if rank() == 0 else None, checkpoint_every=10, callbacks=[kill])


if __name__ == "__main__":
    folder, which = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    # Gloo may hang while it connects both processes. Then the alarm ends this one, and torchrun starts both again.
    signal.alarm(8)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    signal.alarm(0)
    cases = CASES if which == "all" else {which: lambda: killed_once(folder)}
    results = {name: case() for name, case in cases.items()}
    (folder / f"{which}_{rank()}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()
