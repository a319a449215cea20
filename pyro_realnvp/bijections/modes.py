# SPDX-License-Identifier: Apache-2.0
"""The modes in which torch runs a call."""

import torch
from torch import Tensor


def is_eager(*tensors: Tensor) -> bool:
    """Whether no compiler traces this call and the tensors hold values, unlike the stand-ins of `torch.func`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return all(not tensor.is_meta and tensor.data_ptr() is not None for tensor in tensors)
    except RuntimeError:  # A stand-in has no memory to point to.
        return False


def is_autocast(x: Tensor) -> bool:
    """Whether networks round their products on the device of x. Not every kind of device has this."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
