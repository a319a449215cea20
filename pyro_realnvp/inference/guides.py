# SPDX-License-Identifier: Apache-2.0
"""A flow as the guide of a whole model."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median, init_to_sample
from torch import Tensor

from ..bijections.bijection import Bijection
from ..bijections.compose import Compose
from ..flows import real_nvp, spline_flow
from .agreement import seeded
from .all_latents import AllLatents
from .modes import find_modes, mixture_of
from .normals import LARGEST_FULL, isotropic
from .sites import with_fallback
from .warm_start import warm_start

_LARGEST_WIDTH = 128  # of a hidden layer


class AutoRealNVP(AllLatents):
    r"""A RealNVP guide over all latent variables of a model: :math:`z = R(\mu + L\,(m + T f(\epsilon))),\
    \epsilon \sim N(0, 1)`, in unconstrained coordinates.

    :math:`\mu` and L are those of the best normal approximation on the path of Newton's method to a mode, found before
    the first step (a warm start, as in Pathfinder; Zhang et al. 2022). The shift m and T are learned with the flow f
    (:func:`real_nvp`), which starts as the identity. R takes coordinates relative to the prior to those of the model,
    for each latent whose prior has a location or a scale that depends on other latents, such as ``Normal(mu, tau)``
    (:attr:`relative`). So posteriors whose coordinates have scales 1000 apart and correlations of 0.999 need no
    rescaling, hierarchies need no reparametrization, and the flow learns what is left. A single latent dimension,
    which a coupling cannot split, gets a spline.

    Train it with :func:`fit_guide` or Pyro's ``SVI``. The first call builds it, or :meth:`build`, which is needed
    before ``load_state_dict``.

    Args:
        model: a Pyro model of constant structure. Its latents are continuous, or summed over by ``config_enumerate``.
        num_couplings: the number of couplings of the flow.
        hidden_dims: the widths of the hidden layers of each coupling; by default those of :func:`real_nvp`, up to 128.
        init_loc_fn: the function that gives each site its starting value; see Pyro's ``autoguide.initialization``. Flat
            priors, which cannot be drawn from, start at zero in unconstrained coordinates.
        init_scale: the standard deviation of the guide if there is no warm start.
        num_starts: the number of points from which the warm start searches, of which all but the first are draws of the
            prior. If they lead to several modes, a mixture of normals, one for each of these, takes the place of
            :math:`N(0, 1)`. Its weights are learned.
        full: whether L and T are triangular matrices. Otherwise T is diagonal, and so is L except in a few directions.
            By default up to 100 dimensions.
        warm_start: whether to search for the normal approximation and for relative coordinates. By default always,
            except in an ``AutoGuideList``, where a guide does not see all latents.
        init_flow_fn: a function of the number of dimensions that makes another bijection in place of the RealNVP.

    Raises:
        ValueError: the log-density at the start is not finite; a latent is discrete and not summed over, has no
            unconstrained coordinates, or lies under a subsampled plate (see :class:`AmortizedRealNVP`); with a warm
            start, the log-density of a draw depends on random numbers that are no sites.
        RuntimeError: a state is loaded into a guide that is not built.

    Warns:
        RuntimeWarning: the log-density does not change along a direction of the latents, cannot be differentiated
            twice, or cannot be mapped over draws.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import fit_guide
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoRealNVP(model)
        >>> history = fit_guide(guide, torch.randn(50), num_steps=20, progress=False)
        >>> guide.median()["scale"].shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_couplings: int = 8,
        hidden_dims: Sequence[int] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        num_starts: int = 1,
        full: bool | None = None,
        warm_start: bool | None = None,
        init_flow_fn: Callable[[int], Bijection] | None = None,
    ):
        super().__init__(model, init_loc_fn=init_loc_fn)
        if not init_scale > 0:
            raise ValueError(f"expected init_scale > 0; got {init_scale}")
        if not num_starts >= 1:
            raise ValueError(f"expected num_starts >= 1; got {num_starts}")
        self.num_starts = num_starts
        self.init_scale = init_scale
        self.full = full
        self.warm_start = warm_start
        self._options = {"num_couplings": num_couplings, "hidden_dims": hidden_dims}
        self._init_flow_fn = init_flow_fn

    def mark_trained(self) -> None:
        self.fitted.fill_(1.0)
        self._put_buffers_into_store()

    @property
    def is_trained(self) -> bool:
        """Whether :func:`fit_guide` has trained the guide, or another optimizer has changed it."""
        if self.prototype_trace is None:
            return False
        affine = self.own("transform").parts[-1]
        return bool(self._buffers["fitted"]) or any(p.any() for p in affine.parameters())

    def make_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        density = self.look(args, kwargs)
        start = self._init_loc()
        found = modes = None
        if self.master is None if self.warm_start is None else self.warm_start:
            found = warm_start(density, start, self.init_scale)
        self.is_warm: bool = found is not None
        normal = found.normal if found else isotropic(start, self.init_scale)
        if found and self.num_starts > 1:
            points = seeded(lambda: self._dispersed(args, kwargs, self.num_starts - 1))
            modes = seeded(lambda: find_modes(density, found, points, self.init_scale))
            normal = modes.normals[0]
        self.keep_coordinates(density)
        self.register_buffer("fitted", torch.tensor(0.0))  # a float, so that averages of buffers work
        if self._init_flow_fn:
            flow = self._init_flow_fn(self.latent_dim)
        else:
            flow = self._make_flow(self.latent_dim)
        full = self.latent_dim <= LARGEST_FULL if self.full is None else self.full
        affine = normal.bijection(full)
        if modes and len(modes.normals) > 1:
            self.mixture, affine = mixture_of(modes, full)
            self.mixture.to(start)
        self.transform: Compose = Compose([flow.to(start), affine.to(start)])

    def _dispersed(self, args: tuple[Any, ...], kwargs: dict[str, Any], num: int) -> Tensor:
        """Draws from the prior, in plain unconstrained coordinates."""
        points = []
        for _ in range(num):
            with poutine.block(), InitMessenger(with_fallback(init_to_sample)):
                trace = poutine.trace(self.plain_model).get_trace(*args, **kwargs)
            points.append(self._init_loc(trace.nodes))
        return torch.stack(points)

    def mode_weights(self) -> Tensor:
        """The probability of each mode that the starts have led to, ``(num_modes,)``."""
        self._check_built()
        if "mixture" not in self._modules:
            return torch.ones(1)
        return self.own("mixture")().mixture_distribution.probs.detach()

    def _make_flow(self, dim: int) -> Bijection:
        if dim == 1:
            return spline_flow()
        options = self._options
        if options["hidden_dims"] is None:
            options = options | {"hidden_dims": [min(max(32, 2 * dim), _LARGEST_WIDTH)] * 2}
        return real_nvp(dim, **options)

    def get_base_dist(self) -> dist.Distribution:
        """A standard normal, ``(latent_dim,)``, or the mixture of several modes."""
        self._check_built()
        if "mixture" in self._modules:
            return self.own("mixture")()
        like = self._modules["transform"].parts[-1].start_loc
        return dist.Normal(torch.zeros_like(like), torch.ones_like(like), validate_args=False).to_event(1)
