# SPDX-License-Identifier: Apache-2.0
"""Density zero where Pyro's validation would raise an error, although a distribution may return a finite number."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import reduce

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property

from .relative import plain

# The constraints that compare a number with bounds. All others either hold everywhere, or up to rounding only (as the
# sum of a simplex), or a value that violates them already has the density nan.
_BOUNDS = (
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
    constraints.interval,
    constraints.half_open_interval,
    constraints.integer_interval,
    type(constraints.nonnegative_integer),
    type(constraints.boolean),
)


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
            log_p = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            log_p = torch.where(valid, log_p, -torch.inf)
            site["unscaled_log_prob"] = log_p
            site["log_prob"] = scale_and_mask(log_p, site["scale"], site["mask"])
            site["log_prob_sum"] = site["log_prob"].sum()


def _valid(fn: Distribution, value: Tensor) -> Tensor | None:
    """Which elements of a batch are valid, in a shape that broadcasts. None if no constraint has bounds."""
    if isinstance(fn, (Independent, MaskedDistribution, ExpandedDistribution)):
        valid = _valid(fn.base_dist, value)
        if valid is None:
            return None
        if isinstance(fn, MaskedDistribution):
            return valid | ~torch.as_tensor(fn._mask, device=valid.device)
        if isinstance(fn, Independent):
            return valid.flatten(max(0, valid.dim() - fn.reinterpreted_batch_ndims)).all(-1)
        return valid
    checks = [constraint.check(number) for constraint, number in _constrained(fn, value) if _has_bounds(constraint)]
    return reduce(operator.and_, checks) if checks else None


def _constrained(fn: Distribution, value: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
    """The value and the parameters of a distribution, as in the constructor of torch's, with their constraints."""
    with suppress(NotImplementedError):
        yield fn.support, value
    for name, constraint in fn.arg_constraints.items():
        is_computed = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not is_computed and isinstance(number := getattr(fn, name, None), Tensor):
            yield constraint, number


def _has_bounds(constraint: Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, _BOUNDS)
