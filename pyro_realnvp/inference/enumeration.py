# SPDX-License-Identifier: Apache-2.0
"""Sums over discrete latents, for many draws at once."""

import string
from collections import OrderedDict
from typing import NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class Enumerate(EnumMessenger):
    """Pyro's handler of enumeration, for use inside of `torch.func.vmap`, where tensors have no ``.data``."""

    def _pyro_post_sample(self, msg: dict) -> None:
        value = msg["value"]
        if not isinstance(msg["fn"], TorchDistributionMixin) or value is None:
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        dims = msg["infer"].setdefault("_dim_to_id", {})
        dims.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {d: i for d, i in dims.items() if len(shape) >= -d and shape[d] > 1}


class Factor(NamedTuple):
    """What a factor of the density depends on."""

    axes: str
    """The names of its axes, one letter each."""
    plates: frozenset[str]
    """Those of the names that are plates."""
    is_summed: bool
    """Whether it depends on a discrete site, and is therefore a factor inside of a sum."""


def factors(trace: Trace) -> tuple[list[Factor], float, list[Tensor]]:
    """What the factors of one draw's density depend on, the scale of those inside of sums, and all their logarithms.

    As in Pyro's ``TraceEnum_ELBO``, masks are applied inside of the sums, and the scale of subsampling outside.

    Raises:
        ValueError: the factors inside of sums have different scales.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
    plates = set(trace.plate_to_symbol.values())
    found, terms, scales = [], [], set()
    for site in sites:
        own = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        log_prob = site["packed"]["log_prob"]
        is_summed = not plates.issuperset(log_prob._pyro_dims)
        if is_summed:
            # A masked site that is enumerated keeps its probabilities, which sum to 1 instead of counting states.
            mask = None if "_enumerate_dim" in site["infer"] else site["packed"]["mask"]
            log_prob = packed.scale_and_mask(site["packed"]["unscaled_log_prob"], mask=mask)
            scale = torch.as_tensor(site["scale"])
            if scale.numel() > 1:
                raise ValueError(
                    f"expected one number as the scale of the site {site['name']!r}, which depends on enumerated ones; "
                    f"got shape {tuple(scale.shape)}: Pyro's enumeration supports only scalars in poutine.scale"
                )
            scales.add(scale.item())
        found.append(Factor(log_prob._pyro_dims, own, is_summed))
        terms.append(log_prob)
    if len(scales) > 1:
        raise ValueError(
            f"the sites that depend on enumerated ones have the scales {sorted(scales)}; expected one: put them under "
            "the same subsampled plates"
        )
    return found, scales.pop() if scales else 1.0, terms


def total(found: list[Factor], scale: float, terms: list[Tensor]) -> Tensor:
    """log p of each draw, ``(N,)``, from the logarithms of the factors, each with the draws as its leftmost axis."""
    draws = next(letter for letter in string.ascii_letters if not any(letter in factor.axes for factor in found))
    inside: OrderedDict = OrderedDict()
    parts = []
    for factor, term in zip(found, terms):
        if not factor.is_summed:
            parts.append(term.reshape(len(term), -1).sum(1))
            continue
        term = term.view_as(term)  # a new object, since the names of the axes are an attribute of the tensor
        term._pyro_dims = draws + factor.axes
        inside.setdefault(factor.plates | {draws}, []).append(term)
    if inside:
        plates = frozenset().union(*(factor.plates for factor in found))
        summed = set().union(*(factor.axes for factor in found if factor.is_summed)) - plates
        parts.append(scale * contract_to_tensor(inside, summed, target_ordinal=frozenset(draws)))
    return torch.stack(parts).sum(0)
