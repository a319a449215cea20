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


def total(value: Tensor) -> Tensor:
    """The sum of the value over all processes, which replaces it in place."""
    if are_many():
        torch.distributed.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean of the value over all processes, which replaces it in place."""
    return total(value).div_(count()) if are_many() else value


def agree(value: Value) -> Value:
    """The value that the first process has; the values of the others are ignored."""
    values = [value]
    if are_many():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def share_constants(module: nn.Module) -> None:
    """Gives all processes the masks and permutations that the first has, which DistributedDataParallel leaves out."""
    if are_many():
        state = {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}
        module.load_state_dict(agree(state), strict=False)


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * count()
    if are_many():
        torch.distributed.all_gather_object(values, value)
    return values
