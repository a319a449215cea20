# SPDX-License-Identifier: Apache-2.0
"""The file of a training, from which the same call goes on where it was stopped."""

import os
import random

import numpy as np
import torch
from torch import nn

from ..saving import check_architecture, describe, read, write
from . import distributed
from .snapshots import State

_TRAINING = "the state of a training"


class Checkpoint:
    """The file of a training: what was found in it, and the way to write it anew.

    Of many processes the first reads and writes it.
    """

    def __init__(self, path: str | os.PathLike, every: int):
        if every < 1:
            raise ValueError(f"expected checkpoint_every >= 1; got {every}")
        self.path, self.every = path, every
        is_there = distributed.rank() == 0 and os.path.exists(path)
        self.found = distributed.agree(read(path, _TRAINING) if is_there else None)

    def connect(self, module: nn.Module, settings: dict, **parts) -> None:
        """Says what is to be written, and brings all of it into the state that was found.

        Args:
            module: what is trained.
            settings: plain values that must be the same as in the file.
            parts: objects with a state.
        """
        self.settings, self.architecture = settings, describe(module)
        self.parts = {"module": module} | parts
        if self.found is None:
            return
        theirs = self.found["settings"]
        differences = [f"{k}={theirs.get(k)!r} there, {v!r} here" for k, v in settings.items() if theirs.get(k) != v]
        if differences:
            raise ValueError(
                f"{self.path} belongs to another training: {'; '.join(differences)}. Pass what it was begun with to "
                "go on with it, or another path"
            )
        check_architecture(module, self.found["architecture"], self.found["parts"]["module"], self.path)
        before = State([module], [*module.parameters()])
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.found["parts"][name])
            if len(self.found["random"]) == distributed.count():
                set_random_state(self.found["random"][distributed.rank()])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            before.restore()
            raise RuntimeError(
                f"{self.path} does not hold a whole training ({error!r}): it was changed. Take a copy, or remove it"
            ) from error

    def write(self) -> None:
        content = {
            "settings": self.settings,
            "architecture": self.architecture,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": distributed.gather(random_state()),
        }
        if distributed.rank() == 0:
            write(self.path, _TRAINING, content)


def random_state() -> dict:
    """The state of the generators of torch, numpy and Python."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
