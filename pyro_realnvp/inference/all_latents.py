# SPDX-License-Identifier: Apache-2.0
"""What a guide of all latents of a model needs beside its distribution: their coordinates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.forecast import ForecastingModel
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from ..bijections.bijection import Bijection
from ..bijections.compose import Compose
from ..distributions import FlowDistribution
from .agreement import check_finite
from .base import GuideBase, are_same, give_to_a_site
from .circles import find_turns, quantiles_around, with_turns
from .coordinates import FromRelative
from .density import LogDensity
from .dynamic import are_dynamic, are_dynamic_far_away
from .mapping import map_each
from .relative import Relative
from .sites import Site, beside_plates, find_sites, is_latent, unpack, with_fallback
from .subsampling import refuse_subsampled


class AllLatents(GuideBase, AutoContinuous):
    """A guide whose submodule ``transform`` takes draws of :meth:`get_base_dist` to all latents of a model.

    The result is in coordinates that may be relative to priors. This class finds them, and takes draws from them to the
    values of the sites.

    Args:
        model: the model.
        init_loc_fn: the function that gives each site its starting value.
    """

    draws_all_at_once = True

    def __init__(self, model: Callable, *, init_loc_fn: Callable):
        super().__init__(model, init_loc_fn=with_fallback(init_loc_fn))
        self._arguments: tuple[tuple, dict] | None = None

    def build(self, *args: Any, **kwargs: Any) -> "AllLatents":
        """Looks at the model and makes the parameters. Returns the guide itself.

        The guide draws in the supports and in the coordinates that the model has with these arguments, and stays there
        when it is called with others, such as those of a prediction. A later call of this method, and
        :func:`fit_guide`, leave the parameters as they are and replace the arguments.

        Args:
            args, kwargs: the model's arguments.
        """
        is_new = self.prototype_trace is None
        super().build(*args, **kwargs)
        if not is_new:
            self._move_to(args, kwargs)
            return self
        if self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam reads them
        self._arguments = args, kwargs
        return self

    def _move_to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if are_same(self._arguments, (args, kwargs)):
            return
        if self.master is None and self._knows_model:
            self.set_coordinates(self._look_again(args, kwargs))
        self._arguments = args, kwargs

    @contextmanager
    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        before = self._arguments
        if before is not None:
            self._move_to(args, kwargs)
        try:
            yield
        finally:
            self._arguments = before or self._arguments

    @property
    def _knows_model(self) -> bool:
        # Pyro's Forecaster gives the guide the covariates of the future, and runs the model with handlers of its own.
        return self._plain_model is not None and not isinstance(self.plain_model, ForecastingModel)

    def _setup_prototype(self, *args: Any, **kwargs: Any):
        with poutine.block(), torch.random.fork_rng():
            nodes = poutine.trace(self.model).get_trace(*args, **kwargs).nodes
        find_sites({name: site for name, site in nodes.items() if is_latent(site)})  # says what cannot be a latent
        super()._setup_prototype(*args, **kwargs)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogDensity:
        """Finds the latent sites, and returns the log-density of the model.

        Raises:
            ValueError: a latent is under a subsampled plate, or the log-density at the prototype is not finite.
            RuntimeError: there are no latents.
        """
        refuse_subsampled(self._cond_indep_stacks)
        values = {name: site["value"] for name, site in self.prototype_trace.iter_stochastic_nodes() if is_latent(site)}
        density = LogDensity(self.plain_model, args, kwargs, values=values)
        check_finite(density)
        if not density.dim:
            raise RuntimeError("found no latent variables that the density counts: use an empty guide instead")
        # A part of a list of guides cannot see what the other parts draw.
        turns, starts = find_turns(density) if self.master is None else ({}, {})
        for name, start in starts.items():
            self.prototype_trace.nodes[name]["value"] = start
        self._sites: dict[str, Site] = density.sites
        self._circles: list[str] = list(turns)
        flat = [turn.flatten() for turn in turns.values()]
        self.register_buffer("turn", torch.cat([next(iter(values.values())).new_zeros(0), *flat]))
        density.sites = self.sites
        self.latent_dim: int = density.dim
        self._has_dynamic_supports = self.master is None and (
            are_dynamic(density, self._init_loc(), self._by_prototype)
            or are_dynamic_far_away(density, self._init_loc(), self._by_prototype)
        )
        return density

    @property
    def sites(self) -> dict[str, Site]:
        """The part of the vector of all latents that belongs to each latent site."""
        return with_turns(self._sites, self._circles, self._buffers["turn"])

    def keep_coordinates(self, density: LogDensity) -> None:
        """Takes over the coordinates of a log-density, and how it is evaluated."""
        self._is_mapped, self._own_tensors = density.is_mapped, density.own_tensors
        self._relative_names = list(density.relative)
        like = self._init_loc()
        for name in ("precision", "shift"):
            pieces = [getattr(relative, name).reshape(-1) for relative in density.relative.values()]
            self.register_buffer(f"relative_{name}", torch.cat([like.new_zeros(0), *pieces]).to(like))

    @property
    def relative(self) -> dict[str, Relative]:
        """The latents whose coordinates are relative to their priors."""
        shapes = [self._sites[name].shape for name in self._relative_names]
        pieces = [
            flat.split([shape.numel() for shape in shapes])
            for flat in (self._buffers["relative_precision"], self._buffers["relative_shift"])
        ]
        tensors = [[part.reshape(shape) for part, shape in zip(parts, shapes)] for parts in pieces]
        return {name: Relative(*pair) for name, pair in zip(self._relative_names, zip(*tensors))}

    def _density(self) -> LogDensity:
        """The log-density of the model in the guide's coordinates, with the arguments of :meth:`build`."""
        if self._arguments is None:
            raise RuntimeError("the coordinates of this guide depend on its model: call guide.build(*args)")
        density = self._look_again(*self._arguments)
        self.set_coordinates(density)
        density.is_mapped, density.own_tensors = self._is_mapped, self._own_tensors
        return density

    def _look_again(self, args: tuple, kwargs: dict) -> LogDensity:
        # What is no latent of the guide may be drawn here, such as the data in a prediction. A value of the prototype
        # may be outside of a support that these arguments move, but its unconstrained coordinates are not.
        point, sites = self._init_loc(), self.sites
        return LogDensity(self.plain_model, args, kwargs, values=point, sites=sites, latents=list(sites))

    def set_coordinates(self, density: LogDensity) -> None:
        """Gives the log-density of a model the coordinates of this guide.

        Raises:
            ValueError: the model has other latents.
        """
        self._check_sites(density)
        density.relative, density.sites = self.relative, self.sites
        if self.master is None and not self._has_dynamic_supports:
            # The supports may depend on the arguments, too.
            self._has_dynamic_supports = are_dynamic(density, self._init_loc(), self._by_prototype)

    def _check_sites(self, density: LogDensity) -> None:
        own, others = ({name: site.layout for name, site in s.items()} for s in (self.sites, density.sites))
        if own != others:
            raise ValueError(
                f"the guide has the latents {_sizes(self.sites)}, and the model with these arguments "
                f"{_sizes(density.sites)}, or other entries of them are missing: make the guide (again) with this "
                "model and these arguments"
            )

    def _init_loc(self, nodes: dict | None = None) -> Tensor:
        """The values of a trace of the model, by default the prototype, in plain unconstrained coordinates."""
        nodes = self.prototype_trace.nodes if nodes is None else nodes
        free = [s.pack(s.unconstrain(n, nodes[n]["fn"], nodes[n]["value"].detach())) for n, s in self.sites.items()]
        return torch.cat(free)

    def _by_prototype(self, points: Tensor) -> dict[str, Tensor]:
        return self._constrain_by_prototype(points)[0]

    def get_transform(self, *args: Any, **kwargs: Any) -> Bijection:
        """The bijection from the base to unconstrained coordinates.

        Args:
            args, kwargs: ignored. The coordinates of :attr:`relative` are those of the arguments of :meth:`build`.
        """
        transform = self.own("transform")
        return Compose([transform, FromRelative(self._density())]) if self._relative_names else transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The guide's distribution of all latents, in unconstrained coordinates; see :meth:`get_transform`."""
        return FlowDistribution(self.get_base_dist(), [self.get_transform(*args, **kwargs)])

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latent sites.

        Args:
            args, kwargs: the model's arguments.

        Returns:
            The value of each site.
        """
        if self.prototype_trace is None:
            self.build(*args, **kwargs)
        if not args and not kwargs and self._arguments:
            args, kwargs = self._arguments
        if not are_same(self._arguments, (args, kwargs)):
            if self._arguments is None or not self.is_trained:  # None after unpickling
                self._move_to(args, kwargs)
            elif self.master is None and self._knows_model:
                self._check_sites(self._look_again(args, kwargs))
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values, ladjs = self._constrain(latent)
        if not self.get_base_dist().has_rsample:
            log_q = self.get_posterior(*args, **kwargs).log_prob(latent)
            give_to_a_site(f"_{self._pyro_name}_log_q", log_q, ladjs)
        draws = {}
        for name, value in values.items():
            event_dim = self.prototype_trace.nodes[name]["fn"].event_dim
            value, ladj = (beside_plates(t, latent.shape[:-1], n) for t, n in ((value, event_dim), (ladjs[name], 0)))
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
        values, ladjs, sites = {}, {}, self.sites
        for name, part in unpack(points, sites).items():
            fn = self.prototype_trace.nodes[name]["fn"]
            values[name], ladjs[name] = sites[name].constrain(name, fn, sites[name].unpack(part))
        return values, ladjs

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The prototype of each site and its unconstrained values, which NeuTraReparam reads."""
        if self._has_dynamic_supports and latent.dim() > 1:
            raise ValueError(
                "the supports of this model depend on its latents, so each draw has others: take the values of the "
                "sites from pyro_realnvp.sample_posterior, or from the model itself"
            )
        for name, part in unpack(latent, self._sites).items():
            site = self.prototype_trace.nodes[name]
            value = self._sites[name].unpack(part)
            event_dim = site["fn"].event_dim + len(self._sites[name].shape) - site["value"].dim()
            yield site, beside_plates(value, latent.shape[:-1], event_dim)

    @torch.no_grad()
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of each site from the guide, ``(num_samples,) + site shape``."""
        points = FlowDistribution(self.get_base_dist(), [self.own("transform")]).sample((num_samples,))
        if self._has_dynamic_supports or self._relative_names:
            return self._density().constrain(points)[0]
        return self._constrain_by_prototype(points)[0]

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, estimated from draws."""
        return {name: values[0] for name, values in self.quantiles([0.5], num_samples=num_samples).items()}

    def quantiles(
        self, quantiles: Sequence[float], *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each latent, ``(len(quantiles),) + site shape``, estimated from draws.

        Those of an angle that the guide has turned go round from where its circle is cut, unless each draw has a
        period of its own.
        """
        draws, sites = self.sample(num_samples), {} if self._has_dynamic_supports else self.sites
        return quantiles_around(draws, quantiles, sites, self.prototype_trace.nodes)


def _sizes(sites: dict[str, Site]) -> dict[str, int]:
    return {name: site.size for name, site in sites.items()}
