# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .bijection import Bijection
from .data import Batch, prepare
from .optimization import History, optimize


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
        progress: whether to show a progress bar with the mean of the last 50 losses and the best.

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
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    batches, held_out = prepare(flow, x, context, validation, batch_size, generator)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the flow has no parameter that requires a gradient: there is nothing to fit")
    return optimize(
        [flow],
        parameters,
        lambda: _loss(flow, next(batches)),
        validation=(lambda: _mean_loss(flow, held_out)) if held_out else None,
        num_steps=num_steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        averaging=averaging,
        validate_every=validate_every,
        patience=patience,
        progress=progress,
        remedy="lower lr, or rescale x",
    )


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
