# SPDX-License-Identifier: Apache-2.0
"""Rows of data, which are checked once and read batch by batch."""

import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..bijections.inputs import remedy_of_shape
from ..bijections.shapes import differs, strictly_inside
from ..distributions import Flow

_ENTRIES_PER_PASS = 2**20
_ROWS_PER_PASS = 4096
_MARKED_ROWS = 1000
_FINEST = 1e-3  # of the range of a column, the coarsest rounding that leaves its density alone


class Batch(NamedTuple):
    """Some rows of x, with their contexts and weights if there are any."""

    x: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None


class Rows:
    """Checked rows of x, with their contexts and weights. Memory-mapped arrays stay on the disk.

    Args:
        flow: the flow whose event shape, dtype and device the rows must fit.
        x, context, weights: tensors or arrays with one entry for each row, as in :func:`fit`.
        train: whether the rows are to be trained on, for which at least two are needed, with no constant column.
    """

    def __init__(
        self,
        flow: nn.Module,
        x: Tensor | np.ndarray,
        context: Tensor | np.ndarray | None = None,
        weights: Tensor | np.ndarray | None = None,
        *,
        train: bool = True,
    ):
        self.own: nn.Parameter = next(flow.parameters())
        self.levels: int | None = flow.levels if getattr(flow, "is_discrete", False) else None
        self.support: constraints.Constraint | None = flow.bijection.codomain if isinstance(flow, Flow) else None
        x = _checked(self.own, x, "x", levels=self.levels)
        event_shape = tuple(getattr(flow, "event_shape", x.shape[1:]))
        if not x.ndim or tuple(x.shape[1:]) != event_shape:
            raise ValueError(
                f"expected x of shape (N, {', '.join(map(str, event_shape))}); got {tuple(x.shape)}: "
                + remedy_of_shape(tuple(x.shape), event_shape)
            )
        if context is not None:
            # An embedding may read integers, as torch.nn.Embedding does, and so may a module of the user's.
            labels = getattr(getattr(flow, "flow", flow), "embedding", "unknown") is not None
            context = _checked(self.own, context, "context", labels=labels)
            if context.ndim < 2 and not (labels and context.ndim):
                raise ValueError(
                    f"expected context of shape (N, context_dim); got {tuple(context.shape)}: pass context[:, None] if "
                    "each row has one number"
                )
            if len(context) != len(x):
                raise ValueError(
                    f"expected a context for each of the {len(x)} rows of x; got shape {tuple(context.shape)}"
                )
        weights = None if weights is None else _normalized(weights, len(x))
        self.columns: Batch = Batch(x, context, weights)
        # A row of weight 0 may be anything, even where the flow has no density: 0 times infinity would be nan.
        self.counted: Tensor = torch.arange(len(x)) if weights is None else weights.nonzero().squeeze(1)
        if len(self) < 1 + train:
            of_weight = "" if weights is None else ", of positive weight"
            raise ValueError(
                f"expected at least {'two rows' if train else 'one row'} of x{of_weight}; got {len(self)} of {len(x)}"
            )
        self._check_values(train)

    def __len__(self) -> int:
        """The number of rows that count."""
        return len(self.counted)

    def __getitem__(self, rows: Tensor) -> Batch:
        """Those of these numbers among the rows that count, in the flow's dtype and on its device."""
        return Batch(*(None if values is None else self._tensor(values, rows) for values in self.columns))

    def _tensor(self, values: Tensor | np.ndarray, rows: Tensor) -> Tensor:
        values = self._read(values, rows)
        if values.is_floating_point():
            values = values.to(self.own.dtype)
        if self.own.is_cuda and not values.is_cuda:
            values = values.pin_memory()
        return values.to(self.own.device, non_blocking=True)

    def _check_values(self, train: bool) -> None:
        """Reads all rows once, and raises an error for nan, inf, constant columns and lost digits."""
        self._check_digits()
        first = self[torch.arange(1)].x.flatten()
        bad, varies, highest = Counter(), torch.zeros_like(first, dtype=torch.bool), 0
        for batch in self.in_order(torch.arange(len(self))):
            varies |= differs(batch.x.reshape(len(batch.x), -1), first).any(0)
            bad += Counter(bad_rows(batch, self.support))
            highest = highest if self.levels is None else max(highest, int(batch.x.long().max()))
        raise_bad_rows(bad, len(self))
        constant = (~varies).nonzero().squeeze(-1).tolist()
        # Integer levels may be constant, since dequantization adds noise to them.
        if constant and train and self.levels is None:
            what, remedy = ("columns", "drop them") if self.columns.x.ndim <= 2 else ("pixels", "use a DequantizedFlow")
            raise ValueError(f"{what} {constant[:10]} of x are constant and have no density: {remedy} or add noise")
        if self.levels is not None and highest <= 1 < self.levels - 1:
            warnings.warn(
                f"all values of x are 0 or 1, while the flow has {self.levels} levels: if x was in [0, 1], pass "
                f"{_to_levels(self.levels)}; if the images are binary, build the flow with levels=2",
                RuntimeWarning,
                stacklevel=6,
            )

    def _check_digits(self) -> None:
        """Raises an error if the flow's dtype is too coarse for numbers like these, such as seconds since 1970."""
        own = torch.finfo(self.own.dtype)
        for name, values in zip(Batch._fields[:2], self.columns):
            dtype = None if values is None else self._read(values, torch.arange(1)).dtype
            if dtype is None or not dtype.is_floating_point or torch.finfo(dtype).eps >= own.eps:
                continue
            passes = self._passes(torch.arange(len(self)))
            ranges = [self._read(values, some).reshape(len(some), -1).aminmax(dim=0) for some in passes]
            low = torch.stack([part.min for part in ranges]).amin(0)
            high = torch.stack([part.max for part in ranges]).amax(0)
            largest = torch.maximum(low.abs(), high.abs())
            too_large = (largest > own.max) & largest.isfinite()
            lost = too_large | ((high > low) & (own.eps * largest > max(_FINEST, 4 * own.eps) * (high - low)))
            if lost.any():
                k = int(lost.nonzero()[0])
                raise ValueError(
                    f"column {k} of {name} runs from {low[k].item():.9g} to {high[k].item():.9g}, which the flow's "
                    f"{self.own.dtype} is too coarse for: subtract a constant or rescale the column, or train in "
                    "float64, after flow.double()"
                )

    def in_order(self, rows: Tensor) -> Iterator[Batch]:
        """Yields the rows with these numbers once, in large batches."""
        for some in self._passes(rows):
            yield self[some]

    def _passes(self, rows: Tensor) -> Sequence[Tensor]:
        if not len(rows):  # this process may have no share of the held-out rows
            return ()
        entries = max(math.prod(self.columns.x.shape[1:]), 1)
        return rows.split(min(_ROWS_PER_PASS, max(1, _ENTRIES_PER_PASS // entries)))

    def _read(self, values: Tensor | np.ndarray, rows: Tensor) -> Tensor:
        """The rows with these numbers, as they are."""
        rows = self.counted[rows]
        if isinstance(values, np.ndarray):
            return torch.from_numpy(_as_torch_has_it(values[rows.numpy()]))
        return values[rows.to(values.device)]

    def mark(self) -> int:
        """A checksum of about a thousand of the rows, by which a checkpoint recognizes its data."""
        some = self[torch.arange(0, len(self), math.ceil(len(self) / _MARKED_ROWS))]
        parts = [values.cpu().double().numpy().tobytes() for values in some if values is not None]
        return zlib.crc32(str(len(self)).encode() + b"".join(parts))


def bad_rows(batch: Batch, support: constraints.Constraint | None) -> dict[str, int]:
    """The number of rows that no flow can fit, by what is wrong with them.

    Args:
        batch: the rows.
        support: the support of the flow; ``None`` for a flow of integers, or if it is unknown.
    """
    bad = {}
    for name, values in zip(Batch._fields, batch):
        if values is not None:
            what = f"expected finite values; got nan or inf in {{}} rows of {name}: drop these rows"
            bad[what] = ~values.reshape(len(values), -1).isfinite().all(1)
    inside = None if support is None else strictly_inside(support, batch.x)
    if inside is not None:
        what = "expected rows inside the support of the flow; got {} rows of x on a bound or beyond, where the density "
        bad[what + "is 0: move them inside, or give the flow a wider support"] = ~inside.reshape(len(inside), -1).all(1)
    return {what: int(is_bad.sum()) for what, is_bad in bad.items()}


def raise_bad_rows(bad: Mapping[str, int], num_rows: int) -> None:
    """Raises an error if there are bad rows."""
    for what, number in bad.items():
        if number:
            raise ValueError(what.format(f"{number} of {num_rows}"))


def _to_levels(levels: int) -> str:
    return f"(x * {levels - 1}).round().long()"


def _checked(own: Tensor, values, name: str, *, levels: int | None = None, labels: bool = False) -> Tensor | np.ndarray:
    """Checks the type, dtype and device of values, and returns them as a tensor or as a memory-mapped array.

    Args:
        own: a parameter of the flow.
        levels: the number of levels if the values must be integers.
        labels: whether the values may be integers.
    """
    integer = levels is not None
    is_array = isinstance(values, np.ndarray)
    if isinstance(values, np.ma.MaskedArray) or (not is_array and not isinstance(values, Tensor)):
        kind = "a tensor or an array of integer levels" if integer else "a tensor or a floating-point array"
        dense = next((way for way in ("to_numpy", "toarray") if hasattr(values, way)), None)
        remedy = f"{name}.{dense}()" if dense else f"np.asarray({name}) or a DataLoader"
        raise TypeError(f"expected {name} to be {kind}; got {type(values).__name__}: pass {remedy}")
    is_floating = np.issubdtype(values.dtype, np.floating) if is_array else values.is_floating_point()
    if integer and (is_floating or (is_array and not np.issubdtype(values.dtype, np.integer) and values.dtype != bool)):
        raise TypeError(
            f"expected x to hold integer levels 0, ..., {levels - 1}; got values of {values.dtype}: if they are in "
            f"[0, 1], pass {_to_levels(levels)}; if they are levels, pass x.long()" + " of a tensor" * is_array
        )
    if is_array:
        if not integer and not is_floating and not (labels and np.issubdtype(values.dtype, np.integer)):
            raise TypeError(f"expected {name} to be a tensor or a floating-point array; got an array of {values.dtype}")
        if isinstance(values, np.memmap):
            return values
        # from_numpy shares memory, and takes only contiguous, writable arrays; np.require copies any other.
        return torch.from_numpy(np.require(_as_torch_has_it(values), requirements=["C", "W"]))
    if values.layout != torch.strided:
        raise TypeError(f"expected a dense {name}; got one of {values.layout}: pass {name}.to_dense()")
    if values.requires_grad:
        raise ValueError(f"expected a {name} without gradients, which a training would add up: pass {name}.detach()")
    if name == "context" and not is_floating and not labels:
        raise TypeError(
            f"expected context of the flow's {own.dtype}; got {values.dtype}: encode labels by "
            "torch.nn.functional.one_hot(labels, num_classes).float(), and pass other numbers by context.float()"
        )
    if not integer and values.dtype != own.dtype and (is_floating or not labels):
        raise TypeError(f"expected {name} of the flow's {own.dtype}; got {values.dtype}: pass {name}.to({own.dtype})")
    if values.device.type != "cpu" and values.device != own.device:
        raise ValueError(f"the flow is on {own.device}, {name} on {values.device}: move one of them with .to()")
    return values


def _as_torch_has_it(values: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine, and in double precision if its own is one that torch lacks."""
    return values.astype(np.float64 if values.dtype == np.longdouble else values.dtype.newbyteorder("="), copy=False)


def _normalized(weights, num_rows: int) -> Tensor:
    """Checks the weights, and scales those that are positive to a mean of 1."""
    weights = weights if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights, dtype=np.float64))
    weights = weights.detach().double().cpu()
    if weights.shape != (num_rows,):
        raise ValueError(f"expected a weight for each of the {num_rows} rows of x; got shape {tuple(weights.shape)}")
    if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise ValueError("expected finite weights >= 0: check that none is negative or nan, and that some are positive")
    return weights / weights[weights > 0].mean()
