# SPDX-License-Identifier: Apache-2.0
"""From coordinates relative to the priors to plain unconstrained coordinates."""

import torch
from torch import Tensor

from ..bijections.bijection import Bijection
from .density import LogDensity
from .mapping import map_over
from .sites import unpack


class FromRelative(Bijection):
    """t = m + s u for each latent whose prior depends on other latents (:class:`Relative`), and t = u for the others.

    The model is run to find the priors, so each direction takes one run of the model for each point.
    """

    def __init__(self, density: LogDensity):
        super().__init__((density.dim,))
        self.density = density

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self._forward_one, x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self._inverse_one, y)

    def _map(self, function, points: Tensor) -> tuple[Tensor, Tensor]:
        rows, density = points.reshape(-1, points.shape[-1]), self.density
        is_mapped = density.is_mapped and not torch.jit.is_tracing()  # which knows nothing of mapped tensors
        (results,) = map_over(function, rows, is_mapped, density.own_tensors)
        return results["point"].reshape(points.shape), results["ladj"].reshape(points.shape[:-1])

    def _forward_one(self, point: Tensor) -> tuple[dict[str, Tensor]]:
        _, place = self.density.run(point)
        parts = [site.pack(place.unconstrained[name]) for name, site in self.density.sites.items()]
        return self._result(parts, place.relative_ladjs)

    def _inverse_one(self, point: Tensor) -> tuple[dict[str, Tensor]]:
        density = self.density
        trace, place = density.run(point, relative={})
        parts, ladjs = unpack(point, density.sites), {}
        for name, relative in density.relative.items():
            site = density.sites[name]
            u, ladj = relative.inverse(trace.nodes[name]["fn"], place.unconstrained[name])
            parts[name], ladjs[name] = site.pack(u), site.counted(ladj)
        return self._result(list(parts.values()), ladjs)

    def _result(self, parts: list[Tensor], ladjs: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
        ladj = sum((ladj.sum() for ladj in ladjs.values()), parts[0].new_zeros(()))
        return ({"point": torch.cat(parts), "ladj": ladj},)
