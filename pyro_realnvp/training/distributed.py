# SPDX-License-Identifier: Apache-2.0
"""What the processes that train together tell each other (torch.distributed). A single process communicates nothing."""

from typing import TypeVar

import torch.distributed
from torch import Tensor, nn

Value = TypeVar("Value")


def are_many() -> bool:
    """Whether more than one process trains."""
    return count() > 1


def count() -> int:
    """The number of processes, 1 where :mod:`torch.distributed` is not initialized."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def rank() -> int:
    """The number of this process; the first is 0."""
    return torch.distributed.get_rank() if are_many() else 0


def mean(value: Tensor) -> Tensor:
    """The mean of the value over all processes, which replaces it in place."""
    if are_many():
        torch.distributed.all_reduce(value)
        value.div_(count())
    return value


def agree(value: Value) -> Value:
    """The value that the first process has; the values of the others are ignored."""
    values = [value]
    if are_many():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def share_state(module: nn.Module) -> None:
    """Gives all processes the whole state that the module has in the first: weights, buffers, masks, permutations."""
    if not are_many():
        return
    state = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in module.state_dict().items()}
    shapes = gather({k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)})
    others = [rank for rank, theirs in enumerate(shapes) if theirs != shapes[0]]
    if others:
        raise ValueError(
            f"expected the same flow in all processes; the one of process {others[0]} has other layers than that of "
            "process 0: build it, and load it, in each of them alike"
        )
    module.load_state_dict(agree(state))


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * count()
    if are_many():
        torch.distributed.all_gather_object(values, value)
    return values
