# SPDX-License-Identifier: Apache-2.0
"""Rows of plates that draw subsamples, so that several evaluations of a model see all rows."""

import math
from collections.abc import Collection
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

MOST_PASSES = 1000
"""How often, at most, a model with subsampled plates is evaluated to see all rows, unless its numbers must be exact."""
_ROUNDING = 1e-9

Pass = tuple[float, dict[str, Tensor]]
"""The weight of an evaluation, and the rows of each subsampled plate in it."""


def draws_rows(site: dict[str, Any]) -> bool:
    """Whether a site is the subsample of a plate that has more rows."""
    return site_is_subsample(site) and site["fn"].subsample_size not in (None, site["fn"].size)


def refuse_subsampled(stacks: dict[str, list[Any]]) -> None:
    """Raises an error if a latent site lies under a plate that draws a subsample.

    Args:
        stacks: the plates of each site.
    """
    for name, frames in stacks.items():
        for frame in frames:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"latent site {name!r} lies under the plate {frame.name!r}, of which {frame.size} of "
                    f"{frame.full_size} rows are drawn: its values would be shared between rows. Use "
                    "AmortizedRealNVP for it, or make the plate without subsampling"
                )


def crossed(plates: dict[str, Distribution], trace: Trace) -> list[list[str]]:
    """The subsampled plates in groups: two of them are in one group if some site is under both."""
    groups = [{name} for name in plates]
    for site in trace.nodes.values():
        if site["type"] == "sample":
            together = {frame.name for frame in site["cond_indep_stack"]} & plates.keys()
            touched = [group for group in groups if group & together]
            if len(touched) > 1:
                groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    return [sorted(group) for group in groups]


def sequential(plates: dict[str, Distribution], trace: Trace) -> set[str]:
    """The subsampled plates of loops, in which each row has sites of its own name."""
    frames = [frame for site in trace.nodes.values() if site["type"] == "sample" for frame in site["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.name in plates and not frame.vectorized}


def passes_of(
    plates: dict[str, Distribution], groups: list[list[str]], most: int | None, loops: Collection[str] = ()
) -> list[Pass]:
    """Passes whose weighted sum sees each row of each plate once, or as many rows as `most` passes can.

    Args:
        plates: the distributions of the plates' rows.
        groups: the plates, those in one group under which a site stands together.
        most: the largest number of passes; None for as many as it takes.
        loops: the plates that cannot show a row twice in one pass.
    """
    passes: list[Pass] = [(1.0, {})]
    for names in groups:
        product: list[Pass] = [(1.0, {})]
        for name in names:
            own = _blocks(plates[name], most, may_repeat=name not in loops)
            product = [(v * w, rows | {name: block}) for v, rows in product for w, block in own]
        passes = _joined(passes, product)
    if most is not None and len(passes) > most:
        chosen = [passes[k] for k in torch.randperm(len(passes))[:most].tolist()]
        total = sum(weight for weight, _ in chosen)
        passes = [(weight / total, rows) for weight, rows in chosen]
    return passes


def _blocks(plate: Distribution, most: int | None, *, may_repeat: bool) -> list[tuple[float, Tensor]]:
    """Blocks of a plate's rows, with weights with which their sum sees each row once.

    The last rows, fewer than a block, are repeated in several blocks, in each of them another part of them twice. If no
    block may hold a row twice, the last whole block is shared out with them.
    """
    size, block = plate.size, plate.subsample_size
    num_rest = size % block
    if num_rest and not may_repeat:
        num_rest += block
    rest, *whole = torch.randperm(size).split([num_rest] + [block] * ((size - num_rest) // block))
    blocks = [(block / size, rows) for rows in whole]
    if num_rest:
        windows = num_rest // math.gcd(num_rest, block)
        windows = windows if most is None else min(windows, most)
        starts = [k * block % num_rest for k in range(windows)]
        cyclic = [rest[(torch.arange(block) + start) % num_rest] for start in starts]
        blocks += [(num_rest / size / windows, rows) for rows in cyclic]
    device = plate().device  # where the plate draws its rows
    return [(weight, rows.to(device)) for weight, rows in blocks]


def _joined(first: list[Pass], second: list[Pass]) -> list[Pass]:
    """Both lists side by side, such that the passes of each keep their weights. (They concern different terms.)"""
    joined, (i, j) = [], (0, 0)
    left, right = first[0][0], second[0][0]
    while i < len(first) and j < len(second):
        weight = min(left, right)
        joined.append((weight, first[i][1] | second[j][1]))
        left, right = left - weight, right - weight
        if left <= _ROUNDING:
            i += 1
            left = first[i][0] if i < len(first) else 0.0
        if right <= _ROUNDING:
            j += 1
            right = second[j][0] if j < len(second) else 0.0
    return joined
