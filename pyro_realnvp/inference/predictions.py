# SPDX-License-Identifier: Apache-2.0
"""What draws of a model's latents say about its observations: their log-likelihoods, and new observations."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .agreement import check
from .density import LogDensity
from .mapping import each, join, map_each, map_over, map_points, reason, split, warn_that_it_is_slow

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
        self.observed: dict[str, Tensor] = {
            name: site["value"] for name, site in nodes.items() if _is_observation(site)
        }
        if not self.observed:
            raise ValueError("the model observes nothing: pass the arguments with which it does")
        if self.density.plates:
            raise ValueError(
                f"the plates {list(self.density.plates)} draw subsamples of their rows: pass model= one that has all "
                "rows"
            )

    @torch.no_grad()
    def log_likelihood(self) -> dict[str, Tensor]:
        """The log-likelihood of each observation, ``(N,) + its shape``, in nats.

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
                trace.compute_log_prob()
            return ({name: trace.nodes[name]["log_prob"] for name in self.observed},)

        pieces = split(self.samples, self.density.piece)
        mapped, own = self.density.is_mapped, self.density.own_tensors
        return join([map_over(of_one, piece, mapped, own) for piece in pieces])[0]

    @torch.no_grad()
    def draw(self) -> dict[str, Tensor]:
        """A new draw of each observation for each draw of the latents, ``(N,) + its shape``."""
        model = poutine.uncondition(self.model)

        def of_one(point: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
            with poutine.block(), pyro.validation_enabled(False):
                trace = poutine.trace(poutine.condition(model, point)).get_trace(*self.args, **self.kwargs)
            return ({name: trace.nodes[name]["value"] for name in self.observed},)

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # torch's own
                return join([map_over(of_one, piece, True) for piece in split(self.samples, _PIECE)])[0]
        except Exception as error:  # whatever a model may raise
            warn_that_it_is_slow(f"the model's predictions cannot be mapped over draws ({reason(error)})")
        results = [of_one(point) for point in each(self.samples)]
        return join([map_each(result, lambda value: value.unsqueeze(0)) for result in results])[0]


def _is_observation(site: dict) -> bool:
    """Whether a site is data: neither a factor nor a deterministic site."""
    is_own = site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")
    return is_own and not isinstance(site["fn"], pyro.distributions.Unit)
