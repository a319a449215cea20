# SPDX-License-Identifier: Apache-2.0
"""The memory of a bijection: its last evaluation, which it forgets as soon as anything that it read has changed."""

import operator
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import ExpTransform, Transform
from torch.distributions.constraints import Constraint
from torch.optim.optimizer import register_optimizer_step_post_hook

from .constants import Constants
from .modes import is_autocast, is_eager

_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers, and optimizers that write through `.data`, change parameters without a change of `_version`.
register_optimizer_step_post_hook(_count_optimizer_step)


class _Evaluation(NamedTuple):
    """One evaluation: the pair (input, output), log|det d output / d input|, and the state that it depended on."""

    input: Tensor
    output: weakref.ref
    ladj: Tensor
    forward: bool
    reads: "_Reads"
    marks: list
    copy: weakref.ref | None = None
    """The copy of the input with which the memory has last answered,"""
    marks_of_copy: list | None = None
    """and the state then."""


class Memo:
    """The last evaluation of a bijection, kept for as long as its output lives.

    The memory answers two questions: the log-determinant of the remembered pair, and the way back from the output to
    the input. A second evaluation in the same direction is computed again. Tensors are compared by identity.

    The evaluation is one object that is replaced as a whole. So a thread reads either one whole evaluation or none,
    and never a mixture of its own and another thread's.
    """

    def __init__(self):
        self._reads: _Reads | None = None
        self.clear()

    def clear(self) -> None:
        self._last: _Evaluation | None = None

    def store(self, bijection: nn.Module, input: Tensor, output: Tensor, ladj: Tensor, *, forward: bool) -> Tensor:
        """Remembers an evaluation and returns the output for the caller, which may be a view of the one passed in."""
        if not is_eager():
            return output
        self.clear()
        reads = self._reads
        if reads is None or not reads.is_current():
            reads = self._reads = _Reads(bijection)
        if input is output:
            return output
        if ladj.requires_grad:
            # The graph of the remembered log-determinant may hold the output, which then would live as long as the
            # memory. The caller gets a view instead, which shares the values and which no graph holds.
            output = output.view_as(output)
        marks = reads.marks(input, output, ladj)
        if marks is None:
            return output
        this = weakref.ref(self)
        # The callback runs when the output dies, and by then another evaluation may have replaced this one.
        output_ref = weakref.ref(output, lambda ref: (memo := this()) and memo._forget(ref))
        self._last = _Evaluation(input, output_ref, ladj, forward, reads, marks)
        return output

    def _forget(self, output_ref: weakref.ref) -> None:
        last = self._last
        if last is not None and last.output is output_ref:
            self.clear()

    def back(self, bijection: nn.Module, output: Tensor, *, forward: bool) -> tuple[Tensor, Tensor] | None:
        """Returns (input, ladj of the way back) if `output` is the last output of the opposite direction, else None."""
        last = self._last
        if last is None or last.forward is forward or not self._is_fresh(last, bijection, last.input, output):
            return None
        # The caller may write into what he gets, which must not change the tensor that he once passed.
        copy = last.input.clone()
        marks = last.reads.marks(copy, output, last.ladj)
        if marks is not None:
            self._last = last._replace(copy=weakref.ref(copy), marks_of_copy=marks)
        return copy, -last.ladj

    def ladj(self, bijection: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """Returns log|det dy/dx| if (x, y) is the remembered pair, else None."""
        last = self._last
        if last is None or not self._is_fresh(last, bijection, *((x, y) if last.forward else (y, x))):
            return None
        return last.ladj if last.forward else -last.ladj

    def _is_fresh(self, last: _Evaluation, bijection: nn.Module, input: Tensor, output: Tensor) -> bool:
        is_copy = last.copy is not None and last.copy() is input
        if not is_eager() or not (last.input is input or is_copy) or last.output() is not output:
            return False
        reads = last.reads
        if not reads.is_current():
            # Something was replaced, and only a second walk tells whether the evaluation would read the same tensors.
            reads = self._reads = _Reads(bijection)
            if not reads.same(last.reads):
                return False
        return reads.marks(input, output, last.ladj) == (last.marks_of_copy if is_copy else last.marks)


class _Reads:
    """The state that an evaluation of a bijection depends on: tensors, modules with a train mode, and plain values.

    `tensors` is None if the walk meets an object that it cannot see into, and then nothing is remembered. The walk is
    slow, so its result is kept: `is_current` compares the watched containers with what they held during the walk.
    """

    def __init__(self, bijection: nn.Module):
        self.tensors: list[Tensor] | None = []
        self.modules: list[nn.Module] = []
        self.values: list = []
        """Plain values, and what says how everything is held: names, lengths, and what was met before."""
        self._containers: list = []  # what holds all of this state: dictionaries, lists and sets
        self._contents: list = []  # views of the values of those that are dictionaries
        self._options: list[tuple[dict, str]] = []  # single entries of others: the plain attributes of layers
        self._sized: list[dict] = []  # those others, to which an entry may be added
        self._walk(bijection)
        self._seen = self._look()

    def _walk(self, bijection: nn.Module) -> None:
        stack: list = [bijection]
        met: dict[int, int] = {}
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                self.tensors.append(item)
                self.values.append(Tensor)
            elif item is None or isinstance(item, _CONSTANTS):
                self.values.append(item)
            elif id(item) in met:
                self.values.append((id, met[id(item)]))
            else:
                met[id(item)] = len(met)
                parts = self._parts(item)
                if parts is None or not all(isinstance(name, _CONSTANTS) for name in parts):
                    self.tensors = None
                    return
                self.values.append((type(item), *parts))
                stack.extend(parts.values())

    def _watch(self, container: dict | list | set) -> None:
        self._containers.append(container)
        if isinstance(container, dict):
            self._contents.append(container.values())

    def _parts(self, item: object) -> dict | None:
        """What an object holds, by names that tell it from an object that holds the same otherwise. None if unknown."""
        if isinstance(item, nn.Module):
            return self._parts_of_module(item)
        if isinstance(item, Transform):
            self._watch(vars(item))
            return own_attributes(item)
        if isinstance(item, (MethodType, FunctionType, BuiltinFunctionType)):
            return self._parts_of_function(item)
        if isinstance(item, partial):
            return {"func": item.func, "args": item.args, "keywords": item.keywords}
        if isinstance(item, weakref.ref):
            return {"of": item()}
        if getattr(item, "__dict__", None):  # a container with attributes of its own
            return None
        if isinstance(item, (dict, list, set)):
            self._watch(item)
        if isinstance(item, dict):
            return item
        return dict(enumerate(item)) if isinstance(item, (list, set, tuple, frozenset)) else None

    def _parts_of_module(self, item: nn.Module) -> dict | None:
        own = vars(item)
        # Pyro draws these attributes, each time that they are read; and those in slots are in no dictionary.
        if own.get("_pyro_samples") or any(vars(cls).get("__slots__") for cls in type(item).__mro__):
            return None
        self.modules.append(item)
        parts: dict = {}
        for held in (item._parameters, item._buffers, item._modules):
            self._watch(held)
            parts |= held
        for hooks in (item._forward_hooks, item._forward_pre_hooks):
            self._watch(hooks)
            self.values.append(tuple(hooks.values()))
        # A user's class, too, may hold tensors, numbers and containers as plain attributes.
        if isinstance(item, (Transform, Constants)):
            self._watch(own)
            own = own_attributes(item)
            names = [name for name in own if name not in _OF_MODULES and name != "_memo"]
        else:
            names = [name for name in own if name not in _OF_MODULES]
            self._options += [(own, name) for name in names]
            self._sized.append(own)
        return parts | {name: own[name] for name in names}

    def _parts_of_function(self, item: Callable) -> dict | None:
        """A function is code, and a method of a class is, too. What it holds beside it may change."""
        if isinstance(item, MethodType):
            return {"func": item.__func__, "self": item.__self__}
        self.values.append(item)
        if isinstance(item, BuiltinFunctionType):
            owner = item.__self__
            return {} if owner is None or isinstance(owner, (ModuleType, type)) else {"self": owner}
        if item.__closure__ or vars(item):
            return None
        return {"defaults": item.__defaults__, "keywords": item.__kwdefaults__}

    def _look(self) -> list:
        """What is held, by which names, and how many in each: an entry may be moved from one container to another."""
        held = chain(chain.from_iterable(self._contents), chain.from_iterable(self._containers))
        options = (own.get(name) for own, name in self._options)
        return [*held, *options, *map(len, self._containers), *map(len, self._sized)]

    def is_current(self) -> bool:
        now = self._look()
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))

    def same(self, other: "_Reads") -> bool:
        mine, others = self.tensors, other.tensors
        if mine is None or others is None or len(mine) != len(others) or self.values != other.values:
            return False
        return all(map(operator.is_, mine, others)) and self.modules == other.modules

    def marks(self, *more: Tensor) -> list | None:
        """Returns values that differ after any change of the state or of the tensors `more`.

        Returns None if a change could go unnoticed, so that the evaluation must not be remembered.
        """
        if self.tensors is None:
            return None
        x = more[0]
        marks: list = [torch.is_grad_enabled(), _optimizer_steps]
        marks.append(is_autocast(x) and torch.get_autocast_dtype(x.device.type))
        marks += [module.training for module in self.modules]
        try:
            for t in (*more, *self.tensors):
                marks += (t._version, t.data_ptr(), t.requires_grad)
        # Tensors of the inference mode have no version, and those of torch.func (or fake ones) have no memory.
        except RuntimeError:
            return None
        return marks


_OF_MODULES = frozenset(vars(nn.Module())) | {"_pyro_context"}
_CONSTANTS = (int, float, complex, str, bytes, slice, type, torch.dtype, torch.device, Constraint)
InverseTransform = type(ExpTransform().inv)


def own_attributes(transform: object) -> dict[str, Any]:
    """The attributes of a transform, or of a map that is none, without caches.

    The `_inv` of torch's inverse is the transform that it inverts; that of any other transform is only its inverse.
    """
    is_inverse = isinstance(transform, InverseTransform)
    own = {name: value for name, value in vars(transform).items() if is_inverse or name != "_inv"}
    return {name: value for name, value in own.items() if not name.startswith("_cache")}


def forget_param_store(parameters: Iterable[Tensor]) -> None:
    """Removes the weak references that Pyro's parameter store attaches to parameters, and which cannot be pickled."""
    for p in parameters:
        vars(p).pop("unconstrained", None)
