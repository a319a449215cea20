# SPDX-License-Identifier: Apache-2.0
"""Functions of one draw, mapped over many."""

import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

Point = Tensor | dict[str, Tensor]
"""One point, or many of them on the leftmost axis of each tensor."""
_T = TypeVar("_T")


def vmap(function: Callable[[Point], _T], points: Point, randomness: str = "error", own_tensors: bool = False) -> _T:
    """:func:`torch.func.vmap`, for functions that use torch's own distributions.

    Args:
        function: a function of one point.
        points: many points.
        randomness: as in :func:`torch.func.vmap`.
        own_tensors: whether each draw gets its own copy of the tensors that the function creates, so that it may write
            into them.
    """

    def of_one(point: Point, zero: Tensor) -> _T:
        with _ForVmap(zero, own_tensors):
            return function(point)

    return torch.func.vmap(of_one, randomness=randomness)(points, torch.zeros(count(points)))


class _ForVmap(TorchFunctionMode):
    """Replaces two kinds of operations in torch's distributions, which vmap refuses, by equal ones.

    ``torch.empty(3).normal_()`` fills a tensor that does not depend on the draw, so vmap could only fill it with the
    same noise in all draws. Adding a zero that belongs to the draw makes the tensor the draw's own. And
    ``x[mask] = 0`` has a shape in between that depends on the values, which ``masked_fill_`` has not.
    """

    def __init__(self, zero: Tensor, own_tensors: bool):
        self.zero, self.own_tensors = zero, own_tensors

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _FILLS:
            target, *rest = args
            if target.is_floating_point() and not torch._C._functorch.is_batchedtensor(target):
                # A caller who reads the target instead of the result must not take its memory for noise.
                target.detach().fill_(torch.nan)
            args = (torch.zeros_like(target) + self.zero.to(target), *rest)
        elif function is Tensor.__setitem__ and _is_mask(args[1]) and not isinstance(args[2], Tensor):
            function, (target, mask, value) = Tensor.masked_fill_, args
            args = (target, mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim())), value)
        result = function(*args, **(kwargs or {}))
        return result + self.zero.to(result) if self.own_tensors and function in _CREATIONS else result


_CREATIONS = {torch.zeros, torch.ones, torch.empty, torch.full, torch.zeros_like, torch.ones_like, torch.empty_like}
_FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.bernoulli_, Tensor.geometric_}


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def map_points(points: Point, change: Callable[[Tensor], Tensor]) -> Point:
    return change(points) if isinstance(points, Tensor) else {name: change(value) for name, value in points.items()}


def count(points: Point) -> int:
    return len(points) if isinstance(points, Tensor) else len(next(iter(points.values()), [0]))


def each(points: Point) -> list[Point]:
    """The points, one by one."""
    if isinstance(points, Tensor):
        return list(points)
    return [map_points(points, lambda value, k=k: value[k]) for k in range(count(points))]


def split(points: Point, size: int) -> list[Point]:
    """The points in pieces."""
    if isinstance(points, Tensor):
        return list(points.split(size))
    starts = range(0, count(points), size)
    return [map_points(points, lambda value, k=k: value[k : k + size]) for k in starts]


def map_over(
    function: Callable[[Point], tuple[dict[str, Tensor], ...]],
    points: Point,
    is_mapped: bool,
    own_tensors: bool = False,
) -> tuple[dict[str, Tensor], ...]:
    """The tensors of a function of one point, which returns dicts of them, at many points."""
    if is_mapped and count(points) > 1:
        return vmap(function, points, "different", own_tensors)
    results = [function(point) for point in each(points)]
    return join([map_each(result, lambda value: value.unsqueeze(0)) for result in results])


def map_each(
    results: tuple[dict[str, Tensor], ...], change: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], ...]:
    return tuple(map_points(result, change) for result in results)


def join(results: list[tuple[dict[str, Tensor], ...]]) -> tuple[dict[str, Tensor], ...]:
    """The results for the pieces of many points, as one."""
    return tuple({name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*results))


def warn_that_it_is_slow(problem: str) -> None:
    warnings.warn(
        f"{problem}, so its draws are evaluated one after the other, which is slow, and fewer are taken by default: "
        "write it with operations of torch, without .item() or branches on values",
        RuntimeWarning,
        stacklevel=5,
    )


def bytes_per_draw(evaluate: Callable[[Point], object], points: Point) -> int:
    """How many bytes a second draw adds to what the backward pass keeps."""
    one, two = (_kept_bytes(evaluate, map_points(points, lambda value, n=n: value[:n])) for n in (1, 2))
    return max(0, two - one)


def _kept_bytes(evaluate: Callable[[Point], object], points: Point) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    points = map_points(points, lambda value: value.detach().clone().requires_grad_(value.is_floating_point()))
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = evaluate(points)  # kept alive, so that no memory is counted twice under one address
    return sum(kept.values()) if result is not None else 0


def reason(error: Exception) -> str:
    """An error in one line, with the line of the user's code at which it was raised."""
    lines = str(error).strip().splitlines()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if "pyro_realnvp/" not in frame.filename]
    where = f" at {own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""
    return f"{type(error).__name__}: {lines[0] if lines else ''}{where}"
