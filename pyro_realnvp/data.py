# SPDX-License-Identifier: Apache-2.0
"""Rows to train on: checked, held out, in batches."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .dequantization import DequantizedFlow
from .elementwise import column_statistics

Batch = tuple[Tensor, Tensor | None]

_ENTRIES_PER_PASS = 2**20
_ROWS_PER_PASS = 4096


def prepare(
    flow: nn.Module, x, context, validation, batch_size: int | None, generator: torch.Generator
) -> tuple[Iterator[Batch], Iterable[Batch] | None]:
    """An endless iterator over batches of checked rows, and the batches that are held out."""
    held_out = None
    if not isinstance(validation, (int, float)):
        held_out = _held_out(flow, validation)
    if isinstance(x, DataLoader):
        if context is not None:
            raise ValueError("expected a DataLoader that yields (x, context); got context= beside it")
        return _endless(flow, x), held_out
    x, context = _rows(flow, x, context)
    if x.is_floating_point():  # levels may be constant: dequantisation adds noise
        constant = (column_statistics(x.flatten(1), x[0].numel())[1] == 0).nonzero().squeeze(-1).tolist()
        if constant:
            raise ValueError(f"columns {constant[:10]} of x are constant and have no density: drop them or add noise")
    if held_out is None and validation:
        num_held_out = int(validation * len(x))
        if not 0 < num_held_out < len(x) - 1:
            raise ValueError(
                f"validation={validation} of {len(x)} rows holds out {num_held_out} and trains on "
                f"{len(x) - num_held_out}: expected at least one and two; pass 0 to hold out none"
            )
        order = torch.randperm(len(x), generator=generator).to(x.device)
        apart, train = order[:num_held_out], order[num_held_out:]
        held_out = _in_batches(x[apart], None if context is None else context[apart])
        x, context = x[train], None if context is None else context[train]
    batch_size = min(256, len(x)) if batch_size is None else batch_size
    if not 0 < batch_size <= len(x):
        raise ValueError(f"expected a batch_size from 1 to {len(x)}, the rows to train on; got {batch_size}")
    return _shuffled(x, context, batch_size, generator), held_out


def _rows(flow: nn.Module, x, context) -> tuple[Tensor, Tensor | None]:
    """x and context as checked tensors."""
    x = _as_tensor(flow, x, "x", integer=isinstance(flow, DequantizedFlow))
    event_shape = getattr(flow, "event_shape", x.shape[1:])
    if x.dim() == 0 or x.shape[1:] != event_shape:
        raise ValueError(f"expected x of shape (N, {', '.join(map(str, event_shape))}); got {tuple(x.shape)}")
    if len(x) < 2:
        raise ValueError(f"expected at least two rows of x; got {len(x)}")
    if context is not None:
        context = _as_tensor(flow, context, "context")
        if context.shape[:1] != x.shape[:1]:
            raise ValueError(f"expected a context for each of the {len(x)} rows of x; got shape {tuple(context.shape)}")
    for name, rows in (("x", x), ("context", context)):
        bad = 0 if rows is None else int((~rows.flatten(1).isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f"expected finite values; got nan or inf in {bad} of {len(rows)} rows of {name}: drop them"
            )
    return x, context


def _as_tensor(flow: nn.Module, values, name: str, *, integer: bool = False) -> Tensor:
    own = next(flow.parameters())
    if integer:
        values = torch.as_tensor(values, device=own.device) if isinstance(values, np.ndarray) else values
        if not isinstance(values, Tensor) or values.is_floating_point():
            got = f"values of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"expected {name} to hold integer levels; got {got}: pass {name}.long()")
        own = torch.empty((), dtype=values.dtype, device=own.device)
    if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating):
        return torch.as_tensor(values, dtype=own.dtype, device=own.device)
    if not isinstance(values, Tensor):
        got = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(f"expected {name} to be a tensor or a floating-point array; got {got}")
    if name == "context" and not values.is_floating_point():
        raise TypeError(
            f"expected context of the flow's {own.dtype}; got {values.dtype}: labels enter as "
            "torch.nn.functional.one_hot(labels, num_classes).float()"
        )
    if values.dtype != own.dtype:
        raise TypeError(f"expected {name} of the flow's {own.dtype}; got {values.dtype}: pass {name}.to({own.dtype})")
    if values.device != own.device:
        raise ValueError(f"the flow is on {own.device}, {name} on {values.device}: move one of them with .to()")
    return values


def _held_out(flow: nn.Module, validation) -> Iterable[Batch]:
    if isinstance(validation, DataLoader):
        return _Loader(flow, validation)
    x, context = validation if isinstance(validation, tuple) else (validation, None)
    return _in_batches(*_rows(flow, x, context))


def _in_batches(x: Tensor, context: Tensor | None) -> list[Batch]:
    num_rows = min(_ROWS_PER_PASS, max(1, _ENTRIES_PER_PASS // max(x[0].numel(), 1)))
    contexts = [None] * len(x) if context is None else context.split(num_rows)
    return list(zip(x.split(num_rows), contexts))


def _shuffled(x: Tensor, context: Tensor | None, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Whole batches, in a new order in each epoch."""
    while True:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
            yield x[rows], None if context is None else context[rows]


class _Loader:
    """The batches of a DataLoader as pairs (x, context), on the flow's device."""

    def __init__(self, flow: nn.Module, loader: DataLoader):
        self.loader, self.device = loader, next(flow.parameters()).device

    def __iter__(self) -> Iterator[Batch]:
        batch = None
        for batch in self.loader:
            x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
            if len(rest) > 1:
                raise ValueError(f"expected a DataLoader of x or (x, context); got batches of {len(batch)} tensors")
            yield x.to(self.device), rest[0].to(self.device) if rest else None
        if batch is None:
            raise ValueError(
                "expected a DataLoader that yields batches; got none: is its dataset smaller than a batch?"
            )


def _endless(flow: nn.Module, loader: DataLoader) -> Iterator[Batch]:
    while True:
        yield from _Loader(flow, loader)
