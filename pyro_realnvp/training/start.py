# SPDX-License-Identifier: Apache-2.0
"""What a new flow takes from the data before its first step: their location and scale, and the pieces of its base."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bases import MixtureBase
from ..bijections.compose import Compose
from ..bijections.elementwise import Standardize
from ..bijections.shapes import for_inner_axes
from ..distributions import Flow
from .rows import Batch
from .snapshots import Modes

_FAR = 10.0
_EXTREME = 1e8  # scales from the median, which no distribution but a fill value reaches
_SAMPLES = 10_000
_QUARTILES_OF_NORMAL = 1.349  # the distance between the quartiles of a standard normal


@torch.no_grad()
def start(flow: nn.Module, some: Callable[[], Batch], *, standardize: bool) -> None:
    """Prepares a flow for data like these.

    If rows or contexts are far from the scale of a flow that only permutes its entries yet, layers that standardize
    them become a part of the flow, and a warning says so. (Adam's steps are all of the size of the learning rate, so
    that a flow would not get there.) A new :class:`MixtureBase` is initialized.

    Args:
        flow: the flow to train. Only a :class:`Flow` of vectors, or of several of them, changes.
        some: returns some of the rows to train on.
        standardize: whether such layers may be added.
    """
    if not isinstance(flow, Flow) or not flow.event_shape or flow.bijection.codomain.event_dim > 1:
        return
    modes, batch = Modes(flow), some()
    flow.eval()
    standardize = standardize and _vectors_are_alike(flow.base)
    for name, values in zip(Batch._fields[:2], batch):
        _warn_of_fill_values(name, values)
    if standardize and batch.context is not None:
        _standardize_context(flow, batch)
    if standardize:
        _standardize_rows(flow, batch)
        _standardize_base(flow, batch)
    if isinstance(flow.base, MixtureBase) and flow.base.needs_data:
        z = _latents(flow, batch)
        finite = z.isfinite().all(-1)
        flow.base.initialize(z[finite], None if batch.weights is None else batch.weights[finite])
    modes.restore()


def _warn_of_fill_values(name: str, values: Tensor | None) -> None:
    if values is None or not values.is_floating_point():
        return
    loc, scale = _location_and_scale(values)
    extreme = (values - loc).abs() > _EXTREME * scale
    if extreme.any():
        warnings.warn(
            f"{int(extreme.reshape(len(values), -1).any(1).sum())} of {len(values)} rows of {name} hold values such as "
            f"{values[extreme][0].item():.4g}, far beyond all others: if these are fill values, drop the rows",
            RuntimeWarning,
            stacklevel=5,
        )


def _standardize_context(flow: Flow, batch: Batch) -> None:
    context = batch.context
    if context.dim() != 2 or not context.is_floating_point():  # sets, images or labels, for an embedding
        return
    loc, scale = _location_and_scale(context)
    far = _far(loc, scale)
    if not far.any() or _reads_contexts(flow.base) or not _is_permutation(*_learned_and_rows(flow, batch)):
        return
    given = f"columns {_few(far)} of the context are far from 0 or from the scale 1 ({_describe(loc, scale, far)})"
    if flow.embedding is None:
        flow.embedding = _fitted(loc, scale)
        warnings.warn(
            f"{given}, so the flow now has embedding=Standardize({len(loc)}), fitted to the contexts: build it so, or "
            "pass standardize=False",
            RuntimeWarning,
            stacklevel=5,
        )
    elif _is_passed_on(flow.embed(context)):
        warnings.warn(
            f"{given}, and the flow's embedding passes this on, so that the networks may learn nothing from it: begin "
            f"the embedding with Standardize, as in torch.nn.Sequential(Standardize({len(loc)}).fit(context), "
            "embedding), or pass standardize=False",
            RuntimeWarning,
            stacklevel=5,
        )


def _is_passed_on(embedded: Tensor) -> bool:
    """Whether an embedding leaves contexts far from 0 and the scale 1. (The outputs of a new network are small.)"""
    loc, scale = _location_and_scale(embedded.flatten(1))
    return bool(((loc.abs() > _FAR) | (scale > _FAR) | (scale < _FAR**-2)).any())


def _standardize_rows(flow: Flow, batch: Batch) -> None:
    z = _latents(flow, batch)
    loc, scale = _location_and_scale(z)
    base_loc, base_scale = _moments(flow, z)
    far = _far((loc - base_loc) / base_scale, scale / base_scale)
    if not far.any():
        return
    at_start, rows = _learned_and_rows(flow, batch)
    given = f"columns {_few(far)} of x are far from the base ({_describe(loc, scale, far)} in its coordinates)"
    dim = len(loc)
    if not _is_permutation(at_start, rows):
        warnings.warn(
            f"{given}, and the flow is no longer new: the training may not get there. To start anew, end a new flow in "
            f"Standardize({dim}).fit(x).inv",
            RuntimeWarning,
            stacklevel=5,
        )
        return
    loc, scale = _location_and_scale(rows)
    base_loc, base_scale = (_first(at_start(values.expand_as(rows))) for values in (base_loc, base_scale))
    layer = _fitted(loc - scale / base_scale * base_loc, scale / base_scale)
    learned, fixed = _split(flow)
    flow.bijection = Compose([learned, layer.inv, *fixed])
    if any(isinstance(module, Standardize) for part in fixed for module in part.modules()):
        remedy = "a few extreme rows have set the scale of its own Standardize, so look at them"
    else:
        remedy = f"build it as Flow(Compose([bijection, Standardize({dim}).fit(x).inv]))"
    warnings.warn(
        f"{given}, so the flow now has a layer Standardize({dim}).inv, fitted to the rows: {remedy}, or pass "
        "standardize=False",
        RuntimeWarning,
        stacklevel=5,
    )


def _standardize_base(flow: Flow, batch: Batch) -> None:
    """Keeps the density, but not the coordinates, of a base that was placed at data: couplings would read them."""
    loc, scale = _moments(flow, _latents(flow, batch))
    far = _far(loc, scale)
    if not far.any():
        return
    at_start, rows = _learned_and_rows(flow, batch)
    if not _is_permutation(at_start, rows):
        return
    loc_of_rows, scale_of_rows = (_first(at_start(values.expand_as(rows))) for values in (loc, scale))
    learned, fixed = _split(flow)
    flow.bijection = Compose([_fitted(loc, scale), learned, _fitted(loc_of_rows, scale_of_rows).inv, *fixed])
    dim = len(loc)
    warnings.warn(
        f"columns {_few(far)} of the base are far from 0 or from the scale 1 ({_describe(loc, scale, far)}), so the "
        f"flow now has layers Standardize({dim}) and Standardize({dim}).inv at its ends: build it as "
        f"Flow(Compose([bijection, to_data.inv]), base=...), with to_data = Standardize({dim}).fit(x) and a base for "
        "to_data(x), or pass standardize=False",
        RuntimeWarning,
        stacklevel=5,
    )


def _is_permutation(learned: nn.Module, rows: Tensor) -> bool:
    """Whether a bijection only permutes the rows, and points of the base, too: far away a spline is the identity."""
    near = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
    pairs = [(x.sort(-1).values, learned.inv(x).sort(-1).values) for x in (rows, near)]
    return all(
        after.shape == before.shape and torch.allclose(after, before, rtol=1e-3, atol=1e-3) for before, after in pairs
    )


def _vectors_are_alike(base: Callable) -> bool:
    """Whether all vectors of an event have one location and one scale, as far as is known."""
    if isinstance(base, MixtureBase):
        return True
    try:
        moments = base().mean, base().stddev
    except NotImplementedError:
        return True
    rows = (values.reshape(-1, values.shape[-1]) for values in moments if values.dim())
    return all(len(each) == 1 or torch.equal(each, each[:1].expand_as(each)) for each in rows)


def _reads_contexts(base: Callable) -> bool:
    """Whether a base has learned from contexts."""
    return isinstance(base, MixtureBase) and base.conditioner is not None and bool(base.conditioner.last.weight.any())


def _split(flow: Flow) -> tuple[nn.Module, list[nn.Module]]:
    """The bijection without the fixed maps that end it, such as to bounded columns, and these maps."""
    parts = list(flow.bijection.parts) if isinstance(flow.bijection, Compose) else [flow.bijection]
    fixed: list[nn.Module] = []
    while len(parts) > 1 and not any(p.requires_grad for p in parts[-1].parameters()):
        fixed.insert(0, parts.pop())
    return (Compose(parts) if fixed else flow.bijection), fixed


def _learned_and_rows(flow: Flow, batch: Batch) -> tuple[nn.Module, Tensor]:
    """The learned bijection at the contexts of a batch, and the rows as they come out of it."""
    learned, fixed = _split(flow)
    return _condition(learned, flow, batch), _condition(Compose(fixed), flow, batch).inv(batch.x)


def _condition(bijection: nn.Module, flow: Flow, batch: Batch) -> nn.Module:
    extra_dims = len(flow.event_shape) - flow.bijection.codomain.event_dim
    context = for_inner_axes(flow.embed(batch.context), extra_dims)
    return bijection if context is None else bijection.condition(context)


def _latents(flow: Flow, batch: Batch) -> Tensor:
    return _condition(flow.bijection, flow, batch).inv(batch.x)


def _moments(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each column of the base, in the dtype of latents z; 0 and 1 if it has
    none, or will get them from the data."""
    zero, one = torch.zeros_like(_first(z)), torch.ones_like(_first(z))
    if isinstance(flow.base, MixtureBase) and (flow.base.needs_data or flow.base.context_dim):
        return zero, one
    base = flow.base()
    try:
        loc, scale = base.mean, base.stddev
    except NotImplementedError:
        return zero, one
    if not (loc.isfinite() & scale.isfinite()).all():  # as of a StudentT with two degrees of freedom
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loc, scale = _location_and_scale(base.sample((_SAMPLES,)))
    return _first(loc.expand(base.event_shape).to(zero)), _first(scale.expand(base.event_shape).to(one))


def _first(vectors: Tensor) -> Tensor:
    return vectors.reshape(-1, vectors.shape[-1])[0]


def _location_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The median and a robust standard deviation of each column, which a few extreme rows do not change.

    If more than half of a column are ties, its scale is the largest distance from the median, as for a rare label.
    """
    own = rows = rows.flatten(0, -2)
    rows = rows[rows.isfinite().all(-1)].double()
    if not len(rows):
        return torch.zeros_like(own[0]), torch.ones_like(own[0])
    low, median, high = rows.quantile(torch.tensor([0.25, 0.5, 0.75]).to(rows), dim=0)
    scale = (high - low) / _QUARTILES_OF_NORMAL
    scale = torch.where(scale > 0, scale, (rows - median).abs().amax(0))
    return median.to(own), torch.where(scale > 0, scale, 1.0).to(own)  # a constant column has the scale 1


def _far(loc: Tensor, scale: Tensor) -> Tensor:
    return (loc.abs() > _FAR) | (scale > _FAR) | (scale < 1 / _FAR)


def _fitted(loc: Tensor, scale: Tensor) -> Standardize:
    layer = Standardize(len(loc)).to(loc)
    layer.mean.copy_(loc)
    layer.std.copy_(scale)
    return layer


def _few(far: Tensor) -> list[int]:
    return far.nonzero().flatten().tolist()[:10]


def _describe(loc: Tensor, scale: Tensor, far: Tensor) -> str:
    k = int(far.nonzero()[0])
    return f"column {k} is about {loc[k].item():.4g} and has the scale {scale[k].item():.4g}"
