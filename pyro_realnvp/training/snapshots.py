# SPDX-License-Identifier: Apache-2.0
"""Copies of weights: the best ones so far, and their moving average."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class State:
    """A copy of the state of some modules, and of the parameters that belong to none of them (as in a param store)."""

    def __init__(self, modules: Sequence[nn.Module], parameters: list[Tensor]):
        owned = {id(p) for module in modules for p in module.parameters()}
        self.modules = modules
        self.parameters: list[Tensor] = [p for p in parameters if id(p) not in owned]
        self.save()

    def save(self) -> None:
        """Copies the current state."""
        self.states: list[dict[str, Any]] = [module.state_dict() for module in self.modules]
        for state in self.states:
            for name, value in state.items():
                state[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        self.values: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copy back into the modules and parameters."""
        for module, state in zip(self.modules, self.states):
            module.load_state_dict(state)
        for p, value in zip(self.parameters, self.values):
            p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states, self.values = state["states"], state["values"]


class Modes:
    """The mode of each part of some modules, train or eval."""

    def __init__(self, *modules: nn.Module):
        self.whole: list[tuple[nn.Module, bool]] = [(module, module.training) for module in modules]
        self.parts: list[tuple[nn.Module, bool]] = [(part, part.training) for one in modules for part in one.modules()]

    def restore(self) -> None:
        """Gives each part its mode back, and parts that are new that of their module."""
        for module, mode in self.whole:
            module.train(mode)
        for part, mode in self.parts:
            part.training = mode


class Average:
    """An exponential moving average of parameters, with a time constant in steps."""

    def __init__(self, parameters: list[Tensor], time_constant: float):
        # An update reads every weight, so it is made only every few steps, which hardly changes the average.
        self.every: int = int(min(25, max(1, time_constant / 4)))
        self.parameters: nn.ParameterList = nn.ParameterList(parameters)
        decay = 1 - self.every / time_constant
        self.model: AveragedModel = AveragedModel(self.parameters, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def restart(self) -> None:
        """Sets the average to the current parameters."""
        self.model.n_averaged.zero_()
        self.update()

    def update(self) -> None:
        """Moves the average towards the current parameters."""
        self.model.update_parameters(self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the parameters within a ``with`` block, and their own values back after it."""
        current = [p.detach().clone() for p in self.parameters]
        self._copy(list(self.model.parameters()))
        try:
            yield
        finally:
            self._copy(current)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values):
            p.copy_(value)
