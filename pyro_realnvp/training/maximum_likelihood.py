# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from ..bijections.bijection import Bijection
from . import distributed
from .batches import prepare
from .checkpoint import Checkpoint
from .history import Callback, History
from .loop import Training
from .objective import Objective, log_likelihood
from .options import LoopOptions, plain
from .rows import Batch


def fit(
    flow: nn.Module,
    x: Tensor | np.ndarray | Iterable,
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
    validation: float | Tensor | np.ndarray | tuple | Iterable = 0.1,
    validate_every: int = 50,
    patience: int | None = 1000,
    seed: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 200,
    augment: Callable[[Tensor], Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    compile: bool | str = False,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> History:
    r"""Fits a flow by maximum likelihood, :math:`\max_\theta \frac1N \sum_i w_i \log p_\theta(x_i \mid c_i)`.

    Adam (fused) on mini-batches; the learning rate warms up and then falls to zero along a cosine. The weights that are
    validated, and that stay, are an exponential moving average of Adam's. A part of the rows is held out: training
    stops when their loss stops falling, and the best weights seen are restored. Ctrl-C stops too, with the best so far.
    A step whose loss or gradient is not finite is skipped and counted; after ten in a row the best weights are restored
    and the learning rate is halved. Weights are never re-initialised: calling ``fit`` again goes on from there.

    Where :mod:`torch.distributed` is initialised, as under ``torchrun``, all processes train one flow together
    (:class:`~torch.nn.parallel.DistributedDataParallel`); each gets its share of every batch and of the held-out rows.

    Args:
        flow: a :class:`Flow`, or any module that returns a distribution when called (with the context, if there is
            one).
        x: rows, ``(N,) + event_shape``. A tensor must have the flow's dtype; a floating-point array is converted to it,
            batch by batch, and a memory-mapped one (``np.load(path, mmap_mode="r")``) stays on the disk. Or a
            ``DataLoader``, or another iterable, of batches ``x`` or ``(x, context)``.
        context: ``(N, context_dim)``, for a conditional flow.
        weights: w of each row, ``(N,)``, not negative; scaled to a mean of 1.
        num_steps: optimizer steps; the schedule spans all of them.
        batch_size: rows in a step, of all processes together; by default 256 or, if there are fewer, all.
        lr: the highest learning rate.
        warmup: the fraction of the steps in which it rises.
        weight_decay: decoupled weight decay (AdamW).
        max_grad_norm: gradients are scaled down to this norm.
        averaging: the time constant of the moving average of the weights (``torch.optim.swa_utils.AveragedModel``), as
            a fraction of the steps; 0 for none.
        validation: the fraction of the rows that is held out (0 for none), or rows of their own: ``x``,
            ``(x, context)`` or a ``DataLoader``. Of a ``DataLoader`` of training rows nothing is held out.
        validate_every: steps between validations.
        patience: stop after so many steps without a better validation loss; ``None`` for never.
        seed: of the batches and the held-out rows; by default drawn from torch's generator.
        checkpoint: a file to which the whole state of the training is written, and from which the same call goes on if
            it was stopped: on a CPU to the same result, bit for bit, as if it had not been. If the training in the file
            is complete, its result is loaded.
        checkpoint_every: steps between checkpoints.
        augment: changes each batch x that is trained on, such as by noise or by flipping images.
        callbacks: functions that are called after each step with the :class:`History` so far, whose
            ``len(history.loss)`` is the step; one that returns True stops the training.
        compile: whether to compile the loss with :func:`torch.compile`, or its mode, such as ``"reduce-overhead"`` for
            CUDA graphs. Batches shorter than the others run uncompiled, and all do where there is no compiler.
        device: where to train: the flow is moved there, and each batch is sent there, from pinned memory to a GPU.
        autocast: a dtype, such as ``torch.bfloat16``, for the products in the networks. Validation does without.
        tf32: whether float32 products may use TensorFloat-32, on GPUs that have it.
        progress: whether to show a progress bar with the mean of the last 50 losses and the best.

    Returns:
        The :class:`History`; ``plots.plot_loss`` draws it.

    Raises:
        TypeError: data that are not floating-point, or of another dtype than the flow; a bijection instead of a flow.
        ValueError: another event shape than the flow's, nan or inf, a constant column, fewer than two rows, fewer rows
            than a batch, another number of contexts than rows, a validation part that leaves nothing, a checkpoint of
            another training or architecture.
        RuntimeError: a checkpoint that is damaged, or that cannot be written; the flow has the best weights so far.

    Warns:
        RuntimeWarning: steps were skipped; the loss could not be compiled.

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
    parameters = [p for p in flow.parameters() if p.requires_grad]
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
    objective = Objective(flow, compile, autocast)
    if distributed.are_many():
        objective = DistributedDataParallel(objective)  # which gives all of them the weights of the first
    training = Training([flow], parameters, options)
    if file:
        split = validation if isinstance(validation, (int, float)) else None
        settings = {
            "seed": seed,
            "batch_size": batch_size,
            "validation": split,
            "rows": [rows.mark() for rows in tables],
        }
        file.connect(flow, asdict(options) | settings, training=training, batches=batches)

    bijections = [module for module in flow.modules() if isinstance(module, Bijection)]

    def loss() -> Tensor:
        batch = next(batches)
        if augment is not None:
            batch = batch._replace(x=augment(batch.x))
        if any(bijection.needs_data for bijection in bijections):
            _initialize(flow, batch)
        return objective(*batch)

    with _tensor_float(tf32):
        return training.run(
            loss,
            None if held_out is None else lambda: _mean_loss(flow, held_out),
            progress=progress,
            remedy="lower lr, or rescale x",
            callbacks=callbacks,
            checkpoint=file,
        )


def _initialize(flow: nn.Module, batch: Batch) -> None:
    """The pass that initializes layers from data, apart from the step: it cannot be compiled, and it needs all rows."""
    if distributed.are_many():
        parts = distributed.gather([None if values is None else values.cpu() for values in batch])
        batch = Batch(*(None if v[0] is None else torch.cat(v).to(batch.x.device) for v in zip(*parts)))
    with saved_tensors_hooks(lambda _: None, lambda _: None):  # nobody goes back
        log_likelihood(flow, batch)


@torch.no_grad()
def _mean_loss(flow: nn.Module, batches: Iterable[Batch]) -> float:
    """Of the held-out rows of all processes."""
    total = torch.zeros(2, dtype=torch.float64, device=next(flow.parameters()).device)
    for batch in batches:
        weights = torch.ones(len(batch.x)).to(total) if batch.weights is None else batch.weights
        total += torch.stack([-(weights * log_likelihood(flow, batch)).sum(), weights.sum()])
    loss, weight = distributed.total(total)
    return float(loss / weight)


@contextmanager
def _tensor_float(allowed: bool) -> Iterator[None]:
    if not allowed:  # what the user has set stays
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
