# SPDX-License-Identifier: Apache-2.0
"""How good a guide is, by importance sampling."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.ops.stats import fit_generalized_pareto
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..bijections.shapes import of_entries
from ..supports import plain
from .base import GuideBase
from .density import DEFAULT_MEMORY, LogDensity
from .particles import particles_of
from .sites import batch_mask, counts, unconstraining
from .traces import check_argument_names, model_of, run, values_of

_MOST_AT_END = 0.01  # of the draws of a latent, that may be rounded to an end of its support
_FEW_VALUES = 50  # of a latent, with fewer of which the steps between them are a tenth of its standard deviation
_SMALL = 1e-30


@dataclass
class Diagnosis:
    r"""The result of :func:`diagnose`, to be printed. The importance weights are :math:`w_i = p(x, z_i) / q(z_i)`."""

    pareto_k: float
    """Shape of the weights' tail (PSIS; Vehtari et al. 2024): below 0.5 the guide is good, above 0.7 it is not."""
    log_evidence: float
    """log p(x), estimated as the logarithm of the mean weight, in nats."""
    log_evidence_error: float
    """The standard error of the evidence, in nats, which cannot be trusted if k is above 0.7."""
    elbo: float
    """The mean of the logarithms of the weights, in nats; the gap to the evidence is KL(q || p)."""
    effective_sample_size: float
    """The number of draws from the posterior that the weighted draws are worth."""
    log_weights: Tensor
    """The logarithm of the weight of each draw, ``(num_samples,)``."""
    draws: dict[str, Tensor]
    """The guide's draws of each site, ``(num_samples,) + site shape``."""
    num_starts: int | None = None
    """The number of points from which an :class:`AutoRealNVP` has searched for modes; ``None`` for other guides."""
    mode_weights: list[float] | None = None
    """The guide's probability of each mode that was found; ``None`` for other guides."""

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws from the guide's draws in proportion to their weights.

        If k is below 0.7, the result is nearer to the posterior than the guide's own draws.
        """
        chosen = torch.multinomial((self.log_weights - self.log_weights.max()).exp(), num_samples, replacement=True)
        return {name: values[chosen] for name, values in self.draws.items()}

    def __repr__(self) -> str:
        n = len(self.log_weights)
        if self.pareto_k < 0.5:
            verdict = "good"
        elif self.effective_sample_size > 0.9 * n:
            verdict = "the tail of small differences: good, since all weights are nearly equal"
        elif self.pareto_k < 0.7:
            verdict = "usable, with resample()"
        else:
            verdict = "poor: train longer, add couplings, reparametrize the model, or use sample_posterior()"
        return (
            f"pareto k               {self.pareto_k:.2f}, {verdict}\n"
            f"log evidence           {self.log_evidence:.3f} +- {self.log_evidence_error:.3f} nats\n"
            f"ELBO                   {self.elbo:.3f} nats\n"
            f"effective sample size  {self.effective_sample_size:.0f} of {n}"
        ) + self._modes()

    def _modes(self) -> str:
        """The line about the search for modes, which weights alone cannot show to be missing."""
        if self.num_starts is None:
            return ""
        if self.num_starts == 1:
            found = "one start, so other modes would be missed: AutoRealNVP(model, num_starts=16) looks for them"
        elif len(self.mode_weights) == 1:
            found = f"one, to which all of {self.num_starts} starts have led"
        else:
            weights = ", ".join(f"{weight:.3f}" for weight in self.mode_weights)
            found = f"{len(self.mode_weights)}, found from {self.num_starts} starts, with the weights {weights}"
        return f"\nmodes                  {found}"


@torch.no_grad()
def diagnose(
    guide: Callable,
    *args: Any,
    model: Callable | None = None,
    num_samples: int = 2000,
    memory: int = DEFAULT_MEMORY,
    **kwargs: Any,
) -> Diagnosis:
    r"""Measures how good a guide is, by PSIS-k, evidence and effective sample size, from the importance weights
    :math:`w_i = p(x, z_i) / q(z_i),\ z_i \sim q`.

    Args:
        guide: any guide of Pyro, such as an :class:`AutoRealNVP`.
        args, kwargs: the model's arguments, passed on to model and guide. An :class:`AutoRealNVP` is carried over into
            the supports and the coordinates that the model has with them.
        model: the model; only needed for a guide that was not made from one.
        num_samples: the number of draws; PSIS-k wants a thousand or more.
        memory: the bytes that one evaluation of many draws may take.

    Raises:
        ValueError: the model and the guide have different latent sites; the guide gives an entry of a continuous site
            one value only, as :class:`~pyro.infer.autoguide.AutoDelta` does, or one that others determine; a weight is
            nan; the log-density of a draw depends on other draws or on random numbers that are no sites; an argument of
            the model has the name of an option of this function.

    Warns:
        RuntimeWarning: a latent has so few digits near a bound, or between bounds so far apart, that draws are equal.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import AutoRealNVP
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> print(diagnose(AutoRealNVP(model)))  # a normal posterior: the warm start is exact
        pareto k               ..., good
        log evidence           -1.266 +- 0.000 nats
        ELBO                   -1.266 nats
        effective sample size  2000 of 2000
        modes                  one start, so other modes would be missed: ...
    """
    model = model_of(guide, model)
    check_argument_names(model, diagnose, args)
    guide_trace = run(model, guide, args, kwargs)
    density = LogDensity(model, args, kwargs, values=values_of(guide_trace), memory=memory)
    particles = particles_of(guide, density, [])
    if density.has_latents_of_rows:
        raise ValueError(
            "expected plates that show all rows, since rows have latents of their own; got subsamples by the plates "
            f"{sorted(density.plates)}: diagnose the guide with a model and plates without subsample_size"
        )
    # The weights are those of the whole data, so plates that draw subsamples must show all rows.
    if num_samples < 2:
        raise ValueError(f"expected num_samples >= 2; got {num_samples}")
    points, weights = particles.log_weights(num_samples, density.passes(most=None))
    draws = particles.values(points)
    if not isinstance(guide, GuideBase):
        _refuse_point_masses(draws, density, guide_trace)
    _warn_of_rounding(draws, density)
    weights = weights.double()
    if weights.isnan().any() or not weights.isfinite().any():
        raise ValueError(
            f"{int((~weights.isfinite()).sum())} of {num_samples} log-densities are not finite: is the guide trained? "
            "Or do draws come so near to a bound that rounding takes them there? In float64 they do not"
        )
    normalized = weights.softmax(0)
    n = math.log(num_samples)
    return Diagnosis(
        pareto_k=_pareto_k(weights),
        log_evidence=(weights.logsumexp(0) - n).item(),
        log_evidence_error=(normalized * num_samples).std().item() / math.sqrt(num_samples),
        elbo=weights.mean().item(),
        effective_sample_size=1 / normalized.square().sum().item(),
        log_weights=weights,
        draws=draws,
        num_starts=getattr(guide, "num_starts", None),
        mode_weights=guide.mode_weights().tolist() if hasattr(guide, "mode_weights") else None,
    )


def _warn_of_rounding(draws: dict[str, Tensor], density: LogDensity) -> None:
    """Warns of latents with so few digits that draws gather at an end of their support, or at few values."""
    for name, values in draws.items():
        site = density.trace.nodes[name]
        support = of_entries(site["fn"].support)
        # Entries that depend on each other, such as the diagonal of a correlation matrix, may be near an end by right.
        if name not in density.latents or support.is_discrete or support.event_dim or not counts(site):
            continue
        mask = batch_mask(site)
        ordered = (values if mask is None else values[:, mask]).reshape(len(values), -1).sort(0).values
        ordered = ordered[:, ordered[0] != ordered[-1]]  # others are hidden by `obs_mask`
        # Beside 0 there are always enough digits.
        at_end = torch.stack([(ordered == end).sum(0) * (end.abs() > _SMALL) for end in (ordered[0], ordered[-1])])
        num_values = 1 + (ordered.diff(dim=0) != 0).sum(0)
        if (at_end > max(2, _MOST_AT_END * len(values))).any() or (
            num_values < min(_FEW_VALUES, len(values) / 2)
        ).any():
            warnings.warn(
                f"draws of the latent {name!r} gather at an end of its support or at few values, since {values.dtype} "
                "has too few digits there. So this diagnosis and all samples are biased: use float64 "
                "(torch.set_default_dtype), or rescale the latent",
                RuntimeWarning,
                stacklevel=3,
            )


def _coordinates(site: dict[str, Any], values: Tensor) -> Tensor | None:
    """The unconstrained coordinates of N values of a site; None if it is discrete or has only one possible value."""
    fn = site["fn"]
    if fn.support.is_discrete or isinstance(plain(fn), Delta):
        return None
    try:
        return unconstraining(site["name"], fn).inv(values)
    except ValueError:  # a support without coordinates, such as that of definite matrices
        return values


def _refuse_point_masses(draws: dict[str, Tensor], density: LogDensity, guide_trace: Trace) -> None:
    remedy = (
        "A point estimate has no density, and so no importance weights: diagnose a guide that spreads over the "
        "posterior, such as AutoRealNVP or the result of laplace_approximation()"
    )
    num_needed = 0
    for name, values in draws.items():
        site = density.trace.nodes.get(name)
        coordinates = _coordinates(site, values) if name in density.latents and counts(site) else None
        if coordinates is None or not coordinates.numel():
            continue
        constant = (coordinates == coordinates[0]).all(0)
        mask = batch_mask(site)
        if mask is not None:  # of entries that are masked a guide may say anything
            constant = constant[mask]
        num_needed += constant.numel()
        if len(values) > 1 and constant.any():
            raise ValueError(
                f"the guide gives {'the' if constant.all() else 'an entry of the'} site {name!r} the same value in all "
                f"{len(values)} draws. {remedy}"
            )
    sites = [s for s in guide_trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
    fns = [plain(site["fn"]) for site in sites]
    # A factor, or the log-density of a Delta, may be that of draws which are no sites.
    if any(isinstance(fn, Unit) or (isinstance(fn, Delta) and fn.log_density.any()) for fn in fns):
        return
    drawn = [_coordinates(site, site["value"][None]) for site in sites if not site["is_observed"]]
    num_drawn = sum(coordinates.numel() for coordinates in drawn if coordinates is not None)
    if num_drawn < num_needed:
        raise ValueError(
            f"the latent sites have {num_needed} coordinates, and the guide draws only {num_drawn}; the others are "
            f"functions of these. {remedy}"
        )


def _pareto_k(log_weights: Tensor) -> float:
    """The estimate of Pyro's `psis_diagnostic`, from weights that are already known."""
    log_weights = (log_weights - log_weights.max()).sort().values
    num_tail = math.ceil(min(0.2 * len(log_weights), 3 * math.sqrt(len(log_weights))))
    cutoff = max(log_weights[-num_tail - 1].item(), math.log(1e-15))
    tail = log_weights[log_weights > cutoff].exp() - math.exp(cutoff)
    if len(tail) < 10:
        return math.inf
    if tail.max() < 1e-6:  # all weights are equal up to rounding
        return -math.inf
    return float(fit_generalized_pareto(tail)[0])
