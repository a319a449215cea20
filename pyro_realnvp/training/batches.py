# SPDX-License-Identifier: Apache-2.0
"""Batches to train on, which never end and can be resumed, and batches that are held out."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from . import distributed
from .checkpoint import random_state, set_random_state
from .rows import Batch, Rows, bad_rows, raise_bad_rows

_SOME_ROWS = 4096
_MOST_BATCHES = 100_000


class HeldOut:
    """The held-out rows, in the same batches at each pass. In many processes each reads its own share of them."""

    def __init__(self, rows: Rows, indices: Tensor):
        self.rows = rows
        self.indices: Tensor = indices[distributed.rank() :: distributed.count()]

    def __iter__(self) -> Iterator[Batch]:
        return self.rows.in_order(self.indices)


class Shuffled:
    """An endless iterator over whole batches of rows, in a new order in each epoch.

    In many processes each batch is the same in all of them, and each process reads its own share of its rows.

    A checkpoint does not hold the order of the rows. It holds the state that the generator had before it drew the
    order, and how many rows have been used, from which both the order and the later epochs follow.
    """

    def __init__(self, rows: Rows, indices: Tensor, batch_size: int, generator: torch.Generator):
        self.rows = rows
        self.indices = indices
        self.batch_size = batch_size
        self.generator = generator
        self._shuffle()

    def _shuffle(self) -> None:
        self.start: Tensor = self.generator.get_state()
        self.order: Tensor = self.indices[torch.randperm(len(self.indices), generator=self.generator)]
        self.position: int = 0

    def __next__(self) -> Batch:
        if self.position + self.batch_size > len(self.order):
            self._shuffle()
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.rows[rows[distributed.rank() :: distributed.count()]]

    def some(self) -> Batch:
        """Rows from all of the data to train on, in their order."""
        return self.rows[self.indices[:: math.ceil(len(self.indices) / _SOME_ROWS)]]

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["start"])
        self._shuffle()
        self.position = state["position"]


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
        return batch

    def some(self) -> Batch:
        """The next batch, which comes again at the next call of ``next``."""
        epoch, position = self.epoch, self.position
        batch = next(self)
        self.batches = chain([batch], self.batches)
        self.epoch, self.position = epoch, position
        return batch

    def _begin(self) -> None:
        """Begins an epoch, and notes the random states that its order follows from."""
        for part in _parts(self.source):
            if isinstance(part, DistributedSampler):
                part.set_epoch(self.epoch)
        self.start = self._random_state()
        self.batches, self.position = iter(self), 0

    def _generators(self) -> list[torch.Generator]:
        """The generators that belong to the loader and its samplers, and not to torch as a whole."""
        return [part.generator for part in _parts(self.source) if getattr(part, "generator", None) is not None]

    def _random_state(self) -> dict[str, Any]:
        return random_state() | {"own": [generator.get_state() for generator in self._generators()]}

    def state_dict(self) -> dict[str, Any]:
        return {"start": distributed.gather(self.start), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begins the epoch again from the same random states, and passes over the batches that were used.

        The random states stay where this leaves them; :class:`Checkpoint` then sets those of the interrupted step.
        """
        if not state["position"]:
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


def _parts(source: Iterable[Any]) -> list:
    """The parts of a loader that may hold a generator: the loader itself and its samplers, each of them once."""
    batch_sampler = getattr(source, "batch_sampler", None)
    parts = [source, getattr(source, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def of_all_processes(batch: Batch) -> Batch:
    """The rows that the processes have, together."""
    if not distributed.are_many():
        return batch
    parts = distributed.gather([None if values is None else values.cpu() for values in batch])
    return Batch(*(None if v[0] is None else torch.cat(v).to(batch.x.device) for v in zip(*parts)))


def prepare(
    flow: nn.Module,
    x: Tensor | np.ndarray | Iterable[Any],
    context: Tensor | np.ndarray | None,
    weights: Tensor | np.ndarray | None,
    validation: float | Tensor | np.ndarray | tuple[Any, ...] | Iterable[Any],
    batch_size: int | None,
    generator: torch.Generator,
) -> tuple[Shuffled | Stream, HeldOut | Stream | None, list[Rows]]:
    """Makes batches of the data that :func:`fit` takes.

    Returns:
        The endless batches to train on; the held-out batches, or ``None``; and all :class:`Rows`, which are the data
        that are not streamed.
    """
    held_out, tables = None, []
    if not isinstance(validation, (int, float)):
        held_out, tables = _held_out(flow, validation)
    if not _are_rows(x):
        if context is not None or weights is not None:
            raise ValueError(
                f"expected a {type(x).__name__} that yields (x, context); got context= or weights= beside it: "
                "let it yield the context, and pass x as a tensor or an array to use weights"
            )
        return Stream(flow, _sharded(x)), held_out, tables
    rows = Rows(flow, x, context, weights)
    indices = torch.arange(len(rows))
    if held_out is None and validation:
        num_held_out = int(validation * len(rows))
        if not 0 < num_held_out < len(rows) - 1:
            raise ValueError(
                f"validation={validation} of {len(rows)} rows holds out {num_held_out} and trains on "
                f"{len(rows) - num_held_out}: expected at least one row held out and two to train on. Pass another "
                "fraction, or 0 to hold out none"
            )
        order = torch.randperm(len(rows), generator=generator)
        held_out, indices = HeldOut(rows, order[:num_held_out]), order[num_held_out:]
        if weights is not None and not (rows.weight(indices) > 0 and rows.weight(held_out.indices) > 0):
            raise ValueError(
                f"validation={validation} leaves the held-out rows or those to train on without weight: choose "
                "the rows to hold out yourself, and pass them as validation="
            )
    batch_size = min(256, len(indices)) if batch_size is None else batch_size
    if not isinstance(batch_size, int) or not 0 < batch_size <= len(indices):
        raise ValueError(
            f"expected a batch_size from 1 to {len(indices)}, the rows to train on, a whole number; got {batch_size!r}"
        )
    if batch_size % distributed.count():
        raise ValueError(
            f"expected a batch_size that {distributed.count()} processes can share; got {batch_size}: pass a multiple"
        )
    return Shuffled(rows, indices, batch_size, generator), held_out, [rows, *tables]


def _are_rows(x) -> bool:
    """Whether x is read as rows, not as batches. Lists, dicts and strings are, so that :class:`Rows` refuses them."""
    known = isinstance(x, (Tensor, list, tuple, dict, str)) or hasattr(x, "__array__")
    return known or not isinstance(x, Iterable)


def _held_out(flow: nn.Module, validation) -> tuple[HeldOut | Stream, list[Rows]]:
    """Batches of the data that the user passed as ``validation``, and their rows if they are not streamed."""
    if isinstance(validation, tuple):
        rows = Rows(flow, *validation, train=False)
    elif _are_rows(validation):
        rows = Rows(flow, validation, train=False)
    elif isinstance(validation, Iterator):
        raise ValueError(
            "expected validation data that each validation can read again; "
            f"got a {type(validation).__name__}: pass rows, or a DataLoader"
        )
    else:
        return Stream(flow, validation, must_end=True), []
    return HeldOut(rows, torch.arange(len(rows))), [rows]


def _sharded(source: Iterable[Any]) -> Iterable:
    """Returns the source. Raises an error if it is a loader that would give the same rows to each of many processes."""
    if isinstance(source, DataLoader) and distributed.are_many():
        is_sharded = any(isinstance(part, DistributedSampler) for part in _parts(source))
        if not isinstance(source.dataset, IterableDataset) and not is_sharded:
            raise ValueError(
                f"expected a DataLoader that gives each of the {distributed.count()} processes its share of the rows: "
                "pass it sampler=torch.utils.data.DistributedSampler(dataset)"
            )
    return source
