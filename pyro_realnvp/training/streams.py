# SPDX-License-Identifier: Apache-2.0
"""Batches that a DataLoader or another iterable yields."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from . import distributed
from .checkpoint import random_state, set_random_state
from .rows import Batch, bad_rows, raise_bad_rows

_MOST_BATCHES = 100_000


class Stream:
    """The batches of a DataLoader or of another iterable, on the flow's device. ``next`` starts over after the last.

    The position of an iterator cannot be saved. A checkpoint therefore holds the states that all random generators had
    when the epoch began, and how many of its batches have been used: a resumed run begins that epoch again and passes
    over these batches. The loader must yield the same batches from the same random states for this to be exact.
    """

    def __init__(self, flow: nn.Module, source: Iterable[Any], *, must_end: bool = False):
        self.must_end = must_end
        self.flow = flow
        self.source = source
        self.own: nn.Parameter = next(flow.parameters())
        self.epoch: int = 0
        self.position: int = 0
        self.is_ahead: bool = False  # whether one more batch has been drawn
        self.start: dict[str, Any] = {}
        self.batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Makes one pass over the source."""
        batch = None
        for number, batch in enumerate(self.source):
            if self.must_end and number == _MOST_BATCHES:
                raise ValueError(f"expected validation data that end; got {_MOST_BATCHES} batches: pass a finite part")
            yield self._batch(batch)
        if batch is None:
            raise ValueError(
                f"expected a {type(self.source).__name__} that yields batches; got none: is its dataset smaller than a "
                "batch, or was it an iterator that has come to its end?"
            )

    def _batch(self, batch) -> Batch:
        x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        strange = [type(value).__name__ for value in (x, *rest) if not isinstance(value, (Tensor, np.ndarray))]
        if strange:
            raise TypeError(
                f"expected batches of tensors, x or (x, context); got {strange[0]}: let the "
                f"{type(self.source).__name__} yield tensors, for example by a collate_fn"
            )
        if len(rest) > 1:
            raise ValueError(
                f"expected batches of x or (x, context); got batches of {len(batch)} tensors: drop the others"
            )
        batch = Batch(*(torch.as_tensor(value) for value in (x, *rest)))
        if rest and not getattr(self.flow, "takes_context", True):
            raise ValueError(
                f"the {type(self.source).__name__} yields two tensors, but the flow takes no context: if the second "
                "is a label, let it yield x alone, or build the flow with context_dim= and yield one-hot labels"
            )
        raise_bad_rows(bad_rows(batch, getattr(getattr(self.flow, "bijection", None), "codomain", None)), len(batch.x))
        return Batch(*(value if value is None else value.to(self.own.device, non_blocking=True) for value in batch))

    def __next__(self) -> Batch:
        if self.batches is None:
            self._begin()
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self._begin()
            batch = next(self.batches)
        self.position += 1
        self.is_ahead = False
        return batch

    def some(self) -> Batch:
        """The next batch, which comes again at the next call of ``next``."""
        epoch, position = self.epoch, self.position
        batch = next(self)
        self.batches = chain([batch], self.batches)
        self.epoch, self.position, self.is_ahead = epoch, position, True
        return batch

    def _begin(self) -> None:
        """Begins an epoch, and notes the random states that its order follows from."""
        for part in parts_of(self.source):
            if isinstance(part, DistributedSampler):
                part.set_epoch(self.epoch)
        self.start = self._random_state()
        self.batches, self.position = iter(self), 0

    def _generators(self) -> list[torch.Generator]:
        """The generators that belong to the loader and its samplers, and not to torch as a whole."""
        return [part.generator for part in parts_of(self.source) if getattr(part, "generator", None) is not None]

    def _random_state(self) -> dict[str, Any]:
        return random_state() | {"own": [generator.get_state() for generator in self._generators()]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": distributed.gather(self.start),
            "epoch": self.epoch,
            "position": self.position,
            "is_ahead": self.is_ahead,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begins the epoch again from the same random states, and passes over the batches that were used.

        The random states stay where this leaves them; :class:`Checkpoint` then sets those of the interrupted step.
        """
        if not any(state["start"]):  # it had not begun
            return
        self.epoch = state["epoch"]
        # Each process has random states of its own. Another number of processes cannot take them over, so it begins
        # the epoch in whatever order its own states give.
        if len(state["start"]) == distributed.count():
            start = state["start"][distributed.rank()]
            set_random_state(start)
            for generator, own in zip(self._generators(), start["own"]):
                generator.set_state(own)
        self._begin()
        for _ in range(state["position"]):
            next(self.batches)
        self.position = state["position"]
        if state["is_ahead"]:
            self.some()


def parts_of(source: Iterable[Any]) -> list:
    """The parts of a loader that may hold a generator: the loader itself and its samplers, each of them once."""
    batch_sampler = getattr(source, "batch_sampler", None)
    parts = [source, getattr(source, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(part): part for part in parts if part is not None}.values())
