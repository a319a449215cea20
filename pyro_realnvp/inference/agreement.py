# SPDX-License-Identifier: Apache-2.0
"""Checks of a model before anything is computed with it: is its log-density finite, and the same alone and mapped?"""

from collections.abc import Callable
from typing import TypeVar

import torch
from pyro.distributions import Delta
from torch import Tensor

from ..supports import plain
from .density import LogDensity
from .mapping import Point, bytes_per_draw, each, reason, warn_that_it_is_slow
from .sites import unpack

_TOLERANCE = 1e-3
_STEPS = [10.0**-k for k in range(2, 11)]
_ROUNDING = 2e-5  # of single precision, in which models compute even if the latents are in double precision
_MOST_SITES = 50  # whose gradients are checked
_T = TypeVar("_T")


@torch.no_grad()
def check_finite(density: LogDensity) -> None:
    """Raises an error where the log-density is not finite at the values at which the model was looked at."""
    nodes = density.trace.nodes
    if density.one({name: nodes[name]["value"] for name in density.latents}).isfinite():
        return
    density.trace.compute_log_prob()  # Where Pyro validates, data outside of a support are Pyro's own error.
    bad = {
        name: site["log_prob_sum"].item()
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["log_prob_sum"].isfinite()
    }
    deltas = [name for name in bad if name in density.latents and isinstance(plain(nodes[name]["fn"]), Delta)]
    if deltas:
        raise ValueError(
            f"the latent sites {deltas} are drawn from a Delta, of which no guide finds the value: compute it, and use "
            "pyro.deterministic to name it"
        )
    if bad:
        raise ValueError(
            f"the log-density at the start is not finite at the sites {bad}: pass init_loc_fn=, e.g. "
            "pyro.infer.autoguide.init_to_value(values={...}) with values at which it is, or check the data"
        )


def check(density: LogDensity, points: Point) -> None:
    """Evaluates two draws alone and mapped, with two seeds, and decides whether and how many draws are mapped.

    Raises:
        ValueError: the numbers of a draw depend on the other draws, or on random numbers that no guide draws.

    Warns:
        RuntimeWarning: the model cannot be mapped.
    """
    rows = density.rows()
    first, second = (seeded(lambda: torch.stack([density.one(p, rows) for p in each(points)]), k) for k in (0, 1))
    _compare(
        first,
        second,
        "two evaluations of the model at the same latents gave {0} and {1}: it draws random numbers that the guide "
        "does not draw, from torch, from dropout, or at a site hidden by poutine.block. Sum over discrete latents "
        "with pyro.infer.config_enumerate (without hiding them), and make what is random a site",
    )
    if isinstance(points, Tensor):
        _check_gradient(density, points[0], rows)
    try:
        mapped = _try_to_map(density, points, rows)
    except Exception as error:  # whatever a model may raise
        density.is_mapped = False
        warn_that_it_is_slow(f"the model cannot be mapped over draws ({reason(error)})")
        return
    _compare(
        first,
        mapped,
        "the model gives a draw the log-density {0} alone and {1} together with others: its numbers depend on the "
        "batch. Let it compute each draw by itself, without state that changes from call to call",
    )
    density.bytes_per_draw = bytes_per_draw(lambda points: density.mapped(points, rows), points)


def _try_to_map(density: LogDensity, points: Point, rows: dict[str, Tensor]) -> Tensor:
    """The log-density of mapped draws. Finds out whether the model writes into tensors that it creates."""
    try:
        return seeded(lambda: density.mapped(points, rows), 0)
    except Exception as error:  # whatever a model may raise
        density.own_tensors = True
        try:
            return seeded(lambda: density.mapped(points, rows), 0)
        except Exception:
            density.own_tensors = False
            raise error from None


def _check_gradient(density: LogDensity, point: Tensor, rows: dict[str, Tensor]) -> None:
    """Raises an error if the gradient is not that of the values, since the model detaches a latent.

    A long step may be too long for a steep log-density, and a short one is lost in rounding. So the gradient is right
    if a step between says so, and wrong if all of them do, and if the change is that of a slope or of a jump.
    """
    if point.dtype != torch.float64:
        return
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        log_p = density.one(point, rows)
    gradient = torch.zeros_like(point)
    if log_p.requires_grad:
        (gradient,) = torch.autograd.grad(log_p, point, materialize_grads=True)
    point, rounding = point.detach(), _ROUNDING * (1 + log_p.detach().abs())

    @torch.no_grad()
    def is_wrong(direction: Tensor) -> bool:
        changes: list[float] = []
        for step in (size * direction for size in _STEPS):
            change = density.one(point + step, rows) - density.one(point - step, rows)
            slope = 2 * (gradient * step).sum()
            larger, difference = torch.maximum(change.abs(), slope.abs()), (change - slope).abs()
            if not change.isfinite() or (difference <= 0.2 * larger and larger >= 3 * rounding):
                return False
            if difference <= 0.2 * larger + rounding:
                break  # rounding alone may explain that they agree, or that they do not
            changes.append(float(change))
        if len(changes) < 2:
            return False
        falls_by = abs(changes[-2]) / max(abs(changes[-1]), float(rounding))
        return 0.5 < falls_by < 2 or 5 < falls_by < 20

    for name, entries in list(unpack(torch.arange(len(point)), density.sites).items())[:_MOST_SITES]:
        direction = torch.zeros_like(point)
        direction[entries] = torch.randn_like(direction[entries])
        if is_wrong(direction):
            raise ValueError(
                f"the log-density changes with the latent {name!r} in another way than its gradient says: the model "
                "detaches the latent, by torch.tensor(...), .item(), .detach() or numpy, or its density jumps, as by "
                "torch.where(t < latent, a, b). Use torch.stack and other operations of torch; in place of a jump, use "
                "torch.sigmoid((latent - t) / width), or a discrete latent that config_enumerate sums over"
            )


@torch.no_grad()
def seeded(evaluate: Callable[[], _T], seed: int = 0) -> _T:
    """The result with the same random numbers at each call, so that two results can be compared."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return evaluate()


def _compare(a: Tensor, b: Tensor, message: str) -> None:
    same = torch.isclose(a.double(), b.double(), rtol=_TOLERANCE / 10, atol=_TOLERANCE, equal_nan=True)
    if not same.all():
        k = int((~same).nonzero()[0])
        raise ValueError(message.format(f"{a[k].item():.6g}", f"{b[k].item():.6g}"))
