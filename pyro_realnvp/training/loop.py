# SPDX-License-Identifier: Apache-2.0
"""The loop of training: Adam, averaged weights, the best of them kept, bad steps survived, stopped and resumed."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from . import distributed
from .checkpoint import Checkpoint
from .history import Callback, History
from .options import LoopOptions
from .snapshots import Average, State

_SKIPS_BEFORE_RESTORE = 10
_MAX_RESTORES = 3


class Training:
    """Minimizes a loss, and leaves the best of the averaged weights behind."""

    def __init__(self, modules: Sequence[nn.Module], parameters: list[Tensor], options: LoopOptions):
        self.modules, self.parameters, self.options = modules, parameters, options
        self.optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=options.weight_decay, fused=True)
        total_steps = options.num_steps + 1
        self.schedule = OneCycleLR(
            self.optimizer,
            options.lr,
            total_steps=total_steps,
            # A rise of one step or less is none: OneCycleLR would divide by its length minus one.
            pct_start=options.warmup if options.warmup * total_steps > 1 else 0.0,
            cycle_momentum=False,
        )
        self.average = Average(parameters, max(options.averaging * options.num_steps, 1))
        self.best = State(modules, parameters)
        self.history = History()
        self.skips_in_a_row = 0
        self.is_done = False

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.history.loss)

    def run(
        self,
        loss: Callable[[], Tensor],
        validation: Callable[[], float] | None,
        *,
        progress: bool,
        remedy: str,
        validate_start: bool = False,
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpoint | None = None,
    ) -> History:
        """Takes the steps that are left.

        Args:
            loss: a new draw at each call.
            validation: the loss of the weights that are there; by default the mean of the recent losses.
            remedy: where steps were skipped.
            validate_start: training must not end below what is there already.
        """
        history, options = self.history, self.options
        started = time.perf_counter() - history.seconds
        asked = any(distributed.gather(bool(callbacks)))
        were_training = [module.training for module in self.modules]
        _train(self.modules, True)
        hidden = not progress or distributed.rank() > 0
        bar = tqdm(total=options.num_steps, initial=self.step, unit="step", disable=hidden)
        try:
            if self.step == 0 and validate_start:
                self._validate(validation)
            if self.step == 0 and checkpoint:
                checkpoint.write()  # so that a path that cannot be written is found out at once
            while not self.is_done:
                self._take_step(loss)
                history.seconds = time.perf_counter() - started
                if self.step % options.validate_every == 0:
                    self._validate(validation)
                    without_gain = self.step - history.best_step
                    if validation and options.patience is not None and without_gain >= options.patience:
                        self._stop("early")
                if asked and any(distributed.gather(any([_is_true(call(history)) for call in callbacks]))):
                    self._stop("callback")
                if self.is_done:
                    self._validate(validation)
                if self.step % 10 == 0 or self.is_done:
                    mean, _ = _summary(history.loss[-50:])
                    bar.set_postfix(loss=f"{mean:.3f}", best=f"{history.best_loss:.3f}", refresh=False)
                    bar.update(self.step - bar.n)
                if checkpoint and (self.step % checkpoint.every == 0 or self.is_done):
                    checkpoint.write()
        except KeyboardInterrupt:
            if distributed.are_many():  # the others do not know of it
                raise
            history.stopped = "interrupted"
        finally:
            try:
                if self.step and not distributed.are_many():
                    self._validate(validation)  # what was interrupted
            finally:
                self.best.restore()
                for module, was_training in zip(self.modules, were_training):
                    module.train(was_training)
                bar.close()
                history.seconds = time.perf_counter() - started
        if history.skipped_steps and distributed.rank() == 0:
            warnings.warn(
                f"{history.skipped_steps} of {self.step} steps had a loss or gradient that is not finite and were "
                f"skipped; the best weights were restored {history.restores} times: {remedy}",
                RuntimeWarning,
                stacklevel=3,
            )
        return history

    def _take_step(self, loss: Callable[[], Tensor]) -> None:
        history = self.history
        step_loss = loss()
        self.optimizer.zero_grad()
        step_loss.backward()
        total_norm = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]).norm()
        value, norm = distributed.mean(torch.stack([step_loss.detach(), total_norm])).tolist()
        if math.isfinite(value + norm):
            if norm > self.options.max_grad_norm:
                clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, total_norm)
            self.optimizer.step()
            self.skips_in_a_row = 0
        else:
            value = math.nan
            history.skipped_steps += 1
            self.skips_in_a_row += 1
        self.schedule.step()
        history.loss.append(value)
        if self.step - history.skipped_steps == 1:  # the first, which initialises layers
            self.average.restart()
        elif self.step % self.average.every == 0:
            self.average.update()
        self.is_done = self.step == self.options.num_steps
        if self.skips_in_a_row == _SKIPS_BEFORE_RESTORE:
            self._go_back()

    def _go_back(self) -> None:
        """Restores the best weights, to go on with half the learning rate."""
        if self.history.restores == _MAX_RESTORES:
            return self._stop("diverged")
        self.history.restores += 1
        self.skips_in_a_row = 0
        self.best.restore()
        self.average.restart()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group.update({key: group[key] / 2 for key in ("initial_lr", "max_lr", "min_lr")})

    def _validate(self, validation: Callable[[], float] | None) -> None:
        history = self.history
        if history.validation_steps[-1:] == [self.step]:
            return
        recent, error = _summary(history.loss[-self.options.validate_every :])
        with self.average.in_place():
            value = recent
            if validation is not None:
                _train(self.modules, False)
                value = validation()
                _train(self.modules, True)
            history.validation_steps.append(self.step)
            history.validation_loss.append(value)
            tolerance = self.options.tolerance if validation else error  # later weights must not lose by noise alone
            if (math.isfinite(recent) or self.step == 0) and value < history.best_loss + tolerance:
                history.best_loss, history.best_step = min(value, history.best_loss), self.step
                self.best.save()

    def _stop(self, reason: str) -> None:
        if not self.is_done:
            self.is_done, self.history.stopped = True, reason

    def state_dict(self) -> dict:
        return {
            "best": self.best.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": asdict(self.history),
            "skips_in_a_row": self.skips_in_a_row,
            "is_done": self.is_done,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best.load_state_dict(state["best"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = History(**state["history"])
        self.skips_in_a_row, self.is_done = state["skips_in_a_row"], state["is_done"]


def _summary(losses: list[float]) -> tuple[float, float]:
    """The mean of those that are finite, or nan, and its standard error."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
    return float(np.mean(finite)), float(np.std(finite)) / math.sqrt(len(finite))


def _is_true(answer: object) -> bool:
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _train(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        module.train(mode)
