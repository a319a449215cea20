# SPDX-License-Identifier: Apache-2.0
"""A flow as the guide of a whole model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from ..bijections.bijection import Bijection
from ..bijections.compose import Compose
from ..distributions import FlowDistribution
from ..flows import real_nvp, spline_flow
from .base import GuideBase, quantiles_of
from .coordinates import FromRelative
from .density import LogDensity
from .mapping import map_each
from .normals import LARGEST_FULL, isotropic
from .relative import Relative
from .sites import find_sites, unconstraining, unpack, with_fallback
from .warm_start import warm_start

_LARGEST_WIDTH = 128  # of a hidden layer


class AutoRealNVP(GuideBase, AutoContinuous):
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

    draws_all_at_once = True

    def __init__(
        self,
        model: Callable,
        *,
        num_couplings: int = 8,
        hidden_dims: Sequence[int] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        full: bool | None = None,
        warm_start: bool | None = None,
        init_flow_fn: Callable[[int], Bijection] | None = None,
    ):
        super().__init__(model, init_loc_fn=with_fallback(init_loc_fn))
        if not init_scale > 0:
            raise ValueError(f"expected init_scale > 0; got {init_scale}")
        self.init_scale, self.full, self.warm_start = init_scale, full, warm_start
        self._options = {"num_couplings": num_couplings, "hidden_dims": hidden_dims}
        self._init_flow_fn = init_flow_fn
        self._arguments: tuple[tuple, dict] | None = None

    def build(self, *args, **kwargs) -> "AutoRealNVP":
        """Looks at the model and makes the parameters. Returns the guide itself.

        Args:
            args, kwargs: the model's arguments.
        """
        is_new = self.prototype_trace is None
        super().build(*args, **kwargs)
        if is_new and self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam reads them
        return self

    def mark_trained(self) -> None:
        self.fitted.fill_(True)
        self._put_buffers_into_store()

    @property
    def is_trained(self) -> bool:
        """Whether :func:`fit_guide` has trained the guide, or another optimizer has changed it."""
        if self.prototype_trace is None:
            return False
        affine = self.own("transform").parts[-1]
        return bool(self._buffers["fitted"]) or any(p.any() for p in affine.parameters())

    def _setup_prototype(self, *args, **kwargs):
        self._arguments = args, kwargs
        with poutine.block(), torch.random.fork_rng():
            # This raises errors that say what cannot be a latent.
            find_sites(poutine.trace(self.model).get_trace(*args, **kwargs))
        super()._setup_prototype(*args, **kwargs)

    def make_parameters(self, args: tuple, kwargs: dict) -> None:
        for name, frames in self._cond_indep_stacks.items():
            for frame in frames:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"latent site {name!r} lies under the plate {frame.name!r}, of which {frame.size} of "
                        f"{frame.full_size} rows are drawn: its values would be shared between rows. Use "
                        "AmortizedRealNVP for it, or make the plate without subsampling"
                    )
        values = {name: site["value"] for name, site in self.prototype_trace.iter_stochastic_nodes()}
        density = LogDensity(self.plain_model, args, kwargs, values=values)
        density.check_finite()
        self.sites, self.latent_dim = density.sites, density.dim
        start = self._init_loc()
        # A part of a list of guides cannot see what the other parts draw.
        self._has_dynamic_supports = self.master is None and self._find_dynamic_supports(density, start)
        normal = None
        if self.master is None if self.warm_start is None else self.warm_start:
            normal = warm_start(density, start, self.init_scale)
        self.is_warm = normal is not None
        normal = normal or isotropic(start, self.init_scale)
        self._is_mapped = density.is_mapped
        self._relative_names = list(density.relative)
        for name in ("precision", "shift"):
            pieces = [getattr(relative, name).reshape(-1) for relative in density.relative.values()]
            self.register_buffer(f"relative_{name}", torch.cat([start.new_zeros(0), *pieces]).to(start))
        self.register_buffer("fitted", torch.tensor(False))
        if self._init_flow_fn:
            flow = self._init_flow_fn(self.latent_dim)
        else:
            flow = self._make_flow(self.latent_dim)
        full = self.latent_dim <= LARGEST_FULL if self.full is None else self.full
        self.transform = Compose([flow.to(start), normal.bijection(full).to(start)])

    def _make_flow(self, dim: int) -> Bijection:
        if dim == 1:
            return spline_flow()
        options = self._options
        if options["hidden_dims"] is None:
            options = options | {"hidden_dims": [min(max(32, 2 * dim), _LARGEST_WIDTH)] * 2}
        return real_nvp(dim, **options)

    @property
    def relative(self) -> dict[str, Relative]:
        """The latents whose coordinates are relative to their priors."""
        shapes = [self.sites[name].shape for name in self._relative_names]
        pieces = [
            flat.split([shape.numel() for shape in shapes])
            for flat in (self._buffers["relative_precision"], self._buffers["relative_shift"])
        ]
        tensors = [[part.reshape(shape) for part, shape in zip(parts, shapes)] for parts in pieces]
        return {name: Relative(*pair) for name, pair in zip(self._relative_names, zip(*tensors))}

    def _density(self) -> LogDensity:
        """The log-density of the model with the arguments of the last call, in the guide's own coordinates."""
        if self._arguments is None:
            raise RuntimeError("the coordinates of this guide depend on its model: call the guide once, guide(*args)")
        args, kwargs = self._arguments
        values = {name: site["value"] for name, site in self.prototype_trace.iter_stochastic_nodes()}
        density = LogDensity(self.plain_model, args, kwargs, values=values)
        self.set_coordinates(density)
        density.is_mapped = self._is_mapped
        return density

    def set_coordinates(self, density: LogDensity) -> None:
        sizes, own = ({name: site.size for name, site in sites.items()} for sites in (density.sites, self.sites))
        if sizes != own:
            raise ValueError(
                f"the guide has the latents {own}, and the model with these arguments {sizes}: make the guide (again) "
                "with this model and these arguments"
            )
        density.relative = self.relative

    def _init_loc(self) -> Tensor:
        nodes = self.prototype_trace.nodes
        return torch.cat(
            [
                site.pack(unconstraining(name, nodes[name]["fn"].support).inv(nodes[name]["value"].detach()))
                for name, site in self.sites.items()
            ]
        )

    @torch.no_grad()
    def _find_dynamic_supports(self, density: LogDensity, start: Tensor) -> bool:
        """Whether a support depends on latents: the supports of the prototype then give other values elsewhere."""
        point = start + 0.5
        values, _ = self._constrain_by_prototype(point)
        own = density.run(point)[1].values
        return any(not torch.allclose(values[name], own[name], equal_nan=True) for name in own)

    # -- what AutoContinuous asks for --------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.Distribution:
        """A standard normal, ``(latent_dim,)``."""
        self._check_built()
        like = self._modules["transform"].parts[-1].start_loc
        return dist.Normal(torch.zeros_like(like), torch.ones_like(like), validate_args=False).to_event(1)

    def get_transform(self, *args, **kwargs) -> Bijection:
        """The bijection from the base to unconstrained coordinates."""
        transform = self.own("transform")
        return Compose([transform, FromRelative(self._density())]) if self._relative_names else transform

    def get_posterior(self, *args, **kwargs) -> FlowDistribution:
        """The guide's distribution of all latents, in unconstrained coordinates."""
        return FlowDistribution(self.get_base_dist(), [self.get_transform()])

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Draws all latent sites.

        Args:
            args, kwargs: the model's arguments.

        Returns:
            The value of each site.
        """
        self.build(*args, **kwargs)
        self._arguments = args, kwargs
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values, ladjs = self._constrain(latent)
        draws = {}
        for name, value in values.items():
            event_dim = self.prototype_trace.nodes[name]["fn"].event_dim
            value, ladj = (_beside_plates(t, latent.shape[:-1], n) for t, n in ((value, event_dim), (ladjs[name], 0)))
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                draws[name] = pyro.sample(name, dist.Delta(value, log_density=-ladj, event_dim=event_dim))
        return draws

    def _constrain(self, points: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values of each site, and log|det| of each element of its batch, at points ``(..., D)``."""
        if not self._has_dynamic_supports:
            return self._constrain_by_prototype(points)
        density = self._density()
        density.relative = {}
        results = density.constrain(points.reshape(-1, self.latent_dim))
        return map_each(results, lambda value: value.reshape(points.shape[:-1] + value.shape[1:]))

    def _constrain_by_prototype(self, points: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, ladjs = {}, {}
        for name, part in unpack(points, self.sites).items():
            fn = self.prototype_trace.nodes[name]["fn"]
            site = self.sites[name]
            values[name], ladjs[name] = site.constrain(name, fn, site.unpack(part))
        return values, ladjs

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict, Tensor]]:
        """The prototype of each site and its unconstrained values, which NeuTraReparam reads."""
        for name, part in unpack(latent, self.sites).items():
            site = self.prototype_trace.nodes[name]
            value = self.sites[name].unpack(part)
            event_dim = site["fn"].event_dim + len(self.sites[name].shape) - site["value"].dim()
            yield site, _beside_plates(value, latent.shape[:-1], event_dim)

    @torch.no_grad()
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of each site from the guide, ``(num_samples,) + site shape``."""
        points = FlowDistribution(self.get_base_dist(), [self.own("transform")]).sample((num_samples,))
        if self._has_dynamic_supports or self._relative_names:
            return self._density().constrain(points)[0]
        return self._constrain_by_prototype(points)[0]

    def median(self, *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """The median of each latent, estimated from draws."""
        return {name: values[0] for name, values in self.quantiles([0.5], num_samples=num_samples).items()}

    def quantiles(self, quantiles: Sequence[float], *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """Quantiles of each latent, ``(len(quantiles),) + site shape``, estimated from draws."""
        return quantiles_of(self.sample(num_samples), quantiles)


def _beside_plates(values: Tensor, batch_shape: torch.Size, event_dim: int) -> Tensor:
    """Values ``batch_shape + site shape`` as Pyro has them, where axes of the batch may be the axes of the plates."""
    shape = values.shape[len(batch_shape) :]
    return values.reshape(torch.broadcast_shapes(shape, batch_shape + (1,) * event_dim))
