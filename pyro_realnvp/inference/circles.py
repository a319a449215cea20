# SPDX-License-Identifier: Apache-2.0
"""Where the circle of an angle is cut open, so that a posterior is in one piece."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..supports import angles, period_of, turned
from .base import quantiles_of
from .density import LogDensity
from .sites import Site

_NUM_CUTS = 16
_ENTRIES_AT_ONCE = 8
_INSIDE = 1e-6  # of the period: how far from its ends their densities are taken, since a support may leave one out
_BESIDE = 1e-3  # of the period: how far from its ends a start is, if it can be, since the density may have a kink there
_TOLERANCE = 0.05  # nats, between the log-densities at the ends, beside their rounding
_LEAST_GAIN = 1.0  # nats, by which the density must be lower elsewhere


@torch.no_grad()
def find_turns(density: LogDensity) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By which part of its period each angle is turned, so that both ends are where its density is low; and a start for
    each, which is the value in the trace unless this is near such an end.

    Otherwise a mode at an end would be two modes. Each angle goes around once, the other latents being at rest, and
    then again, the other angles being where they have a high density. If the ends of an interval have different
    densities, it is no circle, and stays as it is, as it does if the density is hardly lower anywhere else.

    Args:
        density: the log-density, whose trace has the values of the others.
    """
    nodes, cuts = density.trace.nodes, torch.linspace(0, 1, _NUM_CUTS + 1, dtype=torch.float64)[1:-1]
    near = torch.tensor([_INSIDE, 2 * _INSIDE, _BESIDE], dtype=torch.float64)
    shares = torch.cat([near, cuts, 1 - near.flip(0)])
    values = {name: nodes[name]["value"].detach() for name in density.sites}
    names = [name for name in density.sites if values[name].numel() and angles(nodes[name]["fn"]).any()]
    turns, starts = {}, {}
    for name in [*names, *names]:
        period, value = period_of(nodes[name]["fn"]), values[name]
        low, high = (torch.as_tensor(end).to(value) for end in (period.lower_bound, period.upper_bound))
        around = low + (high - low) * shares.to(value).reshape(-1, *(1,) * value.dim())
        around = around.expand(-1, *value.shape).reshape(len(shares), -1)
        log_p = _around(density, values, name, around)
        # A density may be so narrow that it falls between an end and the points beside it, so it is continued.
        ends = 2 * log_p[0] - log_p[1], 2 * log_p[-1] - log_p[-2]
        rounding = 32 * torch.finfo(log_p.dtype).eps * log_p[0].abs()
        is_circle = (ends[0] - ends[1]).abs() <= _TOLERANCE + rounding
        is_circle = is_circle & angles(nodes[name]["fn"]).to(value.device).expand(value.shape).flatten()
        lowest, cut = log_p[3:-3].min(0)
        gains = is_circle & (ends[0] - lowest > _LEAST_GAIN)
        turns[name] = torch.where(gains, cuts.to(value)[cut], 0.0).reshape(value.shape)
        log_p[[0, 1, -2, -1]] -= _LEAST_GAIN
        best = around.gather(0, log_p.argmax(0, keepdim=True)).squeeze(0)
        values[name] = torch.where(is_circle, best, value.flatten()).reshape(value.shape)
        start = nodes[name]["value"].detach()
        from_ends = (turned(nodes[name]["fn"], start, -turns[name]) - low) / (high - low)
        is_near = (turns[name] > 0) & (from_ends.clamp(max=1) - 0.5).abs().gt(0.5 - 1 / _NUM_CUTS)
        starts[name] = torch.where(is_near, values[name], start)
    return turns, starts


def _around(density: LogDensity, values: dict[str, Tensor], name: str, around: Tensor) -> Tensor:
    """The log-density while each entry of an angle takes its values `around`, ``(N, D)``, one entry after the other."""
    value, found = values[name], []
    for entries in torch.arange(value.numel()).split(_ENTRIES_AT_ONCE):
        draws = value.flatten().repeat(len(around), len(entries), 1)
        for k, entry in enumerate(entries):
            draws[:, k, entry] = around[:, entry]
        points = {other: v.expand(draws.shape[:2].numel(), *v.shape) for other, v in values.items()}
        points[name] = draws.reshape(-1, *value.shape)
        found.append(_each(density, points).reshape(len(around), -1))
    return torch.cat(found, 1)


def _each(density: LogDensity, points: dict[str, Tensor]) -> Tensor:
    try:
        return density(points)
    except Exception:  # of a model that cannot be mapped; a warning says so later
        one_by_one = copy(density)
        one_by_one.is_mapped = False
        return one_by_one(points)


def quantiles_around(
    draws: dict[str, Tensor], quantiles: Sequence[float], sites: dict[str, Site], nodes: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Quantiles of draws. An angle that is turned goes from the cut of its circle to the cut, and not from one end of
    its period to the other."""
    turns = {name: site.turn for name, site in sites.items() if site.turn is not None}

    def turn(values: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
        return values | {name: turned(nodes[name]["fn"], values[name], sign * turn) for name, turn in turns.items()}

    return turn(quantiles_of(turn(draws, -1), quantiles), 1)


def with_turns(sites: dict[str, Site], names: list[str], turns: Tensor) -> dict[str, Site]:
    """The sites, of which those with the names are turned; `turns` is one vector for all of them."""
    found = {}
    for name, turn in zip(names, turns.split([sites[name].shape.numel() for name in names])):
        if turn.any():
            found[name] = sites[name]._replace(turn=turn.reshape(sites[name].shape))
    return sites | found
