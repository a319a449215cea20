# SPDX-License-Identifier: Apache-2.0
"""The log-density of a model in the coordinates in which its guide draws."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import IndependentTransform, Transform

from .agreement import check
from .base import GuideBase
from .density import DEFAULT_MEMORY, LogDensity
from .particles import frozen
from .subsampling import Pass
from .traces import check_argument_names, model_of, run, values_of


def never_finite(num_draws: int) -> ValueError:
    """The error of a sampler that finds no start."""
    return ValueError(
        f"the log-density is not finite at any of {num_draws} draws of the guide: train the guide, or check the "
        "model's supports and data"
    )


class PulledBack:
    r""":math:`\log p(x, T(\epsilon)) + \log|\det \partial T / \partial \epsilon|` of a model and a guide
    :math:`z = T(\epsilon),\ \epsilon \sim p_0`.

    If plates draw subsamples of their rows, each evaluation sees all rows.

    Args:
        function: the public function that was called, whose options the model's arguments must not have as names.
        guide: a trained guide with a transform.
        args, kwargs: the model's arguments.
        model: the model; only needed for a guide that was not made from one.
        memory: the bytes that one evaluation of many draws may take.

    Raises:
        RuntimeError: the guide is not trained.
        ValueError: the log-density of a draw depends on random numbers that are no sites; an argument of the model has
            the name of an option of the function.
        TypeError: the guide has no transform.
    """

    def __init__(
        self,
        function: Callable,
        guide: AutoContinuous,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        model: Callable | None,
        memory: int = DEFAULT_MEMORY,
    ):
        no_transform = TypeError(f"expected a guide with a transform, such as AutoRealNVP; got {type(guide).__name__}")
        if not isinstance(guide, AutoContinuous):
            raise no_transform
        if guide.prototype_trace is None or not getattr(guide, "is_trained", True):
            raise RuntimeError("the guide is not trained: call fit_guide(guide, *args) first")
        self.guide = guide
        self.model: Callable = model_of(guide, model)
        check_argument_names(self.model, function, args)
        values = values_of(run(self.model, guide, args, kwargs))
        self.density: LogDensity = LogDensity(self.model, args, kwargs, values=values, memory=memory)
        try:
            self.base: TorchDistribution = guide.get_base_dist()
        except NotImplementedError:  # as in AutoLowRankMultivariateNormal
            raise no_transform from None
        if isinstance(guide, GuideBase) and guide.draws_all_at_once:
            guide.set_coordinates(self.density)
            self.transform: Transform = guide.own("transform")
        else:
            self.transform = guide.get_transform(*args, **kwargs)
            if self.transform.domain.event_dim == 0:  # elementwise, as of AutoDiagonalNormal
                self.transform = IndependentTransform(self.transform, 1)
        if self.density.dim != self.base.event_shape[0]:
            raise ValueError(
                f"the guide draws {self.base.event_shape[0]} numbers, and the model has {self.density.dim} latents "
                "(entries that poutine.mask takes out of the density are none): use AutoRealNVP"
            )
        with torch.no_grad():
            check(self.density, self.transform(self.base.sample((2,))))
        self.passes: list[Pass] = self.density.passes(most=None)

    def frozen(self) -> AbstractContextManager[None]:
        """Within it, only the draws have gradients, and not the guide's parameters."""
        return frozen(self.guide.parameters())

    def one(self, noise: Tensor) -> Tensor:
        """The log-density at one point of the base, ``(D,)``, with its graph."""
        latent = self.transform(noise)
        log_p = sum(weight * self.density.one(latent, rows) for weight, rows in self.passes)
        return (log_p + self.transform.log_abs_det_jacobian(noise, latent)).to(noise)

    def __call__(self, noise: Tensor) -> Tensor:
        """The log-densities at many points of the base, ``(N, D)``."""
        latent = self.transform(noise)
        log_p = self.density.mean_over(latent, self.passes)
        return (log_p + self.transform.log_abs_det_jacobian(noise, latent)).to(noise)

    @torch.enable_grad()
    def with_gradient(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The log-densities at many points of the base, ``(N,)``, and their gradients, ``(N, D)``, without a graph."""
        noise = noise.detach().requires_grad_()
        log_p = self(noise)
        (gradient,) = torch.autograd.grad(log_p.sum(), noise)
        return log_p.detach(), gradient

    @torch.no_grad()
    def constrain(self, noise: Tensor) -> dict[str, Tensor]:
        """The values of each latent site at many points of the base, ``(N, D)``."""
        return self.density.constrain(self.transform(noise))[0]
