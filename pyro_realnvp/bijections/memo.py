# SPDX-License-Identifier: Apache-2.0
"""The last evaluation of a bijection: remembered weakly, forgotten as soon as anything it read has changed."""

import operator
import weakref
from itertools import chain

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
        self._reads: _Reads | None = None
        self.clear()

    def clear(self) -> None:
        self._input = self._output_ref = self._output_id = self._ladj = self._forward = self._stored = None

    def store(self, bijection: nn.Module, input: Tensor, output: Tensor, ladj: Tensor, *, forward: bool) -> None:
        if not is_eager():
            return
        self.clear()
        if self._reads is None or not self._reads.is_current():
            self._reads = _Reads(bijection)
        marks = self._reads.marks(input, output)
        if marks is None or input is output:
            return
        this = weakref.ref(self)
        self._output_ref = weakref.ref(output, lambda _: (memo := this()) and memo.clear())
        self._input, self._output_id, self._ladj, self._forward = input, id(output), ladj, forward
        self._stored = self._reads, marks

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
        reads, marks = self._stored
        if not reads.is_current():
            self._reads = _Reads(bijection)
            if not self._reads.same(reads):
                return False
        return self._reads.marks(input, output) == marks


def is_eager() -> bool:
    """Whether tensors are plain values here: not in `torch.compile`, not traced, not inside `torch.func`."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _Reads:
    """What an evaluation of a bijection depends on: tensors (None for something opaque), train modes, plain values."""

    def __init__(self, bijection: nn.Module):
        self.tensors: list[Tensor] | None = []
        self.modules: list[nn.Module] = []
        self.values: list = []
        self._watched: list[dict] = []  # where all of it hangs, so that a change is found without another walk
        self._walk(bijection)
        self._seen = self._look()

    def _walk(self, bijection: nn.Module) -> None:
        stack: list = [bijection]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                self.tensors.append(item)
            elif isinstance(item, nn.Module):
                self.modules.append(item)
                for held in (item._parameters, item._buffers, item._modules):
                    self._watched.append(held)
                    stack.extend(held.values())
                if isinstance(item, Transform):  # a user's own may hold tensors and numbers as plain attributes
                    self._watched.append(vars(item))
                    for name, value in vars(item).items():
                        if isinstance(value, (Tensor, Transform, int, float)) and not _is_cache(name):
                            stack.append(value)
            elif isinstance(item, Transform):
                self._watched.append(vars(item))
                stack.extend(value for name, value in vars(item).items() if not _is_cache(name))
            elif isinstance(item, (tuple, list)):
                stack.extend(item)
            elif item is None or isinstance(item, (int, float, str, Constraint)):
                self.values.append(item)
            else:
                self.tensors = None
                return

    def _look(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._watched)))

    def is_current(self) -> bool:
        now = self._look()
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))

    def same(self, other: "_Reads") -> bool:
        mine, others = self.tensors, other.tensors
        if mine is None or others is None or len(mine) != len(others) or self.values != other.values:
            return False
        return all(map(operator.is_, mine, others)) and self.modules == other.modules

    def marks(self, *more: Tensor) -> list | None:
        """What changes when one of them is changed; None where that cannot be seen."""
        if self.tensors is None:
            return None
        marks: list = [torch.is_grad_enabled(), torch.is_autocast_enabled(), _optimizer_steps]
        marks += [module.training for module in self.modules]
        try:
            for t in (*more, *self.tensors):
                marks += (t._version, t.data_ptr(), t.requires_grad)
        except RuntimeError:  # a tensor without a version (inference mode) or without memory (fake, meta)
            return None
        return marks


def _is_cache(name: str) -> bool:
    return name == "_inv" or name.startswith("_cache")


def forget_param_store(module: nn.Module) -> None:
    """Takes off what Pyro's parameter store has hung on the parameters: weak references, which cannot be pickled."""
    for p in module.parameters():
        vars(p).pop("unconstrained", None)
