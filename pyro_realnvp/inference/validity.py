# SPDX-License-Identifier: Apache-2.0
"""Density zero where Pyro's validation would raise an error, although a distribution may return a finite number."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import reduce

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, MaskedMixture
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property

from ..bijections.shapes import of_entries, sum_events
from ..distributions import FlowDistribution
from ..supports import plain

# Formulas return nan for nan, and the Cholesky decomposition fails where a matrix is not positive definite. Checks of
# symmetric matrices and of correlations compare up to rounding, which a valid model may exceed.
_UNCHECKED = (
    type(constraints.real),
    type(constraints.dependent),
    type(constraints.square),  # the symmetric and the definite matrices, too
    type(constraints.corr_cholesky),
)
_ROUNDING = 1e-3  # of a sum of probabilities


def is_validated(fn: Distribution) -> bool:
    """Whether Pyro would validate the values of a site. A user may switch this off, as with ``validate_args=False``."""
    return bool(getattr(plain(fn), "_validate_args", False))


def apply_validity(trace: Trace, names: Iterable[str]) -> None:
    """Computes the log-probabilities of these sites, which are -inf where their values or parameters are invalid.

    Pyro computes those of the other sites, and takes these as they are.

    A draw of the latents may put an observation out of the support of its distribution, as in
    ``Exponential(1.0), obs=y - shift``, or make a parameter invalid. Pyro's validation would raise an error for all
    draws, and without it some distributions, such as Exponential and Gamma, go on with a number.
    """
    for name in names:
        site = trace.nodes.get(name)
        valid = None if site is None else _valid(site["fn"], site["value"])
        if valid is not None:
            fn, value = site["fn"], site["value"]
            if isinstance(plain(fn), MixtureSameFamily):
                log_p = _log_prob_of_mixture(fn, value)
            else:
                log_p = fn.log_prob(value, *site["args"], **site["kwargs"])
            log_p = torch.where(_within(valid, log_p.shape), log_p, -torch.inf)
            site["unscaled_log_prob"] = log_p
            site["log_prob"] = scale_and_mask(log_p, site["scale"], site["mask"])
            site["log_prob_sum"] = site["log_prob"].sum()


def _log_prob_of_mixture(fn: Distribution, value: Tensor) -> Tensor:
    """The log-density of a mixture, in its wrappers. Torch adds the formulas of all components, also of those that have
    no density there."""
    if isinstance(fn, Independent):
        return sum_events(_log_prob_of_mixture(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return scale_and_mask(_log_prob_of_mixture(fn.base_dist, value), mask=fn._mask)
    if isinstance(fn, ExpandedDistribution):
        log_p = _log_prob_of_mixture(fn.base_dist, value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, fn.batch_shape))
    components, padded = fn.component_distribution, fn._pad(value)
    valid = _valid_value(components, padded)
    if valid is None:
        return fn.log_prob(value)
    log_p = components.log_prob(padded)
    log_p = torch.where(valid, log_p, torch.finfo(log_p.dtype).min)
    return (log_p + fn.mixture_distribution.logits.log_softmax(-1)).logsumexp(-1)


def _valid(fn: Distribution, value: Tensor) -> Tensor | None:
    """Which elements of a batch have valid values and parameters. None if there is nothing to check."""
    return _both(_valid_value(fn, value), _valid_parameters(fn))


def _valid_value(fn: Distribution, value: Tensor) -> Tensor | None:
    if isinstance(fn, FlowDistribution):  # says by itself where it has no density
        return None
    if isinstance(fn, MaskedDistribution):
        return _where_counted(fn, _valid_value(fn.base_dist, value))
    if isinstance(fn, ExpandedDistribution):
        return _valid_value(fn.base_dist, value)
    if isinstance(fn, Independent):
        return _all(_valid_value(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MixtureSameFamily):
        # Torch's support is where all components have a density, and not where one of them has.
        valid = _valid_value(fn.component_distribution, fn._pad(value))
        return None if valid is None else valid.any(-1)
    if isinstance(fn, MaskedMixture):
        return _chosen(fn, _valid_value(fn.component0, value), _valid_value(fn.component1, value))
    valid = None
    with suppress(NotImplementedError):
        valid = _all(_check(fn.support, value), len(fn.event_shape) - fn.support.event_dim)
    # A class with a formula of its own, such as Gumbel, does not ask its base, which rounding may leave.
    asks_base = getattr(type(fn), "log_prob", None) is TransformedDistribution.log_prob
    if asks_base and _is_checked(plain(fn.base_dist).support):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        of_base = _valid_value(fn.base_dist, value)
        valid = _both(valid, _all(of_base, len(fn.event_shape) - len(fn.base_dist.event_shape)))
    return valid


def _valid_parameters(fn: Distribution) -> Tensor | None:
    """Which elements have valid parameters, also those of the distributions that a distribution is made of."""
    if isinstance(fn, FlowDistribution):
        return None
    if isinstance(fn, MaskedDistribution):
        return _where_counted(fn, _valid_parameters(fn.base_dist))
    if isinstance(fn, MaskedMixture):
        return _chosen(fn, _valid_parameters(fn.component0), _valid_parameters(fn.component1))
    shape = fn.batch_shape
    valid = reduce(_both, (_check(*pair, shape) for pair in _parameters(fn)), None)
    for part in vars(fn).values():
        if isinstance(part, Distribution) and (of_part := _valid_parameters(part)) is not None:
            of_part = of_part.expand(part.batch_shape)
            is_inner = len(part.batch_shape) > len(shape) and part.batch_shape[: len(shape)] == shape
            valid = _both(valid, _all(of_part, of_part.dim() - len(shape)) if is_inner else _within(of_part, shape))
    return valid


def _where_counted(fn: MaskedDistribution, valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid | ~torch.as_tensor(fn._mask, device=valid.device)


def _chosen(fn: MaskedMixture, valid0: Tensor | None, valid1: Tensor | None) -> Tensor | None:
    """The answer of the component that each element takes."""
    if valid0 is None and valid1 is None:
        return None
    everywhere = torch.ones_like(fn.mask)
    return torch.where(fn.mask, everywhere if valid1 is None else valid1, everywhere if valid0 is None else valid0)


def _both(valid: Tensor | None, other: Tensor | None) -> Tensor | None:
    if valid is None or other is None:
        return other if valid is None else valid
    return valid & other


def _parameters(fn: Distribution) -> Iterator[tuple[Constraint, Tensor]]:
    """The parameters of a distribution that torch's own constructor would check, with their constraints."""
    for name, constraint in fn.arg_constraints.items():
        is_computed = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not is_computed and isinstance(number := getattr(fn, name, None), Tensor):
            yield constraint, number


def _check(constraint: Constraint, number: Tensor, shape: torch.Size | None = None) -> Tensor | None:
    """Where a constraint holds. A parameter of events has no axis for them in its constraint; one check is for all."""
    if not _is_checked(constraint):
        return None
    if constraint is constraints.simplex:
        valid = (number >= 0).all(-1) & ((number.sum(-1) - 1).abs() < _ROUNDING)
    else:
        valid = constraint.check(number)
    return valid if shape is None else _within(valid, shape)


def _is_checked(constraint: Constraint) -> bool:
    return not isinstance(of_entries(constraint), _UNCHECKED)


def _all(valid: Tensor | None, event_dim: int) -> Tensor | None:
    """Whether all entries of an event are valid."""
    if valid is None or event_dim <= 0:
        return valid
    return valid.flatten(max(0, valid.dim() - event_dim)).all(-1)


def _within(valid: Tensor, shape: torch.Size) -> Tensor:
    """`valid`, if it broadcasts to the shape; otherwise one answer for the whole batch."""
    sizes = zip(reversed(valid.shape), reversed(shape))
    fits = valid.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in sizes)
    return valid if fits else valid.all()
