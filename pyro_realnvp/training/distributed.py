# SPDX-License-Identifier: Apache-2.0
"""The processes that train together, by torch.distributed. In a process of its own all of this does nothing."""

from typing import TypeVar

import torch.distributed
from torch import Tensor

Value = TypeVar("Value")


def are_many() -> bool:
    return count() > 1


def count() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def rank() -> int:
    return torch.distributed.get_rank() if are_many() else 0


def total(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if are_many():
        torch.distributed.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    return total(value).div_(count()) if are_many() else value


def agree(value: Value) -> Value:
    """The value of the first process."""
    values = [value]
    if are_many():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def gather(value: Value) -> list[Value]:
    """The values of all processes, in order."""
    values = [value] * count()
    if are_many():
        torch.distributed.all_gather_object(values, value)
    return values
