# SPDX-License-Identifier: Apache-2.0
"""The loop of training: Adam, averaged weights, the best of them kept, bad steps survived."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

_SKIPS_BEFORE_RESTORE = 10
_MAX_RESTORES = 3


@dataclass
class History:
    """What happened in :func:`fit` and :func:`fit_guide`. Losses are in nats: mean negative log-likelihoods of a flow,
    negative ELBOs of a guide."""

    loss: list[float] = field(default_factory=list)
    """Of each step; nan where the step was skipped."""
    validation_steps: list[int] = field(default_factory=list)
    """The steps after which the averaged weights were validated."""
    validation_loss: list[float] = field(default_factory=list)
    """Their loss at each of these steps."""
    best_step: int = 0
    """The step whose weights are there now."""
    best_loss: float = math.inf
    """Their loss: on the held-out rows, of a guide over many particles, or the mean since the validation before."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed no weight."""
    restores: int = 0
    """How often the best weights were restored after repeated skips, with half the learning rate."""
    stopped: str = "finished"
    """``"finished"``, ``"early"`` (the validation loss stopped falling), ``"interrupted"`` (Ctrl-C), ``"diverged"``."""
    seconds: float = 0.0
    """Wall-clock time."""


def optimize(
    modules: Sequence[nn.Module],
    parameters: list[Tensor],
    loss: Callable[[], Tensor],
    *,
    validation: Callable[[], float] | None,
    num_steps: int,
    lr: float,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    averaging: float,
    validate_every: int,
    patience: int | None,
    progress: bool,
    remedy: str,
    validate_start: bool = False,
    tolerance: float = 0.0,
) -> History:
    """Minimises `loss`, a new draw at each call, over the parameters, and leaves the best of their averages behind.

    The state of the modules and the parameters is what is saved as the best. Without a validation, the mean of the
    recent losses says which is the best. With `validate_start` training must not end below what is there already.
    Later weights are preferred to earlier ones whose loss is better by less than `tolerance`.
    """
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
    schedule = OneCycleLR(optimizer, lr, total_steps=num_steps + 1, pct_start=warmup, cycle_momentum=False)
    average = _Average(parameters, decay=1 - 1 / max(averaging * num_steps, 1))
    best = _State(modules, parameters)
    history = History()
    skips_in_a_row = step = 0

    def validate() -> None:
        recent = _mean(history.loss[-validate_every:])
        with average.in_place():
            value = recent
            if validation is not None:
                _train(modules, False)
                value = validation()
                _train(modules, True)
            history.validation_steps.append(step)
            history.validation_loss.append(value)
            if (math.isfinite(recent) or step == 0) and value < history.best_loss + tolerance:
                history.best_loss, history.best_step = min(value, history.best_loss), step
                best.save()

    were_training = [module.training for module in modules]
    _train(modules, True)
    bar = tqdm(total=num_steps, disable=not progress, unit="step")
    try:
        if validate_start:
            validate()
        for step in range(1, num_steps + 1):
            step_loss = loss()
            optimizer.zero_grad()
            step_loss.backward()
            total_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            value, norm = torch.stack([step_loss.detach(), total_norm]).tolist()
            if math.isfinite(value + norm):
                if norm > max_grad_norm:
                    clip_grads_with_norm_(parameters, max_grad_norm, total_norm)
                optimizer.step()
                first = step - history.skipped_steps == 1
                average.restart() if first else average.update()  # the first pass initialises ActNorm
                skips_in_a_row = 0
            else:
                value = math.nan
                history.skipped_steps += 1
                skips_in_a_row += 1
            schedule.step()
            history.loss.append(value)
            if skips_in_a_row == _SKIPS_BEFORE_RESTORE:
                if history.restores == _MAX_RESTORES:
                    history.stopped = "diverged"
                    break
                history.restores += 1
                skips_in_a_row = 0
                best.restore()
                average.restart()
                optimizer.state.clear()
                for group in optimizer.param_groups:
                    group.update({key: group[key] / 2 for key in ("initial_lr", "max_lr", "min_lr")})
            if step % validate_every == 0:
                validate()
                if validation is not None and patience is not None and step - history.best_step >= patience:
                    history.stopped = "early"
                    break
            if step % 10 == 0 or step == num_steps:
                bar.set_postfix(loss=f"{_mean(history.loss[-50:]):.3f}", best=f"{history.best_loss:.3f}", refresh=False)
                bar.update(step - bar.n)
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    finally:
        try:
            if history.loss and step not in history.validation_steps:
                validate()
        finally:
            best.restore()
            for module, was_training in zip(modules, were_training):
                module.train(was_training)
            bar.close()
            history.seconds = time.perf_counter() - started
    if history.skipped_steps:
        warnings.warn(
            f"{history.skipped_steps} of {len(history.loss)} steps had a loss or gradient that is not finite and were "
            f"skipped; the best weights were restored {history.restores} times: {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
    return history


def _mean(losses: list[float]) -> float:
    """The mean of those that are finite, or nan."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _train(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        module.train(mode)


class _State:
    """A copy of the state of modules and of parameters that may belong to none."""

    def __init__(self, modules: Sequence[nn.Module], parameters: list[Tensor]):
        owned = {id(p) for module in modules for p in module.parameters()}
        self.modules, self.parameters = modules, [p for p in parameters if id(p) not in owned]
        self.save()

    def save(self) -> None:
        self.states = [copy.deepcopy(module.state_dict()) for module in self.modules]
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for module, state in zip(self.modules, self.states):
            module.load_state_dict(state)
        for p, value in zip(self.parameters, self.values):
            p.copy_(value)


class _Average:
    """An exponential moving average of parameters."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters = parameters
        self._move = get_ema_multi_avg_fn(decay)
        self.restart()

    def restart(self) -> None:
        self.values = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        self._move(self.values, self.parameters, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the parameters for a while."""
        current = [p.detach().clone() for p in self.parameters]
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(current)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values):
            p.copy_(value)
