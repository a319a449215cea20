# SPDX-License-Identifier: Apache-2.0
"""Fitting flows by maximum likelihood."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from ..bijections.bijection import Bijection
from . import distributed
from .batches import of_all_processes, prepare
from .checkpoint import Checkpoint
from .held_out import EXTREME, HeldOutLoss
from .history import Callback, History
from .loop import Training
from .objective import Objective, log_likelihood, refuse_unknown_parameters
from .options import LoopOptions, plain
from .rows import Batch
from .start import start
from .streams import Stream

_WORSE = 0.1  # nats, more than the noise of a held-out part
_held_out_numbers: ContextVar[Sequence[int] | None] = ContextVar("held_out_numbers", default=None)


def fit(
    flow: nn.Module,
    x: Tensor | np.ndarray | Iterable[Any],
    *,
    context: Tensor | np.ndarray | None = None,
    weights: Tensor | np.ndarray | None = None,
    num_steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 5e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    averaging: float = 0.1,
    validation: float | Tensor | np.ndarray | tuple[Any, ...] | Iterable[Any] = 0.1,
    validate_every: int = 50,
    patience: int | None = 1000,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
    augment: Callable[[Tensor], Tensor] | None = None,
    standardize: bool = True,
    callbacks: Sequence[Callback] = (),
    compile: bool | str = False,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> History:
    r"""Fits a flow by maximum likelihood, :math:`\max_\theta \frac1N \sum_i w_i \log p_\theta(x_i \mid c_i)`.

    Adam (fused) takes steps on mini-batches, while the learning rate warms up and then falls to zero along a cosine.
    The weights that are validated and returned are an exponential moving average of Adam's. A part of the rows is held
    out: training stops when their loss has stopped falling, and the best weights seen are restored. Ctrl-C also stops
    the training, and the flow keeps the best weights so far. A step whose loss or gradient is not finite is skipped and
    counted; after ten in a row the best weights are restored and the learning rate is halved, three times at most.
    Weights are never re-initialized: a second call of ``fit`` starts from those that the first has found.

    Where :mod:`torch.distributed` is initialized, as under ``torchrun``, all processes train one flow together
    (:class:`~torch.nn.parallel.DistributedDataParallel`); each gets its share of every batch and of the held-out rows.
    Ctrl-C then raises ``KeyboardInterrupt``.

    Args:
        flow: a :class:`Flow`, or any module that returns a distribution when called (with the context, if there is
            one).
        x: the rows, ``(N,) + event_shape``. A tensor must have the flow's dtype; a floating-point array is converted to
            it batch by batch, and a memory-mapped one (``np.load(path, mmap_mode="r")``) stays on the disk. In place of
            rows, x may be a ``DataLoader`` or another iterable of batches ``x`` or ``(x, context)``.
        context: the context of each row, ``(N, context_dim)``, for a conditional flow; or what its embedding reads,
            such as integer labels, ``(N,)``.
        weights: the weight :math:`w_i` of each row, ``(N,)``, not negative. They are scaled to a mean of 1. A row of
            weight 0 does not count at all, whatever it holds.
        num_steps: the number of optimizer steps; the schedule of the learning rate spans all of them.
        batch_size: the number of rows in a step, in all processes together; by default 256, or all rows if there are
            fewer.
        lr: the highest learning rate.
        warmup: the fraction of the steps in which the learning rate rises.
        weight_decay: the decoupled weight decay (AdamW).
        max_grad_norm: the norm to which larger gradients are scaled down.
        averaging: the time constant of the moving average of the weights (``torch.optim.swa_utils.AveragedModel``), as
            a fraction of the steps; 0 for none.
        validation: the fraction of the rows to hold out (0 for none), or separate rows to validate on: ``x``,
            ``(x, context)`` or a ``DataLoader``. If x is a ``DataLoader``, no fraction of it is held out.
        validate_every: the number of steps between validations.
        patience: the number of steps without a better validation loss after which training stops; ``None`` to take all
            steps. Without held-out rows it has no effect.
        seed: the seed that decides which rows are held out and the order of the batches; by default drawn from torch's
            generator.
        checkpoint: a file for the whole state of the training, written at the start, at regular intervals and at the
            end. If the training was stopped, the same call resumes it from the file; on a CPU the result is, bit for
            bit, that of an uninterrupted training (of a ``DataLoader``, if it draws the same batches from the same
            random states, which workers that persist do not). If the training in the file is complete, its result is
            loaded.
        checkpoint_every: the number of steps between checkpoints.
        augment: a function that takes the x of a batch and returns the x to train on, for example with noise or with
            flipped images. Held-out rows are not augmented.
        standardize: whether a new flow of vectors gets layers that standardize the rows or the contexts, if these are
            far from the base: a median beyond 10, or a scale beyond 10 or below 1/10. A warning says so.
        callbacks: functions that are called after each step with the :class:`History` so far, in which
            ``len(history.loss)`` is the number of the step. If one returns True, training stops.
        compile: whether to compile the loss with :func:`torch.compile`, or the mode to compile it in, such as
            ``"reduce-overhead"`` for CUDA graphs. Batches shorter than those before run uncompiled. If compilation
            fails, for example for lack of a compiler, a warning says so and all batches run uncompiled.
        device: the device to train on. The flow is moved there, and each batch is sent there; batches of rows go to a
            GPU from pinned memory.
        autocast: a dtype, such as ``torch.bfloat16``, for the products in the networks. It is not used in validation.
        tf32: whether float32 products may use TensorFloat-32 on GPUs that have it.
        progress: whether to show a progress bar with the mean of the last 50 losses and the best; where the output is
            no terminal, one line for each tenth of the steps.

    Returns:
        The :class:`History`; ``plots.plot_loss`` draws it.

    Raises:
        TypeError: The data are not floating-point or not of the flow's dtype, or ``flow`` is a bijection.
        ValueError: The rows do not have the flow's event shape, contain nan or inf, have a constant column, or are
            fewer than two or than a batch; contexts or weights do not match the rows; no row is left to train on or to
            hold out; the loss has parameters that ``flow.parameters()`` lacks; an option is out of range; or the
            checkpoint belongs to another training or architecture.
        RuntimeError: The checkpoint is damaged, or it cannot be written; the flow has the best weights so far. Or
            gradients are disabled.

    Warns:
        RuntimeWarning: Steps were skipped, the loss could not be compiled, layers were added to the flow, held-out rows
            are far from all others, or the training has made the held-out loss worse.

    Example:
        >>> from pyro_realnvp import Flow, real_nvp
        >>> flow = Flow(real_nvp(2))
        >>> history = fit(flow, torch.randn(500, 2) * 0.5, num_steps=20, progress=False)
        >>> len(history.loss)
        20
    """
    if isinstance(flow, Bijection):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}, a bijection without a base: pass Flow(bijection)")
    options = LoopOptions(
        num_steps=num_steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        averaging=averaging,
        validate_every=validate_every,
        patience=patience,
    )
    if callable(callbacks):
        name = getattr(callbacks, "__name__", repr(callbacks))
        raise TypeError(f"expected a sequence of callbacks; got one: pass callbacks=[{name}]")
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not torch.is_grad_enabled():
        raise RuntimeError("fit needs gradients, which are disabled here: call it outside of torch.no_grad()")
    if not parameters:
        raise ValueError("the flow has no parameter that requires a gradient: there is nothing to fit")
    seed, batch_size, validation = plain(seed), plain(batch_size), plain(validation)
    checkpoint = distributed.agree(checkpoint)
    file = None if checkpoint is None else Checkpoint(checkpoint, checkpoint_every)
    if seed is None:
        seed = file.found["settings"]["seed"] if file and file.found else int(torch.randint(2**62, ()))
    seed = distributed.agree(seed)
    if device is not None:
        flow.to(device)
    batches, held_out, tables = prepare(
        flow, x, context, weights, validation, batch_size, torch.Generator().manual_seed(seed)
    )
    distributed.share_state(flow)  # start looks at it
    # All processes have all rows, but each only its own part of a stream.
    gathered = of_all_processes if isinstance(batches, Stream) else (lambda batch: batch)
    start(flow, lambda: gathered(batches.some()), standardize=standardize)
    objective = Objective(flow, compile, autocast)
    if distributed.are_many():
        objective = DistributedDataParallel(objective)
    training = Training([flow], parameters, options)
    validate = None if held_out is None else HeldOutLoss(flow, held_out)
    if file:
        split = validation if isinstance(validation, (int, float)) else None
        settings = {
            "seed": seed,
            "batch_size": batch_size,
            "validation": split,
            "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
            "rows": [rows.mark() for rows in tables],
        }
        parts = {"training": training, "batches": batches} | ({} if validate is None else {"validation": validate})
        file.connect(flow, asdict(options) | settings, **parts)

    bijections = [module for module in flow.modules() if isinstance(module, Bijection)]

    def loss() -> Tensor:
        batch = next(batches)
        if augment is not None:
            x, batch = batch.x, batch._replace(x=augment(batch.x))
            if len(batch.x) != len(x) and batch[1:] != (None, None):
                raise ValueError(
                    f"expected augment to keep the {len(x)} rows of a batch, which have contexts or weights; got "
                    f"{len(batch.x)}"
                )
        if any(bijection.needs_data for bijection in bijections):
            _initialize(flow, batch)
        loss = objective(*batch)
        if training.step == 0:
            refuse_unknown_parameters(loss, flow)
        return loss

    with _tensor_float(tf32):
        history = training.run(
            loss,
            validate,
            progress=progress,
            remedy="lower lr, or look for extreme values in x",
            # The start of a flow that data will initialize says nothing.
            validate_start=held_out is not None and not any(bijection.needs_data for bijection in bijections),
            callbacks=callbacks,
            checkpoint=file,
        )
    if distributed.rank() == 0:
        _warn_of_the_end(history, validate)
    return history


def _warn_of_the_end(history: History, validate: HeldOutLoss | None) -> None:
    """Says why the best weights may not be what the user expects."""
    numbers = _held_out_numbers.get()
    if validate is not None and validate.extreme:
        extreme = validate.extreme if numbers is None else sorted(int(numbers[k]) for k in validate.extreme)
        warnings.warn(
            f"the held-out rows {extreme} are far from all others (their losses are not finite, or more than "
            f"{EXTREME} interquartile ranges above the median), so they counted no more than that in the choice of "
            "the best weights: look at them, they may be fill values or outliers",
            RuntimeWarning,
            stacklevel=3,
        )
    if validate is not None and not math.isfinite(history.best_loss) and history.stopped in ("finished", "early"):
        warnings.warn(
            "no validation had a finite loss, so the flow keeps the weights it came with: look at the held-out rows, "
            "which may lie outside of the support of the flow or of its base",
            RuntimeWarning,
            stacklevel=3,
        )
    # A start that is as good as the end may be the best there is, as for normal data that are standardized.
    is_worse = history.best_step == 0 and not history.validation_loss[-1] <= history.best_loss + _WORSE
    has_start = math.isfinite(history.best_loss)
    if is_worse and has_start and history.stopped in ("finished", "early") and numbers is None:
        warnings.warn(
            f"the training has raised the held-out loss from {history.best_loss:.4g} to "
            f"{history.validation_loss[-1]:.4g}, so the flow keeps the weights it came with: take a lower lr, more "
            "steps, or look at the data",
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def for_an_estimator(held_out: Sequence[int]) -> Iterator[None]:
    """Within it, `fit` gives the held-out rows these numbers, and does not warn if no training has improved the start.

    It is a setting of the thread, since `warnings.catch_warnings` changes the filters of all threads.
    """
    token = _held_out_numbers.set(held_out)
    try:
        yield
    finally:
        _held_out_numbers.reset(token)


def _initialize(flow: nn.Module, batch: Batch) -> None:
    """Initializes the layers that need data, in a pass of its own and not in the step, which may be compiled.

    In many processes all initialize their layers with the rows of all.
    """
    batch = of_all_processes(batch)
    # No backward pass follows, so nothing is kept for it. Under no_grad the layers would not initialize.
    with saved_tensors_hooks(lambda _: None, lambda _: None):
        log_likelihood(flow, batch)


@contextmanager
def _tensor_float(allowed: bool) -> Iterator[None]:
    """Allows TensorFloat-32 within a ``with`` block, if it is to be allowed."""
    if not allowed:  # the user's own setting stays
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
