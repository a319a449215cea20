# SPDX-License-Identifier: Apache-2.0
"""The last evaluation of a bijection: remembered weakly, forgotten as soon as anything it read has changed."""

import weakref

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers, and optimizers that write through `.data`, change parameters without raising `_version`.
register_optimizer_step_post_hook(_count_optimizer_step)


class Memo:
    """One pair (x, y) with log|det dy/dx|, kept for as long as the output of that evaluation lives.

    It answers in two cases: the log-determinant of that pair, and the way back from its output to its input. Going
    the same way twice is evaluated twice. All comparisons are by identity.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._input = self._output_ref = self._output_id = self._ladj = self._read = self._forward = None

    def store(self, bijection: nn.Module, input: Tensor, output: Tensor, ladj: Tensor, *, forward: bool) -> None:
        if not is_eager():
            return
        self.clear()
        read = what_was_read(bijection, input, output)
        if read is None or input is output:
            return
        this = weakref.ref(self)
        self._output_ref = weakref.ref(output, lambda _: (memo := this()) and memo.clear())
        self._input, self._output_id, self._ladj, self._read, self._forward = input, id(output), ladj, read, forward

    def back(self, bijection: nn.Module, output: Tensor, *, forward: bool) -> tuple[Tensor, Tensor] | None:
        """(input, ladj of the way back) where `output` came out of the opposite direction, else None."""
        if is_eager() and self._forward is (not forward) and self._is_fresh(bijection, self._input, output):
            return self._input, -self._ladj
        return None

    def ladj(self, bijection: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """log|det dy/dx| where (x, y) is the remembered pair, else None."""
        if not is_eager() or self._forward is None:
            return None
        if self._forward:
            return self._ladj if self._is_fresh(bijection, x, y) else None
        return -self._ladj if self._is_fresh(bijection, y, x) else None

    def _is_fresh(self, bijection: nn.Module, input: Tensor, output: Tensor) -> bool:
        if self._input is not input or self._output_id != id(output):
            return False
        read = what_was_read(bijection, input, output)
        return read is not None and read[0] == self._read[0]


def is_eager() -> bool:
    """Whether tensors are plain values here: not in `torch.compile`, not traced, not inside `torch.func`."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def what_was_read(bijection: nn.Module, *values: Tensor) -> tuple | None:
    """All that an evaluation of `bijection` at `values` depends on, or None where that cannot be seen.

    The module's tensors come along with their marks: while they are held, no other can get the same identity.
    """
    flags: list = [torch.is_grad_enabled(), torch.is_autocast_enabled(), _optimizer_steps]
    tensors: list[Tensor] = []
    stack: list = [bijection]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, nn.Module):
            flags.append(item.training)
            tensors.extend(t for t in item._parameters.values() if t is not None)
            tensors.extend(t for t in item._buffers.values() if t is not None)
            stack.extend(item._modules.values())
            if isinstance(item, Transform):  # a user's own may hold tensors and numbers as plain attributes
                for name, value in vars(item).items():
                    if isinstance(value, (int, float)):
                        flags.append(value)
                    elif isinstance(value, (Tensor, Transform)) and not _is_cache(name):
                        stack.append(value)
        elif isinstance(item, Transform):
            stack.extend(value for name, value in vars(item).items() if not _is_cache(name))
        elif isinstance(item, (tuple, list)):
            stack.extend(item)
        elif item is None or isinstance(item, (int, float, str, Constraint)):
            flags.append(item)
        else:
            return None
    try:
        return flags + [(id(t), t._version, t.data_ptr(), t.requires_grad) for t in (*values, *tensors)], tensors
    except RuntimeError:  # a tensor without a version (inference mode) or without memory (fake, meta)
        return None


def _is_cache(name: str) -> bool:
    return name == "_inv" or name.startswith("_cache")
