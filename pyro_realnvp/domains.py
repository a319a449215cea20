# SPDX-License-Identifier: Apache-2.0
"""Whether a base has its values in the domain of a bijection."""

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from .bases import MixtureBase, entries_of
from .bijections.shapes import Region, bounds, covers, is_limited, of_entries
from .supports import plain

_NUM_DRAWS = 256


def check_domain(
    domain: constraints.Constraint, base: "dist.Distribution | MixtureBase", temperature: float = 1.0
) -> None:
    """Raises an error if a base is discrete or, scaled about its mean, has values beyond the domain of a bijection."""
    support = constraints.real if isinstance(base, MixtureBase) else entries_of(base)
    if support.is_discrete:
        raise ValueError(
            f"expected a base of real numbers; got {type(plain(base)).__name__}, whose probabilities are no density: "
            "for integer pixels take a DequantizedFlow"
        )
    if not is_limited(domain):
        return
    if isinstance(base, MixtureBase):
        beyond = True
    elif isinstance(domain, Region) or _may_be_narrower(base):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            draws = base.sample((_NUM_DRAWS,))
            beyond = not domain.check(draws if temperature == 1 else torch.lerp(base.mean, draws, temperature)).all()
    else:
        own = bounds(support)
        if temperature != 1:
            ends = [end if bound is None else bound for bound, end in zip(own, (-torch.inf, torch.inf))]
            own = tuple(base.mean + temperature * (end - base.mean) for end in ends)
        beyond = not covers(bounds(domain), own)
    if beyond:
        remedy = "take one with such values, or the inverse of the bijection (is an .inv missing?)"
        raise ValueError(
            f"expected a base with values in {of_entries(domain)}, which the bijection takes; got {support}"
            + (f" at temperature={temperature}: take a lower one" if temperature != 1 else f": {remedy}")
        )


def _may_be_narrower(base: dist.Distribution) -> bool:
    """Whether torch may declare a support that is larger than it is: the codomain of the last of several transforms."""
    return isinstance(plain(base), dist.TransformedDistribution) and of_entries(base.support) is constraints.real
