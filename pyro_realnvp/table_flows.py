# SPDX-License-Identifier: Apache-2.0
"""The flows that the estimator trains on a table, and the noise that it adds."""

import copy
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bases import MixtureBase
from .bijections.bijection import Bijection
from .bijections.compose import Compose
from .bijections.elementwise import Standardize, Unbound
from .bijections.linear import ConditionalAffine, TriangularAffine, triangular_root
from .columns import ROUNDINGS, Columns, along
from .distributions import Flow
from .extremes import typical_weights
from .flows import real_nvp, spline_flow
from .mixtures import makes_clusters

_NARROW = 1e-5  # variance along a direction of standardized rows, below which they are whitened
_NARROW_GIVEN_CONTEXT = 1e-2
_ROWS_PER_CONTEXT = 10  # with fewer, a regression explains what it has learned by heart


def candidates(
    columns: Columns,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor | None,
    *,
    num_components: int | str,
    seed: int,
    num_couplings: int,
    hidden_dims: Sequence[int] | None,
) -> list[Flow]:
    """The flows to choose from: one that starts as a normal, one that starts as a mixture of normals, or both."""
    if num_components != "auto" and not isinstance(num_components, numbers.Integral):
        raise ValueError(f"expected num_components to be 'auto' or a number; got {num_components!r}")
    dim, context_dim = x.shape[1], 0 if context is None else context.shape[1]
    options = {"context_dim": context_dim, "hidden_dims": hidden_dims}
    fixed, typical = _to_table(columns, x, context, weights)

    def make() -> Compose:
        learned = real_nvp(dim, num_couplings=num_couplings, **options) if dim > 1 else spline_flow(**options)
        return Compose([learned, *copy.deepcopy(fixed)]).to(x)

    bijection = make()
    if num_components == 1:
        return [Flow(bijection).to(x)]
    z = _at(bijection, context).inv(x).detach()
    if num_components == "auto":
        base = MixtureBase.for_rows(z, typical, context_dim=context_dim, seed=seed)
        others = [Flow(make(), base=base).to(x)] if base.num_components > 1 else []
        return [Flow(bijection).to(x), *others]
    base = MixtureBase(dim, num_components=num_components, context_dim=context_dim).to(x)
    return [Flow(bijection, base=base.initialize(z, typical, seed=seed)).to(x)]


def mixture_start(flows: list[Flow]) -> Flow | None:
    """A copy of the untrained flow that starts as a mixture, if there is one."""
    return copy.deepcopy(flows[-1]) if isinstance(flows[-1].base, MixtureBase) else None


@torch.no_grad()
def is_better(flow: Flow, start: Flow, x: Tensor, context: Tensor | None, weights: Tensor | None) -> bool:
    """Whether a flow scores rows better than its start does, by more than a standard error of the difference."""
    gains = flow(context).log_prob(x) - start(context).log_prob(x)
    gains = gains if weights is None else weights * gains
    gains = gains[gains.isfinite()]
    return bool(gains.mean() > gains.std(correction=0) / math.sqrt(len(gains)))


@torch.no_grad()
def refit(
    flow: Flow,
    train: Sequence[Tensor | None],
    apart: Sequence[Tensor | None],
    *,
    num_components: int | str,
    seed: int,
) -> None:
    """Chooses the mixture of a flow's base anew, if its size is free, and initializes it from all rows.

    Where all rows are so many that the choice would follow another rule than that of the rows to train on, whose choice
    has been compared with the flows, the size stays. Both tables consist of rows, contexts and weights.
    """
    x, context, weights = (None if a is None else torch.cat([a, b]) for a, b in zip(train, apart))
    z = flow(context).transform(x)
    weights, num = typical_weights(z, weights), len(train[0])
    before = makes_clusters(z[:num], None if weights is None else weights[:num])
    if num_components == "auto" and before == makes_clusters(z, weights):
        flow.base = MixtureBase.for_rows(z, weights, context_dim=flow.base.context_dim, seed=seed)
    else:
        flow.base.initialize(z, weights, seed=seed)


def _to_table(
    columns: Columns, x: Tensor, context: Tensor | None, weights: Tensor | None
) -> tuple[list[Bijection], Tensor | None]:
    """The fixed maps with which a flow ends, to the units of the table; and the weights of the rows that set them."""
    low, high = (torch.tensor(bound, device=x.device) for bound in (columns.low, columns.high))
    bounds = [Unbound(low, high)] if (low.isfinite() | high.isfinite()).any() else []
    unbounded = Compose(bounds)(x) if bounds else x
    typical = typical_weights(unbounded, weights, "X")
    standardize = Standardize(x.shape[1]).to(x).fit(unbounded, typical)
    z = _counted(standardize(unbounded), typical)
    rounding = torch.finfo(x.dtype).eps * (1 + (standardize.mean / standardize.std).abs()).double()
    regression, typical = ([], typical) if context is None else _regression(z, context, typical, rounding)
    narrow = _NARROW_GIVEN_CONTEXT if regression else _NARROW
    whitening = _whitening(_at(Compose(regression), context).inv(z), typical, narrow, rounding)
    return [*whitening, *regression, standardize.inv, *(f.inv for f in bounds)], typical


def _at(bijection: Compose, context: Tensor | None) -> Bijection:
    return bijection if context is None else bijection.condition(context)


def _regression(
    z: Tensor, context: Tensor, weights: Tensor | None, rounding: Tensor
) -> tuple[list[Bijection], Tensor | None]:
    """The linear regression of standardized rows on their contexts, if it leaves little of some direction; and the
    weights of the rows without extreme contexts.

    A flow hardly learns a density that is much narrower than the rows are without their contexts. If the contexts say
    all, up to the rounding of the rows, there is no density to learn, and a warning says so.
    """
    dim, num = z.shape[1], context.shape[1] + 1
    if len(z) < _ROWS_PER_CONTEXT * num:
        return [], weights
    inputs = torch.cat([context, torch.ones_like(context[:, :1])], 1).double()
    typical = typical_weights(context, weights)
    weighted = inputs if typical is None else typical.double()[:, None] * inputs
    inverse, residuals = torch.linalg.pinv(weighted.mT @ inputs, hermitian=True), z.double()
    solution = torch.zeros(num, dim).to(inputs)
    for _ in range(2):  # the second time removes the rounding of the first
        solution += inverse @ (weighted.mT @ residuals)
        residuals = z - inputs @ solution
    variances, directions = _variances(residuals, typical)
    if variances[0] > _NARROW_GIVEN_CONTEXT:
        return [], weights
    if variances[0] <= _of_rounding(directions, rounding)[0]:
        warnings.warn(
            f"columns {along(directions[:, 0].cpu().numpy())[:10]} of X follow from the context, so that their density "
            "has no bound: drop one of them",
            RuntimeWarning,
            stacklevel=5,
        )
        return [], weights
    layer = ConditionalAffine(dim, num - 1).to(z).requires_grad_(False)
    layer.linear.weight[dim:] = solution[:-1].mT.to(z)
    layer.linear.bias[dim:] = solution[-1].to(z)
    return [layer], typical


def _variances(z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The variances about 0 along the principal directions of rows, in ascending order, and the directions."""
    rows = z.double()
    weights = torch.ones(len(z)).to(rows) if weights is None else weights.to(rows)
    rows = (weights / weights.sum()).sqrt()[:, None] * rows
    # Singular values are precise to the rounding of the rows, and eigenvalues of their products to that of its square.
    r = torch.linalg.qr(torch.cat([rows, torch.zeros(rows.shape[1], rows.shape[1]).to(rows)]), mode="r").R
    _, deviations, directions = torch.linalg.svd(r)
    return deviations.flip(0).square(), directions.mT.flip(1)


def _counted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The rows, with 0 in place of those without weight, which may be infinite in these units."""
    return rows if weights is None else torch.where((weights > 0)[:, None], rows, 0.0)


def _of_rounding(directions: Tensor, rounding: Tensor) -> Tensor:
    """The variance along directions up to which it may be rounding."""
    return (ROUNDINGS * rounding[:, None] * directions).square().sum(0)


def _whitening(z: Tensor, weights: Tensor | None, narrow: float, rounding: Tensor) -> list[TriangularAffine]:
    """The affine map that gives standardized rows their correlations, if some direction is narrow; else nothing.

    Couplings hardly learn such a direction, since it is not along an axis. Where no direction is nearly constant they
    do better in the coordinates of the columns: whitened, iris, wine and breast cancer lose 0.15, 0.5 and 7 nats.
    """
    dim = z.shape[1]
    variances, directions = _variances(z, weights)
    if variances[0] > narrow:
        return []
    tril = triangular_root(directions * torch.maximum(variances, _of_rounding(directions, rounding)).sqrt())
    return [TriangularAffine(dim).to(z).start_at(torch.zeros(dim).to(z), tril)]


def fading_noise(
    flow: Flow,
    columns: Columns,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor | None,
    noise: float,
    num_steps: int,
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    """A function that adds noise to a batch.

    Whole numbers get uniform noise alone. The other columns get normal noise with the covariance of the rows x (of the
    residuals, if a regression on the contexts is a part of the flow), scaled by a factor that falls from `noise` to
    zero in `num_steps` calls. It is added in the standardized coordinates, so that no row leaves the support.
    """
    fixed = [part for part in flow.bijection.parts[1:] if not any(p.requires_grad for p in part.parameters())]
    to_data = Compose([part for part in fixed if not part.context_dim])
    rows = _at(Compose(fixed), context).inv(x)
    weights = typical_weights(rows, weights)
    covariance = _counted(rows, weights).T.cov(aweights=weights)
    variances, directions = torch.linalg.eigh(torch.atleast_2d(covariance))
    factor = directions * variances.clamp(min=0).sqrt()
    steps, is_integer = itertools.count(), torch.from_numpy(columns.is_integer).to(x.device)

    def add(x: Tensor) -> Tensor:
        x = columns.add_noise(x, generator)
        if not noise:
            return x
        size = noise * max(0.0, 1 - next(steps) / num_steps) ** 2
        normal = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return torch.where(is_integer, x, to_data(to_data.inv(x) + size * normal @ factor.T))

    return add
