# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood."""

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .bijection import Bijection
from .data import Batch, prepare

_SKIPS_BEFORE_RESTORE = 10
_MAX_RESTORES = 3


@dataclass
class History:
    """What happened in :func:`fit`. Losses are mean negative log-likelihoods in nats."""

    loss: list[float] = field(default_factory=list)
    """Of each step; nan where the step was skipped."""
    validation_steps: list[int] = field(default_factory=list)
    """The steps after which the averaged weights were validated."""
    validation_loss: list[float] = field(default_factory=list)
    """Their loss at each of these steps."""
    best_step: int = 0
    """The step whose weights the flow has now."""
    best_loss: float = math.inf
    """Their loss: on the held-out rows or, where there are none, the mean since the validation before."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed no weight."""
    restores: int = 0
    """How often the best weights were restored after repeated skips, with half the learning rate."""
    stopped: str = "finished"
    """``"finished"``, ``"early"`` (the validation loss stopped falling), ``"interrupted"`` (Ctrl-C), ``"diverged"``."""
    seconds: float = 0.0
    """Wall-clock time."""


def fit(
    flow: nn.Module,
    x: Tensor | np.ndarray | DataLoader,
    *,
    context: Tensor | np.ndarray | None = None,
    num_steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 5e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    averaging: float = 0.1,
    validation: float | Tensor | np.ndarray | tuple | DataLoader = 0.1,
    validate_every: int = 50,
    patience: int | None = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> History:
    r"""Fits a flow by maximum likelihood, :math:`\max_\theta \frac1N \sum_i \log p_\theta(x_i \mid c_i)`.

    Adam (fused) on mini-batches; the learning rate warms up and then falls to zero along a cosine. The weights that are
    validated, and that stay, are an exponential moving average of Adam's. A part of the rows is held out: training
    stops when their loss stops falling, and the best weights seen are restored. Ctrl-C stops too, with the best so far.
    A step whose loss or gradient is not finite is skipped and counted; after ten in a row the best weights are restored
    and the learning rate is halved. Weights are never re-initialised: calling ``fit`` again goes on from there.

    Args:
        flow: a :class:`Flow`, or any module that returns a distribution when called (with the context, if there is
            one).
        x: rows, ``(N,) + event_shape``. A tensor must have the flow's dtype and device; a floating-point numpy array is
            converted to them. Or a ``DataLoader`` of batches ``x`` or ``(x, context)``.
        context: ``(N, context_dim)``, for a conditional flow.
        num_steps: optimizer steps; the schedule spans all of them.
        batch_size: rows in a step, by default 256 or, if there are fewer, all.
        lr: the highest learning rate.
        warmup: the fraction of the steps in which it rises.
        weight_decay: decoupled weight decay (AdamW).
        max_grad_norm: gradients are scaled down to this norm.
        averaging: the time constant of the moving average of the weights, as a fraction of the steps; 0 for none.
        validation: the fraction of the rows that is held out (0 for none), or rows of their own: ``x``,
            ``(x, context)`` or a ``DataLoader``. Of a ``DataLoader`` of training rows nothing is held out.
        validate_every: steps between validations.
        patience: stop after so many steps without a better validation loss; ``None`` for never.
        seed: of the batches and the held-out rows; by default drawn from torch's generator.
        progress: whether to show a progress bar with the current and the best loss.

    Returns:
        The :class:`History`; ``plots.plot_loss`` draws it.

    Raises:
        TypeError: data that are not floating-point, or of another dtype than the flow; a bijection instead of a flow.
        ValueError: another event shape than the flow's, nan or inf, a constant column, fewer than two rows, fewer rows
            than a batch, another number of contexts than rows, a validation part that leaves nothing.

    Warns:
        RuntimeWarning: steps were skipped.

    Example:
        >>> from pyro_realnvp import Flow, real_nvp
        >>> flow = Flow(real_nvp(2))
        >>> history = fit(flow, torch.randn(500, 2) * 0.5, num_steps=20, progress=False)
        >>> len(history.loss)
        20
    """
    if isinstance(flow, Bijection):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}, a bijection without a base: pass Flow(bijection)")
    for name, steps in (("num_steps", num_steps), ("validate_every", validate_every)):
        if steps < 1:
            raise ValueError(f"expected {name} >= 1; got {steps}")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    batches, held_out = prepare(flow, x, context, validation, batch_size, generator)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the flow has no parameter that requires a gradient: there is nothing to fit")
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
    schedule = OneCycleLR(optimizer, lr, total_steps=num_steps + 1, pct_start=warmup, cycle_momentum=False)
    average = _Average(parameters, decay=1 - 1 / max(averaging * num_steps, 1))
    best = copy.deepcopy(flow.state_dict())
    history = History()
    skips_in_a_row = step = 0

    def validate() -> None:
        nonlocal best
        recent = [loss for loss in history.loss[-validate_every:] if math.isfinite(loss)]
        with average.in_place():
            loss = _mean_loss(flow.eval(), held_out) if held_out else sum(recent) / max(len(recent), 1)
            flow.train()
            history.validation_steps.append(step)
            history.validation_loss.append(loss)
            if recent and loss < history.best_loss:
                history.best_loss, history.best_step = loss, step
                best = copy.deepcopy(flow.state_dict())

    was_training = flow.training
    flow.train()
    bar = tqdm(total=num_steps, disable=not progress, unit="step")
    try:
        for step in range(1, num_steps + 1):
            loss = _loss(flow, next(batches))
            optimizer.zero_grad()
            loss.backward()
            total_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            loss, norm = torch.stack([loss.detach(), total_norm]).tolist()
            if math.isfinite(loss + norm):
                if norm > max_grad_norm:
                    clip_grads_with_norm_(parameters, max_grad_norm, total_norm)
                optimizer.step()
                average.restart() if step == 1 else average.update()  # the first pass initialises ActNorm
                skips_in_a_row = 0
            else:
                loss = math.nan
                history.skipped_steps += 1
                skips_in_a_row += 1
            schedule.step()
            history.loss.append(loss)
            if skips_in_a_row == _SKIPS_BEFORE_RESTORE:
                if history.restores == _MAX_RESTORES:
                    history.stopped = "diverged"
                    break
                history.restores += 1
                skips_in_a_row = 0
                flow.load_state_dict(best)
                average.restart()
                optimizer.state.clear()
                for group in optimizer.param_groups:
                    group.update({key: group[key] / 2 for key in ("initial_lr", "max_lr", "min_lr")})
            if step % validate_every == 0:
                validate()
                if held_out and patience is not None and step - history.best_step >= patience:
                    history.stopped = "early"
                    break
            if step % 10 == 0 or step == num_steps:
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{history.best_loss:.3f}", refresh=False)
                bar.update(step - bar.n)
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    finally:
        try:
            if history.loss and step not in history.validation_steps:
                validate()
        finally:
            flow.load_state_dict(best)
            flow.train(was_training)
            bar.close()
            history.seconds = time.perf_counter() - started
    if history.skipped_steps:
        warnings.warn(
            f"{history.skipped_steps} of {len(history.loss)} steps had a loss or gradient that is not finite and were "
            f"skipped; the best weights were restored {history.restores} times: lower lr, or rescale x",
            RuntimeWarning,
            stacklevel=2,
        )
    return history


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


def _loss(flow: nn.Module, batch: Batch) -> Tensor:
    x, context = batch
    distribution = flow() if context is None else flow(context)
    return -distribution.log_prob(x).mean()


@torch.no_grad()
def _mean_loss(flow: nn.Module, batches: Iterable[Batch]) -> float:
    total = rows = 0
    for x, context in batches:
        total += _loss(flow, (x, context)).double() * len(x)
        rows += len(x)
    return float(total / rows)
