# SPDX-License-Identifier: Apache-2.0
"""What draws of a model's latents say about its observations: their log-likelihoods, and new observations."""

import operator
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from .agreement import check
from .density import LogDensity
from .mapping import each, join, map_each, map_over, map_points, reason, split, warn_that_it_is_slow
from .sites import batch_mask
from .validity import apply_validity

_PIECE = 1000  # draws that are evaluated at once


class Predictions:
    """The observations of a model at draws of its latents.

    Args:
        model: the model.
        args, kwargs: its arguments.
        samples: the draws of each latent site, ``(N,) + site shape``.

    Raises:
        ValueError: the model observes nothing, or plates draw subsamples of their rows.
    """

    def __init__(self, model: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], samples: dict[str, Tensor]):
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.samples = samples
        self.density: LogDensity = LogDensity(model, args, kwargs, values=map_points(samples, lambda draws: draws[0]))
        nodes = self.density.trace.nodes
        masks = {name: _mask(site) for name, site in nodes.items() if _is_observation(site)}
        self._masks: dict[str, Tensor | None] = {n: mask for n, mask in masks.items() if mask is None or mask.any()}
        values = {name: nodes[name]["value"].unsqueeze(0) for name in self._masks}
        self.observed: dict[str, Tensor] = {name: value[0] for name, value in self._counted(values).items()}
        if not self.observed:
            raise ValueError("the model observes nothing: pass the arguments with which it does")
        if self.density.plates:
            raise ValueError(
                f"the plates {list(self.density.plates)} draw subsamples of their rows: pass model= one that has all "
                "rows"
            )

    @torch.no_grad()
    def log_likelihood(self) -> dict[str, Tensor]:
        """The log-likelihood of each observation, ``(N,) + its shape``, in nats. ``poutine.scale`` does not count.

        Of a site of which a mask leaves entries out of the density, as ``obs_mask`` does with those that are missing,
        the other entries are the observations, on one axis.

        Raises:
            ValueError: the model sums over discrete latents.
        """
        if self.density.is_enumerated:
            raise ValueError(
                "the model sums over discrete latents, so its observations have no log-likelihoods of their own: sum "
                "over them in the model, as by dist.MixtureSameFamily, or leave out log_likelihood"
            )
        check(self.density, map_points(self.samples, lambda draws: draws[:2]))

        def of_one(point: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
            trace, _ = self.density.run(point)
            with pyro.validation_enabled(False):
                apply_validity(trace, self.density.validated)
                trace.compute_log_prob()
            sites = {name: trace.nodes[name] for name in self._masks}
            return ({n: scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]) for n, site in sites.items()},)

        pieces = split(self.samples, self.density.piece)
        mapped, own = self.density.is_mapped, self.density.own_tensors
        return self._counted(join([map_over(of_one, piece, mapped, own) for piece in pieces])[0])

    @torch.no_grad()
    def draw(self) -> dict[str, Tensor]:
        """A new draw of each observation for each draw of the latents, ``(N,) + its shape``."""
        model = poutine.uncondition(self.model)

        def of_one(point: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
            with poutine.block(), pyro.validation_enabled(False):
                trace = poutine.trace(poutine.condition(model, point)).get_trace(*self.args, **self.kwargs)
            return ({name: trace.nodes[name]["value"] for name in self._masks},)

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # torch's own
                return self._counted(join([map_over(of_one, piece, True) for piece in split(self.samples, _PIECE)])[0])
        except Exception as error:  # whatever a model may raise
            warn_that_it_is_slow(f"the model's predictions cannot be mapped over draws ({reason(error)})")
        results = [of_one(point) for point in each(self.samples)]
        return self._counted(join([map_each(result, lambda value: value.unsqueeze(0)) for result in results])[0])

    def _counted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those entries of each observation that count, of values with an axis of draws."""
        return {n: values[n] if mask is None else values[n][:, mask] for n, mask in self._masks.items()}


def _is_observation(site: dict) -> bool:
    """Whether a site is data: neither a factor nor a deterministic site."""
    is_own = site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")
    return is_own and not isinstance(site["fn"], pyro.distributions.Unit)


def _mask(site: dict) -> Tensor | None:
    """Which elements of the batch of a site the density counts. None for all."""
    fn, masks = site["fn"], [batch_mask(site)]
    shape, device = fn.batch_shape, site["value"].device
    while isinstance(fn, (MaskedDistribution, ExpandedDistribution)):
        if isinstance(fn, MaskedDistribution) and fn._mask is not True:
            masks.append(torch.as_tensor(fn._mask, device=device).expand(shape))
        fn = fn.base_dist
    masks = [mask for mask in masks if mask is not None]
    return reduce(operator.and_, masks) if masks else None
