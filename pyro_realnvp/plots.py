# SPDX-License-Identifier: Apache-2.0
"""Plots of flows and trainings (``pip install pyro_realnvp[plots]``).

All functions but :func:`plot_layers` draw into the axes that they are given, or into new ones, and return them.
"""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'pyro_realnvp[plots]'") from error

from .bijections.compose import Compose
from .training.history import History

DATA_COLOR, FLOW_COLOR = "tab:blue", "tab:orange"
_GRID_POINTS = 200  # on each axis


def plot_density(
    flow: nn.Module,
    x: ArrayLike | None = None,
    *,
    context: Tensor | None = None,
    max_points: int = 500,
    ax: Axes | None = None,
) -> Axes:
    """The density of a 2-D flow over a grid, with data on top.

    Args:
        flow: a :class:`Flow` of two dimensions.
        x: the data, ``(N, 2)``, which the grid covers with a margin. Without data it covers [-4, 4] and a margin.
        context: the context of a conditional flow, ``(context_dim,)``.
        max_points: the number of data points to draw, 0 for none.
        ax: the axes to draw into.
    """
    _check_2d(flow)
    ends = torch.tensor([[-4.0, -4.0], [4.0, 4.0]])
    if x is not None:
        x = _rows(flow, x)
        ends = torch.stack([x.amin(0), x.amax(0)]).cpu()
    margin = 0.15 * (ends[1] - ends[0])
    axes = [torch.linspace(float(a), float(b), _GRID_POINTS) for a, b in zip(ends[0] - margin, ends[1] + margin)]
    grid = _like(flow, torch.stack(torch.meshgrid(*axes, indexing="xy"), -1))
    with torch.no_grad():
        distribution, density = flow(*_given(context)), torch.zeros(grid.shape[:-1], dtype=torch.float32)
        if distribution.batch_shape:
            raise ValueError(
                f"expected one context, (context_dim,); got shape {tuple(context.shape)}: pass one of them"
            )
        inside = distribution.support.check(grid)  # the margin may leave the support
        density[inside.cpu()] = distribution.log_prob(grid[inside]).exp().float().cpu()
    ax = _axes(ax)
    ax.pcolormesh(axes[0].numpy(), axes[1].numpy(), density.numpy(), cmap="magma", shading="gouraud", rasterized=True)
    if x is not None:
        ax.scatter(*_columns(x[:max_points]), s=1, c="white", alpha=0.3, linewidths=0)
    ax.set(title="density", xlabel="$y_1$", ylabel="$y_2$")
    return ax


def plot_samples(
    flow: nn.Module, x: ArrayLike, *, context: Tensor | None = None, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """The first two columns of the data, and beside them those of as many samples, on the same scales.

    Args:
        flow: a :class:`Flow` of two or more dimensions.
        x: the data, ``(N, D)``.
        context: one context, ``(context_dim,)``, or one for each row, ``(N, context_dim)``.
        axes: two axes to draw into.
    """
    _check_2d(flow, at_least=True)
    x = _rows(flow, x)
    with torch.no_grad():
        distribution = flow(*_given(context))
        if distribution.batch_shape not in ((), (1,), (len(x),)):
            raise ValueError(
                f"expected one context, or one for each of the {len(x)} rows of x; got shape {tuple(context.shape)}"
            )
        one_for_each = distribution.batch_shape == (len(x),)
        samples = distribution.sample(() if one_for_each else (len(x),)).reshape(x.shape)
    axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)[1] if axes is None else axes
    for ax, points, title, color in zip(axes, (x, samples), ("data", "samples"), (DATA_COLOR, FLOW_COLOR)):
        ax.scatter(*_columns(points), s=3, c=color, alpha=0.5, linewidths=0)
        ax.set(title=title, xlabel="$y_1$", ylabel="$y_2$")
    axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    return axes


def plot_latent(
    flow: nn.Module,
    x: ArrayLike,
    *,
    context: Tensor | None = None,
    color: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The first two columns of the data in latent space.

    Around 50, 90 and 99 % of a normal base there are ellipses, and around each normal of a mixture, if it does not
    depend on the context.

    Args:
        flow: a :class:`Flow` of two or more dimensions.
        x: the data, ``(N, D)``.
        context: one context, ``(context_dim,)``, or one for each row, ``(N, context_dim)``.
        color: a value for each row, e.g. its label.
        ax: the axes to draw into.
    """
    _check_2d(flow, at_least=True)
    distribution = flow(*_given(context))
    with torch.no_grad():
        latent = distribution.transform(_rows(flow, x))
    ax = _axes(ax)
    _scatter(ax, latent, color, s=3, alpha=0.6)
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float32)
    circle = torch.stack([angle.cos(), angle.sin()])
    for loc, tril in _normals(distribution.base_dist):
        for mass in (0.5, 0.9, 0.99):
            radius = math.sqrt(-2 * math.log(1 - mass))
            ax.plot(*(loc[:, None] + radius * tril @ circle).numpy(), color="gray", linewidth=0.8)
    ax.set(title="data in latent space", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    return ax


def plot_layers(
    flow: nn.Module,
    x: ArrayLike,
    *,
    context: Tensor | None = None,
    color: ArrayLike | None = None,
    max_panels: int = 8,
) -> Figure:
    """The data on their way to latent space: a new figure with a panel for each of some evenly spaced stages.

    Args:
        flow: a :class:`Flow` around a :class:`Compose`.
        x: the data, ``(N, D)``, of which the first two columns are drawn.
        context: one context, ``(context_dim,)``, or one for each row, ``(N, context_dim)``.
        color: a value for each row, e.g. its label.
        max_panels: the highest number of panels. The first shows the data, the last the data in latent space.
    """
    _check_2d(flow, at_least=True)
    if not isinstance(flow.bijection, Compose):
        raise ValueError(f"expected a flow around a Compose; got {type(flow.bijection).__name__}, which has no layers")
    stages = [_rows(flow, x)]
    with torch.no_grad():
        given = _given(context)
        flow(*given)  # raises an error if the context does not fit
        context = flow.embed(*given) if given else None
        for part in reversed(flow.bijection.parts):
            stages.append(part.inverse_and_ladj(stages[-1], context if part.context_dim else None)[0])
    shown = torch.linspace(0, len(stages) - 1, min(max_panels, len(stages))).round().int().tolist()
    fig, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 2.5), layout="constrained", squeeze=False)
    for ax, k in zip(axes[0], shown):
        _scatter(ax, stages[k], color, s=1)
        title = "data" if k == 0 else "latent" if k == len(stages) - 1 else f"after {k}"
        ax.set(title=title, xticks=[], yticks=[])
    return fig


def plot_loss(history: History, *, ax: Axes | None = None) -> Axes:
    """The loss of each step, the validation losses and the best of these, in nats. Skipped steps are gaps."""
    ax = _axes(ax)
    ax.plot(range(1, len(history.loss) + 1), history.loss, c=DATA_COLOR, alpha=0.3, linewidth=0.7, label="training")
    ax.plot(history.validation_steps, history.validation_loss, c=FLOW_COLOR, label="validation")
    # Among losses that differ by noise alone, the best weights are not those of the lowest.
    best = dict(zip(history.validation_steps, history.validation_loss)).get(history.best_step, history.best_loss)
    ax.plot(history.best_step, best, "o", c="black", markersize=4, label=f"best: {best:.3f}")
    losses = torch.tensor(history.loss + history.validation_loss)
    losses = losses[losses.isfinite()]
    if len(losses):
        # The highest hundredth of the losses may lie outside, since the first ones are often far above all others.
        low, high = losses.min().item(), losses.quantile(0.99).item()
        ax.set_ylim(low - 0.05 * (high - low + 1e-6), high + 0.05 * (high - low + 1e-6))
    ax.set(title="loss", xlabel="step", ylabel="loss (nats)")
    ax.legend(frameon=False)
    return ax


def _normals(base: dist.Distribution) -> list[tuple[Tensor, Tensor]]:
    """The location and the triangular scale of each normal of the base, in its first two columns. There are none in a
    base of another kind, or in a batch of them."""
    pieces = getattr(base, "component_distribution", base)
    while isinstance(pieces, torch.distributions.Independent):
        pieces = pieces.base_dist
    if base.batch_shape or not isinstance(pieces, (torch.distributions.MultivariateNormal, torch.distributions.Normal)):
        return []
    trils = pieces.scale_tril if hasattr(pieces, "scale_tril") else pieces.scale.diag_embed()
    locs, trils = (part.detach().cpu().float() for part in (pieces.loc, trils))
    return list(zip(locs.reshape(-1, locs.shape[-1])[:, :2], trils.reshape(-1, *trils.shape[-2:])[:, :2, :2]))


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(4, 4), layout="constrained")[1] if ax is None else ax


def _scatter(ax: Axes, points: Tensor, color: ArrayLike | None, **style) -> None:
    if color is None or isinstance(color, str):
        style |= {"c": DATA_COLOR if color is None else color}
    else:
        color = color.detach().cpu().float().numpy() if isinstance(color, Tensor) else np.asarray(color)
        style |= {"c": np.unique(color, return_inverse=True)[1] if color.dtype.kind in "OSU" else color}
        style |= {"cmap": "coolwarm"} if color.ndim == 1 else {}
    ax.scatter(*_columns(points), linewidths=0, **style)


def _columns(points: Tensor) -> np.ndarray:
    """The first two columns, as matplotlib takes them."""
    return points[:, :2].detach().cpu().double().T.numpy()


def _rows(flow: nn.Module, x: ArrayLike) -> Tensor:
    """Data in the precision and on the device of a flow, checked."""
    x = x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.array(x))
    if x.dim() != 2 or x.shape[1:] != flow.event_shape or not len(x) or not x.isfinite().all():
        raise ValueError(
            f"expected finite rows of shape (N, {flow.event_shape[0]}), N >= 1; got shape {tuple(x.shape)}"
            + (", or nan or inf among them: drop these rows" if not x.isfinite().all() else "")
        )
    return _like(flow, x)


def _like(flow: nn.Module, x: Tensor) -> Tensor:
    own = next((t for t in chain(flow.parameters(), flow.buffers()) if t.is_floating_point()), None)
    return x if own is None else x.to(own)


def _given(context: Tensor | None) -> tuple[Tensor, ...]:
    return () if context is None else (torch.as_tensor(context),)


def _check_2d(flow: nn.Module, *, at_least: bool = False) -> None:
    """Raises an error unless the events are vectors of length two, or of at least two."""
    shape = tuple(flow.event_shape)
    if len(shape) != 1 or shape[0] < 2 or (shape[0] > 2 and not at_least):
        raise ValueError(
            f"expected a flow of {'two or more' if at_least else 'two'} dimensions; got event shape {shape}"
        )
