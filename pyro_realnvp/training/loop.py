# SPDX-License-Identifier: Apache-2.0
"""The training loop: Adam with averaged weights. It keeps the best weights, skips bad steps, and can be resumed."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from . import distributed
from .checkpoint import Checkpoint
from .history import Callback, History
from .options import LoopOptions
from .progress import Progress
from .snapshots import Average, Modes, State

_SKIPS_BEFORE_RESTORE = 10
_MAX_RESTORES = 3


class Training:
    """Minimizes a loss, and leaves the modules with the best of the averaged weights.

    Args:
        modules: the modules to train.
        parameters: the parameters to train, in these modules or outside of them.
        options: the options of the loop.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: list[Tensor], options: LoopOptions):
        self.modules = modules
        self.parameters = parameters
        self.options = options
        self.optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=options.weight_decay, fused=True)
        total_steps = options.num_steps + 1  # the schedule moves on after the last step, too
        self.schedule: OneCycleLR = OneCycleLR(
            self.optimizer,
            options.lr,
            total_steps=total_steps,
            # OneCycleLR divides by the length of the rise minus one, so a rise of one step or less is left out.
            pct_start=options.warmup if options.warmup * total_steps > 1 else 0.0,
            cycle_momentum=False,
        )
        self.average: Average = Average(parameters, max(options.averaging * options.num_steps, 1))
        self.best: State = State(modules, parameters)
        self.history: History = History()
        self.skips_in_a_row: int = 0
        self.is_done: bool = False
        self.stay: list[nn.Module] = _parts_that_stay(modules)

    @property
    def step(self) -> int:
        """The number of steps so far, including the skipped ones."""
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
        """Takes the remaining steps: all of them, or those after a checkpoint.

        However the loop ends, the modules leave it with the best weights seen and in the mode (train or eval) in which
        they came. Ctrl-C ends it like any other stop, but an error in the loss, in a callback or in a validation is
        raised. In many processes Ctrl-C is raised, too, since the other processes do not receive it.

        Args:
            loss: returns the loss of a new batch or draw at each call.
            validation: returns the loss of the weights that the modules have at the call; ``None`` to validate by the
                mean of the recent training losses.
            progress: whether to show a progress bar.
            remedy: the advice that ends the warning about skipped steps.
            validate_start: whether to validate the weights before the first step, too, so that the training cannot
                end with worse ones.
            callbacks: functions of the history, called after each step; one that returns True stops the training.
            checkpoint: the file to write, connected to this training.
        """
        history, options = self.history, self.options
        started = time.perf_counter() - history.seconds
        # The answers of the callbacks are gathered at each step, which every process must join if one has a callback.
        asked = any(distributed.gather(bool(callbacks)))
        modes = Modes(*self.modules)
        self._train(True)
        bar = Progress(options.num_steps, initial=self.step, show=progress and distributed.rank() == 0)
        try:
            if self.step == 0 and validate_start:
                self._validate(validation)
            if self.step == 0 and checkpoint:
                checkpoint.write()  # fails now, not hours later, if the path cannot be written
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
                    bar.update(self.step, {"loss": f"{mean:.3f}", "best": f"{history.best_loss:.3f}"})
                if checkpoint and (self.step % checkpoint.every == 0 or self.is_done):
                    checkpoint.write()
        except KeyboardInterrupt:
            # The other processes go on and wait for this one, so only an error makes their launcher end them. A
            # process that trains alone returns normally. No checkpoint is written here: the last one was written
            # between two steps, so a resumed run repeats the uninterrupted one bit for bit.
            if distributed.are_many():
                raise
            history.stopped = "interrupted"
        finally:
            # After Ctrl-C or an error, the steps since the last validation may have found better weights, so the
            # current ones are validated first; after a regular end they have been, and nothing happens. In many
            # processes this is left out, since a validation waits for all processes, and not all may come here.
            try:
                if self.step and not distributed.are_many():
                    self._validate(validation)
            finally:
                # This inner block runs even if that validation fails or is itself interrupted.
                self.best.restore()
                modes.restore()
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
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            remedy = "Pyro's store may hold other tensors under their names: call pyro.clear_param_store()"
            raise RuntimeError(f"the loss depends on none of the {len(self.parameters)} parameters: {remedy}")
        total_norm = torch.cat([grad.flatten() for grad in grads]).norm()
        # The mean is finite only if it is so in all processes, so all of them skip the same steps.
        value, norm = distributed.mean(torch.stack([step_loss.detach(), total_norm])).tolist()
        if math.isfinite(value + norm):
            if norm > self.options.max_grad_norm:
                torch._foreach_mul_(grads, self.options.max_grad_norm / norm)
            self.optimizer.step()
            self.skips_in_a_row = 0
        else:
            value = math.nan
            # Without gradients the optimizer changes nothing. Torch warns if the first step of a schedule comes before
            # that of its optimizer.
            self.optimizer.zero_grad()
            self.optimizer.step()
            history.skipped_steps += 1
            self.skips_in_a_row += 1
        self.schedule.step()
        history.loss.append(value)
        if self.step - history.skipped_steps == 1:
            # The first step that counts may initialize layers from data, so the average starts after it.
            self.average.restart()
        elif self.step % self.average.every == 0:
            self.average.update()
        self.is_done = self.step == self.options.num_steps
        if self.skips_in_a_row == _SKIPS_BEFORE_RESTORE:
            self._go_back()

    def _go_back(self) -> None:
        """Restores the best weights and halves the learning rate, or stops if that has not helped before."""
        if self.history.restores == _MAX_RESTORES:
            return self._stop("diverged")
        self.history.restores += 1
        self.skips_in_a_row = 0
        self.best.restore()
        self.average.restart()
        self.optimizer.state.clear()  # Adam's moments belong to the weights that were given up
        # OneCycleLR reads these three entries at each step, so they halve the rest of the schedule.
        for group in self.optimizer.param_groups:
            group.update({key: group[key] / 2 for key in ("initial_lr", "max_lr", "min_lr")})

    def _validate(self, validation: Callable[[], float] | None) -> None:
        """Validates the averaged weights, once per step, and saves them if they are the best so far."""
        history = self.history
        if history.validation_steps[-1:] == [self.step]:
            return
        recent, error = _summary(history.loss[-self.options.validate_every :])
        with self.average.in_place():
            value = recent
            if validation is not None:
                self._train(False)
                value = validation()
                self._train(True)
            history.validation_steps.append(self.step)
            history.validation_loss.append(value)
            # Later weights must not lose by noise alone. They do lose if every recent training loss was not finite.
            tolerance = self.options.tolerance if validation else error
            if (math.isfinite(recent) or self.step == 0) and value < history.best_loss + tolerance:
                history.best_loss, history.best_step = min(value, history.best_loss), self.step
                self.best.save()  # the average is in place, and so it is what is saved

    def _train(self, mode: bool) -> None:
        """Puts all modules into train mode, but for the parts that stay in eval mode, or all into eval mode."""
        for module in self.modules:
            module.train(mode)
        for part in self.stay:
            part.eval()

    def _stop(self, reason: str) -> None:
        """Ends the loop for this reason, unless it has ended already."""
        if not self.is_done:
            self.is_done, self.history.stopped = True, reason

    def state_dict(self) -> dict[str, Any]:
        """The state of the training without the current weights, which a checkpoint takes from the module."""
        return {
            "best": self.best.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": asdict(self.history),
            "skips_in_a_row": self.skips_in_a_row,
            "is_done": self.is_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = History(**state["history"])
        self.skips_in_a_row, self.is_done = state["skips_in_a_row"], state["is_done"]


def _summary(losses: list[float]) -> tuple[float, float]:
    """The mean of the finite losses and its standard error; both are nan if no loss is finite."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
    return float(np.mean(finite)), float(np.std(finite)) / math.sqrt(len(finite))


def _is_true(answer: object) -> bool:
    """Whether a callback has returned True, of Python or of numpy; no other value stops a training."""
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _parts_that_stay(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The parts in eval mode that a training must leave there, such as a frozen encoder with statistics of its own.

    These are the parts of a module in train mode, and in any module those whose parameters are all frozen.
    """
    return [
        part
        for module in modules
        for part in module.modules()
        if not part.training and (module.training or _is_frozen(part))
    ]


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
