# SPDX-License-Identifier: Apache-2.0
"""Runs of couplings that split an event alike, so that they can hand on its halves without joining them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .bijection import DIRECTIONS, Bijection
from .coupling import Coupling, run_couplings
from .masks import Mask
from .reshape import Permute


class Run(NamedTuple):
    """Couplings next to each other, and the permutations between them that only exchange the halves."""

    couplings: list[Coupling]
    swaps: list[bool]
    """Whether a coupling keeps the entries that the one before it changed; False for the first."""

    def evaluate(
        self, x: Tensor, context: Tensor | None, *, forward: bool, call: Callable | None
    ) -> tuple[Tensor, Tensor]:
        swaps = self.swaps if forward else [False, *reversed(self.swaps[1:])]
        couplings = self.couplings if forward else reversed(self.couplings)
        steps = [(one, swap, context if one.context_dim else None) for one, swap in zip(couplings, swaps)]
        return run_couplings(steps, x, forward=forward, call=call)


def runs(parts: Sequence[Bijection]) -> list[tuple[int, Run | None]]:
    """Divides the parts into runs of couplings and single parts, with the index of the first part of each."""
    found: list[tuple[int, Run | None]] = []
    k = 0
    while k < len(parts):
        run, end = _run_from(parts, k)
        found.append((k, run))
        k = end
    return found


def marks(parts: Sequence[Bijection]) -> list:
    """Objects whose identity changes whenever `runs` may find something else."""
    found: list = []
    for part in parts:
        found.append(part)
        if isinstance(part, Coupling):
            # `part.mask` takes three times as long, in the search of nn.Module for what it holds.
            mask = part._modules["mask"]
            found += (mask, mask.layout, *(name in vars(part) for name in DIRECTIONS))
        elif isinstance(part, Permute):
            found.append(part.layout)
    return found


def shape_checkers(parts: Sequence[Bijection]) -> list[Bijection]:
    """The parts that have to check a shape: of couplings next to each other, which keep it, the first is enough."""
    found: list[Bijection] = []
    after_coupling = False
    for part in parts:
        is_coupling = isinstance(part, Coupling)
        if not (is_coupling and after_coupling):
            found.append(part)
        after_coupling = is_coupling
    return found


def _run_from(parts: Sequence[Bijection], start: int) -> tuple[Run | None, int]:
    """The run that begins with the part `start`, None if that part is no coupling, and the index of what follows."""
    if not _hands_on(parts[start]):
        return None, start + 1
    run, end = Run([parts[start]], [False]), start + 1
    moved: Sequence[int] | None = None
    for k in range(end, len(parts)):
        part = parts[k]
        if type(part) is Permute:  # a subclass may do more
            moved = part.layout if moved is None else [moved[i] for i in part.layout]
            continue
        swap = _swap(run.couplings[-1].mask, moved, part.mask) if _hands_on(part) else None
        if swap is None:
            break
        run.couplings.append(part)
        run.swaps.append(swap)
        end, moved = k + 1, None
    return run, end


def _hands_on(part: Bijection) -> bool:
    """Whether a part is a coupling that leaves splitting and joining to its base class."""
    if not isinstance(part, Coupling) or type(part.mask) is not Mask:
        return False
    kind, own = type(part), vars(part)
    return all(getattr(kind, name) is getattr(Coupling, name) and name not in own for name in DIRECTIONS)


def _swap(before: Mask, moved: Sequence[int] | None, after: Mask) -> bool | None:
    """Whether the mask `after` a permutation keeps what the mask `before` it changes; None if it splits otherwise."""
    if (before.event_dim, before.squeeze) != (after.event_dim, after.squeeze) or (moved and before.event_dim > 1):
        return None
    entries = after.layout if moved is None else tuple(moved[i] for i in after.layout)
    if entries == before.layout and after.num_kept == before.num_kept:
        return False
    opposite = before.layout[before.num_kept :] + before.layout[: before.num_kept]
    return True if entries == opposite and after.num_kept == before.num_changed else None
