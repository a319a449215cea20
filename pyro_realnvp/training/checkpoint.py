# SPDX-License-Identifier: Apache-2.0
"""The file of a training, from which the same call resumes the training where it was stopped."""

import os
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from ..saving import check_architecture, describe, read, write
from . import distributed
from .snapshots import State

_TRAINING = "the state of a training"


class Checkpoint:
    """The file of a training: the content that was found in it, and the parts whose states are written to it.

    In many processes only the first reads and writes the file; it sends the content to the others.

    Args:
        path: the file, which need not exist.
        every: the number of steps between two writes.
    """

    def __init__(self, path: str | os.PathLike[str], every: int):
        if every < 1:
            raise ValueError(f"expected checkpoint_every >= 1; got {every}")
        self.path = path
        self.every = every
        if os.path.isdir(path):
            raise IsADirectoryError(f"expected checkpoint to be the path of a file; got the folder {path}")
        is_there = distributed.rank() == 0 and os.path.exists(path)
        self.found: dict[str, Any] | None = distributed.agree(read(path, _TRAINING) if is_there else None)

    def connect(self, module: nn.Module, settings: dict[str, Any], **parts: Any) -> None:
        """Registers the parts to write. If the file was found, loads its states into them.

        Args:
            module: the module that is trained.
            settings: plain values, which must be equal to those in the file.
            parts: further objects with ``state_dict`` and ``load_state_dict``.

        Raises:
            ValueError: The settings or the architecture differ from those in the file.
            RuntimeError: The file lacks a state, or holds one that does not fit. The module is as it was before.
        """
        self.settings = settings
        self.architecture: list[str] = describe(module)
        self.parts: dict[str, Any] = {"module": module} | parts
        if self.found is None:
            return
        theirs = self.found["settings"]
        differences = [
            f"{k}={theirs[k]!r} there, {v!r} here"
            for k, v in settings.items()
            if k in theirs and theirs[k] != v  # an older file lacks newer settings
        ]
        if differences:
            raise ValueError(
                f"{self.path} belongs to another training: {'; '.join(differences)}. Pass the options and the data "
                "that it began with to resume it, or another path to begin a new training"
            )
        check_architecture(module, self.found["architecture"], self.found["parts"]["module"], self.path)
        # The file is intact, but it may have been edited, so any part may fail to load after the module has already
        # changed. All errors that a missing or foreign entry causes are caught, and the module gets its state back.
        before = State([module], [*module.parameters()])
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.found["parts"][name])
            # This comes last, since a stream that passes over its batches draws random numbers.
            if len(self.found["random"]) == distributed.count():
                set_random_state(self.found["random"][distributed.rank()])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            before.restore()
            raise RuntimeError(
                f"{self.path} does not hold a whole training ({error!r}): it was changed. Use a backup copy, or "
                "remove it to begin again"
            ) from error

    def write(self) -> None:
        """Writes the states of all parts. All processes must call this, since it gathers their random states."""
        content = {
            "settings": self.settings,
            "architecture": self.architecture,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": distributed.gather(random_state()),
        }
        if distributed.rank() == 0:
            write(self.path, _TRAINING, content)


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch, numpy and Python."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the states that :func:`random_state` returned; there may be another number of GPUs."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
