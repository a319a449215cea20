# SPDX-License-Identifier: Apache-2.0
"""Batches to train on, which never end and can be resumed, and batches that are held out."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from . import distributed
from .rows import Batch, Rows
from .streams import Stream, parts_of

_SOME_ROWS = 4096


class HeldOut:
    """The held-out rows, in the same batches at each pass. In many processes each reads its own share of them."""

    def __init__(self, rows: Rows, indices: Tensor):
        self.rows = rows
        self.indices: Tensor = indices[distributed.rank() :: distributed.count()]

    def __iter__(self) -> Iterator[Batch]:
        return self.rows.in_order(self.indices)

    def numbers(self, positions: Tensor) -> Tensor:
        """The numbers in the caller's data of the rows that come at these positions."""
        return self.rows.counted[self.indices[positions]]


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
        """A random part of the rows to train on. (Every k-th row might be all of one kind.)"""
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(0))
        return self.rows[self.indices[order[:_SOME_ROWS].sort().values]]

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["start"])
        self._shuffle()
        self.position = state["position"]


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
    if validation is None or isinstance(validation, (list, dict, str)):
        raise TypeError(
            "expected validation to be a fraction of the rows, rows, (x, context) or a DataLoader; got "
            f"{type(validation).__name__}: pass 0 to hold out none"
        )
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
    """Whether x is read as rows, not as batches. Some are that :class:`Rows` refuses, as lists and sparse matrices."""
    known = isinstance(x, (Tensor, list, tuple, dict, str)) or hasattr(x, "__array__") or hasattr(x, "toarray")
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
        is_sharded = any(isinstance(part, DistributedSampler) for part in parts_of(source))
        if not isinstance(source.dataset, IterableDataset) and not is_sharded:
            raise ValueError(
                f"expected a DataLoader that gives each of the {distributed.count()} processes its share of the rows: "
                "pass it sampler=torch.utils.data.DistributedSampler(dataset)"
            )
    return source
