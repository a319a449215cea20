# SPDX-License-Identifier: Apache-2.0
"""A guide for local latents: an encoder reads the data of each row and gives the context of a flow."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..bijections.compose import Compose
from ..bijections.linear import ConditionalAffine
from ..distributions import Flow
from ..flows import real_nvp
from ..supports import plain
from .base import GuideBase, are_same, quantiles_of
from .density import LogDensity
from .mapping import map_over
from .sites import Rows, Site, batch_mask, unconstraining, unpack


class AmortizedRealNVP(GuideBase, AutoGuide):
    r""":math:`q(z_i \mid x_i)`, an amortized guide: the latents of each row follow a :func:`real_nvp` with the context
    :math:`c_i = \operatorname{encoder}(x_i)`, in unconstrained coordinates.

    All latent sites of the model must lie under the same plates; the guide draws the latents of a row jointly. Since
    the posterior of a row depends only on its own data, the model may subsample rows. Latents outside of the plates
    need another guide. Hide them from this one, as in
    ``AmortizedRealNVP(poutine.block(model, hide=["theta"]), encoder, ...)``, and join both guides in Pyro's
    ``AutoGuideList``.

    What the model masks has no posterior. Rows behind ``poutine.mask`` do not count, and an entry that ``obs_mask``
    observes is drawn from a standard normal, in unconstrained coordinates.

    Train the guide with :func:`fit_guide` or Pyro's ``SVI``.

    Args:
        model: a Pyro model of constant structure, with continuous latents under plates.
        encoder: a module that takes the model's arguments and returns one context for each row of the plates, of shape
            ``plate sizes + (context_dim,)``. If the model subsamples rows, the guide calls the encoder inside of the
            plates, so that the encoder can use ``pyro.subsample``.
        context_dim: the width of the context.
        num_couplings: the number of couplings of the flow.
        hidden_dims: the widths of the hidden layers of each coupling; by default as in :func:`real_nvp`.
        create_plates: a function that takes the model's arguments and makes the plates that subsample rows, as in
            Pyro's guides.

    Raises:
        ValueError: When first called: the model has no latent sites, they do not lie under the same plates, or the
            prior of one is masked in rows whose density depends on it. At every call: the encoder returns contexts of
            another shape.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import fit_guide
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
        >>> x = torch.randn(100, 2)
        >>> guide = AmortizedRealNVP(model, torch.nn.Linear(2, 8), context_dim=8)
        >>> history = fit_guide(guide, x, num_steps=5, progress=False)
        >>> guide(x[:3])["z"].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module,
        *,
        context_dim: int,
        num_couplings: int = 4,
        hidden_dims: Sequence[int] | None = None,
        create_plates: Callable | None = None,
    ):
        super().__init__(model, create_plates=create_plates)
        self.encoder = encoder
        self.context_dim = context_dim
        self._options = {"num_couplings": num_couplings, "hidden_dims": hidden_dims}

    def make_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the flow, whose events are the unconstrained values of all latent sites of a row, side by side."""
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        if not sites:
            raise ValueError("the model has no latent sites, so it needs no guide: check the model and what it hides")
        stacks = {name: tuple(frame.name for frame in site["cond_indep_stack"]) for name, site in sites}
        if len(set(stacks.values())) > 1 or not all(stacks.values()):
            raise ValueError(
                f"expected all latent sites under the same plates; got {stacks}: hide the others, "
                "poutine.block(model, hide=[...]), and give them a guide of their own in an AutoGuideList"
            )
        self._frames = [frame for frame in sites[0][1]["cond_indep_stack"] if frame.vectorized]
        self._sites = {}  # the event of each site in unconstrained coordinates
        self._check_supports(dict(sites))
        for _ in range(8):  # with other values of the latents
            self._check_supports(self._nodes(args, kwargs))
        self._has_bounds: bool = any(isinstance(type(plain(site["fn"])).support, property) for _, site in sites)
        self._arguments = args, kwargs
        for name, site in sites:
            inverse = unconstraining(name, site["fn"]).inv
            value = inverse(site["value"])
            event_dim = value.dim() - site["value"].dim() + site["fn"].event_dim
            self._sites[name] = Site(value.shape[value.dim() - event_dim :])
        self._check_masks(args, kwargs)
        dim = sum(site.size for site in self._sites.values())
        parts = [ConditionalAffine(dim, self.context_dim)]
        if dim > 1:
            parts.insert(0, real_nvp(dim, context_dim=self.context_dim, **self._options))
        self.flow: Flow = Flow(Compose(parts)).to(value)

    def _nodes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: dict[str, Tensor] | None = None
    ) -> dict[str, dict[str, Any]]:
        return LogDensity(self.plain_model, args, kwargs, values=rows, latents=()).trace.nodes

    def _check_supports(self, nodes: Mapping[str, dict[str, Any]]) -> None:
        """Raises an error where the support of a site is not that of the first row of the prototype."""
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            expected, rows = _at_one(name, site)[:1], _at_one(name, nodes[name])
            if rows.requires_grad or not all(torch.allclose(row, expected.to(row)) for row in rows):
                raise ValueError(
                    f"the support of the latent site {name!r} differs from row to row or from call to call, or is "
                    "learned, but the guide is made for rows that come later: draw it on one support, such as "
                    "Uniform(0, 1), and rescale it in the model"
                )

    def _check_masks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises an error where a latent has no prior, because of a mask, and yet the density depends on it."""
        self._unmasked: tuple[tuple, dict] | None = None
        self._are_masks_checked: bool = any(map(_has_mask, self._latents(self._nodes(args, kwargs))))
        if not self._are_masks_checked:
            return
        density = LogDensity(self.plain_model, args, kwargs)
        for name, site in density.sites.items():
            mask = batch_mask(density.trace.nodes[name])
            if mask is not None and (site.mask is None or (site.mask & ~mask).any()):
                raise ValueError(
                    f"the prior of the latent site {name!r} is masked in rows whose density depends on it: mask what "
                    "depends on it, too"
                )

    def _latents(self, nodes: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        return [nodes[name] for name in self._sites]

    def _masks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], plates: Mapping[str, pyro.plate]
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """Which rows the model counts at all, and which of them at each latent site. None for all."""
        unmasked = None, dict.fromkeys(self._sites)
        if self._plain_model is None or are_same(self._unmasked, (args, kwargs)):
            return unmasked
        # Masks may come with any arguments, so the model says which there are.
        nodes = self._nodes(args, kwargs, {name: plate.indices for name, plate in plates.items()})
        if not any(map(_has_mask, self._latents(nodes))):
            self._unmasked = args, kwargs
            return unmasked
        if not self._are_masks_checked:
            self._check_masks(args, kwargs)
        masks = {name: batch_mask(nodes[name]) for name in self._sites}
        if any(mask is None for mask in masks.values()):
            return None, masks
        return torch.stack(torch.broadcast_tensors(*masks.values())).any(0), masks

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
        """The distribution of each row's latents in unconstrained coordinates.

        Args:
            args, kwargs: the model's arguments, passed on to the encoder.
        """
        return self._posterior(self.own("encoder")(*args, **kwargs))

    def _posterior(self, context: Tensor) -> dist.Distribution:
        return self.own("flow")(context)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latent sites and returns their values by name.

        Args:
            args, kwargs: the model's arguments, passed on to the encoder.
        """
        self.build(*args, **kwargs)
        if self._has_bounds and self._plain_model is not None and not are_same(self._arguments, (args, kwargs)):
            self._check_supports(self._nodes(args, kwargs))
            self._arguments = args, kwargs
        encoder = self.own("encoder")
        draws_rows = any(frame.full_size not in (None, frame.size) for frame in self._frames)
        # Plates that subsample rows, come from the caller or are shared in an AutoGuideList must be Pyro's. All other
        # plates get the number of contexts as their size, so that a trained guide takes any number of rows.
        given = draws_rows or self.create_plates is not None or self.master is not None
        if given:
            plates = self._create_plates(*args, **kwargs)
        else:
            context = encoder(*args, **kwargs)
            plates = {
                frame.name: pyro.plate(frame.name, context.shape[frame.dim - 1], dim=frame.dim)
                for frame in self._frames
            }
        counted, masks = self._masks(args, kwargs, plates)
        with ExitStack() as stack:
            for frame in self._frames:
                stack.enter_context(plates[frame.name])
            if counted is not None:
                stack.enter_context(poutine.mask(mask=counted))
            if given:
                context = encoder(*args, **kwargs)
            self._check_context(context, plates)
            posterior = self._posterior(context)
            latent = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
            return dict(self._unpack(latent, masks))

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of each site for the rows of the arguments, ``(num_samples,) + site shape``.

        Args:
            num_samples: the number of draws.
            args, kwargs: the model's arguments. Where the model draws rows, all draws are for the same rows.
        """
        with poutine.block(), poutine.trace() as capture:
            self(*args, **kwargs)
        rows = {name: site["value"] for name, site in capture.trace.nodes.items() if site_is_subsample(site)}

        def draw(_: Tensor) -> tuple[dict[str, Tensor]]:
            with poutine.block(), pyro.validation_enabled(False), Rows(rows):
                return (self(*args, **kwargs),)

        (draws,) = map_over(draw, torch.zeros(num_samples), is_mapped=True)
        return draws

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent for the rows of the arguments, from samples."""
        return {name: v[0] for name, v in self.quantiles([0.5], *args, num_samples=num_samples, **kwargs).items()}

    def quantiles(
        self, quantiles: Sequence[float], *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent for the rows of the arguments, ``(len(quantiles),) + site shape``."""
        return quantiles_of(self.sample(num_samples, *args, **kwargs), quantiles)

    def _check_context(self, context: Tensor, plates: dict[str, pyro.plate]) -> None:
        sizes = {frame.dim: plates[frame.name].subsample_size for frame in self._frames}
        expected = (*(sizes.get(dim, 1) for dim in range(min(sizes), 0)), self.context_dim)
        if context.shape[-len(expected) :] != expected:
            raise ValueError(
                f"expected the encoder to return contexts of shape {expected}, one for each row of the plates "
                f"{[frame.name for frame in self._frames]}; got {tuple(context.shape)}"
            )

    def _unpack(self, latent: Tensor, masks: dict[str, Tensor | None]):
        """Splits the draws of the flow into the sites, and yields each site's name and its value in the model.

        The flow's density is one of unconstrained values, so each site adds the ladj of the inverse transform. What is
        no latent in a row, such as an entry that is observed there, has a standard normal as its density: in the model
        it has none, and the flow would grow without bound.
        """
        for name, part in unpack(latent, self._sites).items():
            site, fn = self._sites[name], self.prototype_trace.nodes[name]["fn"]
            value, ladj = site.constrain(name, fn, site.unpack(part))
            log_density = -ladj
            if masks[name] is not None:
                log_normal = -(part.square() + math.log(2 * math.pi)).sum(-1) / 2
                log_density = torch.where(masks[name], log_density, -log_normal)
            yield name, pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=fn.event_dim))


def _has_mask(site: dict[str, Any]) -> bool:
    return isinstance(site["mask"], Tensor)


def _at_one(name: str, site: dict[str, Any]) -> Tensor:
    """The values of each row at one in unconstrained coordinates, ``(rows,) + event shape``."""
    fn = site["fn"]
    inverse = unconstraining(name, fn).inv
    return inverse.inv(torch.ones_like(inverse(site["value"]))).flatten(0, len(fn.batch_shape) - 1)
