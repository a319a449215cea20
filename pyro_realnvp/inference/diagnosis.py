# SPDX-License-Identifier: Apache-2.0
"""How good a guide is, by importance sampling."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from .traces import can_vectorize, check_argument_names, latents, model_of, plate_nesting, run


@dataclass
class Diagnosis:
    r"""The outcome of :func:`diagnose`; ``print`` it. The importance weights are :math:`w_i = p(x, z_i) / q(z_i)`."""

    pareto_k: float
    """Shape of the weights' tail (PSIS; Vehtari et al. 2024): below 0.5 the guide is good, above 0.7 it is not."""
    log_evidence: float
    """log p(x), estimated as the logarithm of the mean weight, in nats."""
    log_evidence_error: float
    """Its standard error, in nats; not to be trusted where k is above 0.7."""
    elbo: float
    """The mean of the logarithms of the weights, in nats; the gap to the evidence is KL(q || p)."""
    effective_sample_size: float
    """How many draws from the posterior the weighted draws are worth."""
    log_weights: Tensor
    """Of each draw, ``(num_samples,)``."""
    draws: dict[str, Tensor]
    """The guide's draws of each site, ``(num_samples,) + site shape``."""

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws nearer to the posterior than the guide's own, by importance resampling, where k is below 0.7."""
        chosen = torch.multinomial((self.log_weights - self.log_weights.max()).exp(), num_samples, replacement=True)
        return {name: values[chosen] for name, values in self.draws.items()}

    def __str__(self) -> str:
        n = len(self.log_weights)
        # Weights that are nearly equal are good, whatever the tail of what little is left.
        good = self.pareto_k < 0.5 or self.effective_sample_size > 0.9 * n
        verdict = "good" if good else "usable, with resample()" if self.pareto_k < 0.7 else "poor"
        remedy = ": train longer, add couplings, reparametrise the model, or use neutra()" if verdict == "poor" else ""
        return (
            f"pareto k               {self.pareto_k:.2f}, {verdict}{remedy}\n"
            f"log evidence           {self.log_evidence:.3f} +- {self.log_evidence_error:.3f} nats\n"
            f"ELBO                   {self.elbo:.3f} nats\n"
            f"effective sample size  {self.effective_sample_size:.0f} of {n}"
        )


@torch.no_grad()
def diagnose(guide: Callable, *args, model: Callable | None = None, num_samples: int = 2000, **kwargs) -> Diagnosis:
    r"""Says how good a guide is: PSIS-k, evidence, effective sample size, from weights
    :math:`w_i = p(x, z_i) / q(z_i),\ z_i \sim q`.

    Args:
        guide: any guide of Pyro, such as an :class:`AutoRealNVP`.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; known for guides made from one.
        num_samples: draws; PSIS-k wants a thousand or more.

    Raises:
        ValueError: latent sites that only the model or the guide has; weights that are nan; an argument of
            the model that has the name of an option of this function.

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
    """
    model = model_of(guide) if model is None else model
    check_argument_names(model, diagnose, args)
    model_trace, guide_trace = run(model, guide, args, kwargs)
    names = sorted(latents(model_trace))
    shapes = {name: model_trace.nodes[name]["value"].shape for name in names}
    nesting = plate_nesting(model_trace, guide_trace)
    if can_vectorize(model, guide, nesting, args, kwargs):
        weights, model_trace, _ = vectorized_importance_weights(
            model, guide, *args, num_samples=num_samples, max_plate_nesting=nesting, **kwargs
        )
        draws = {name: model_trace.nodes[name]["value"].reshape(num_samples, *shapes[name]) for name in names}
    else:
        pairs = [run(model, guide, args, kwargs) for _ in range(num_samples)]
        weights = torch.stack([p.log_prob_sum() - q.log_prob_sum() for p, q in pairs])
        draws = {name: torch.stack([p.nodes[name]["value"] for p, _ in pairs]) for name in names}
    weights = weights.double()
    if weights.isnan().any() or not weights.isfinite().any():
        raise ValueError(
            f"{int((~weights.isfinite()).sum())} of {num_samples} log-densities are not finite: is the guide trained?"
        )
    normalised = weights.softmax(0)
    n = math.log(num_samples)
    return Diagnosis(
        pareto_k=_pareto_k(weights),
        log_evidence=(weights.logsumexp(0) - n).item(),
        log_evidence_error=(normalised * num_samples).std().item() / math.sqrt(num_samples),
        elbo=weights.mean().item(),
        effective_sample_size=1 / normalised.square().sum().item(),
        log_weights=weights,
        draws=draws,
    )


def _pareto_k(log_weights: Tensor) -> float:
    """As Pyro's `psis_diagnostic`, of weights that are there already."""
    log_weights = (log_weights - log_weights.max()).sort().values
    num_tail = math.ceil(min(0.2 * len(log_weights), 3 * math.sqrt(len(log_weights))))
    cutoff = max(log_weights[-num_tail - 1].item(), math.log(1e-15))
    tail = log_weights[log_weights > cutoff].exp() - math.exp(cutoff)
    if len(tail) < 10:
        return math.inf
    if tail.max() < 1e-6:  # all weights are equal, up to rounding
        return -math.inf
    return float(fit_generalized_pareto(tail)[0])
