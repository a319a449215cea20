# SPDX-License-Identifier: Apache-2.0
"""The log-density of a model at one draw of its latents, mapped over many draws."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .enumeration import Enumerate, factors, total
from .mapping import Point, count, each, join, map_over, split, vmap
from .relative import Relative, is_relative
from .sites import Place, Site, batch_mask, find_sites, is_enumerated, is_latent, mask_of_latents, unconstraining
from .subsampling import MOST_PASSES, Pass, crossed, draws_rows, passes_of, sequential
from .validity import apply_validity, is_validated

DEFAULT_MEMORY = 2**29
"""The bytes that an evaluation of many draws may take by default."""

_NOT_SUMMED = {"enumerate": None}


class LogDensity:
    r""":math:`\log p(x, z) + \log|\det \partial z / \partial u|` of a model, as a function of one point. The point is a
    vector u in unconstrained coordinates (those of the sites in :attr:`relative` being relative to their priors), or
    the value z of each latent site (then without the determinant).

    The model sees one draw. Many draws are evaluated by :func:`torch.func.vmap` of the function of one draw, or by a
    loop if a model cannot be mapped. No plate is ever put around the model, where it could broadcast against the
    model's own axes.

    Args:
        model: the model.
        args, kwargs: the model's arguments.
        values: a value of each latent site, or a vector in unconstrained coordinates, where the model is looked at. A
            discrete site that has one is a latent, too, even if the model enumerates it: as in Pyro, what a guide draws
            is not summed over.
        sites: the parts of that vector.
        latents: the names of the latent sites, if others are to be ignored. The log-density is then meaningless, but
            the values of the sites are not. None for all.
        memory: the bytes that an evaluation of many draws may take.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        values: Point | None = None,
        sites: dict[str, Site] | None = None,
        latents: Collection[str] | None = None,
        memory: int = DEFAULT_MEMORY,
    ):
        self.model = model
        self.args = args
        self.kwargs: dict[str, Any] = {} if kwargs is None else kwargs
        self.memory = memory
        self.is_mapped: bool = True
        self.own_tensors: bool = False
        self.bytes_per_draw: int = 0
        self.is_strict: bool = latents is None
        self.relative: dict[str, Relative] = {}
        values, sites = {} if values is None else values, {} if sites is None else sites
        with poutine.block(), _own_dims(), torch.random.fork_rng(), Place(values, sites, {}, is_strict=False):
            self.trace: Trace = poutine.trace(model).get_trace(*args, **self.kwargs)
        given = values if isinstance(values, dict) else sites
        drawn = {name for name in given if name in self.trace and is_enumerated(self.trace.nodes[name])}
        if drawn:
            self.model = poutine.infer_config(model, lambda site: _NOT_SUMMED if site["name"] in drawn else {})
            for name in drawn:
                self.trace.nodes[name]["infer"] |= _NOT_SUMMED
        samples = [site for site in self.trace.nodes.values() if site["type"] == "sample"]
        found = [site["name"] for site in samples if is_latent(site)]
        self.latents: list[str] = [name for name in found if latents is None or name in latents]
        self.plates: dict[str, Any] = {site["name"]: site["fn"] for site in samples if draws_rows(site)}
        self.nesting: int = max(
            (-f.dim for site in samples for f in site["cond_indep_stack"] if f.vectorized), default=0
        )
        self.validated: list[str] = [site["name"] for site in samples if is_validated(site["fn"])]
        self.is_enumerated: bool = any(is_enumerated(site) for site in samples if not site["is_observed"])

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The parts of a vector in unconstrained coordinates."""
        nodes = {name: self.trace.nodes[name] for name in self.latents}
        found = find_sites(nodes)
        if all(batch_mask(site) is None for site in nodes.values()):
            return found
        return find_sites(nodes, self._influence(found))

    def _influence(self, sites: dict[str, Site]) -> dict[str, Tensor]:
        """Which entries of the sites' values change the log-density, at the values in the trace or near them.

        For a latent under a subsampled plate, it is the log-density of the rows in the trace, whose mask it has there.
        """
        nodes = self.trace.nodes
        shown = self._influence_with(sites, {name: nodes[name]["value"] for name in self.plates})
        of_all = {name: mask_of_latents(nodes[name], shown[name]) for name in sites if not self._is_of_rows(name)}
        for _, rows in self.passes(most=None) if self.plates else ():
            if all(mask.all() for mask in of_all.values()):
                break
            more = self._influence_with(sites, rows)
            for name in of_all:
                shown[name] |= more[name]
                of_all[name] = mask_of_latents(nodes[name], shown[name])
        return shown

    def _influence_with(self, sites: dict[str, Site], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        nodes = self.trace.nodes
        influence = {name: torch.zeros_like(nodes[name]["value"], dtype=torch.bool) for name in sites}
        for noise in (0.0, 0.3, 1.0, 3.0):
            values = {}
            for name, site in sites.items():
                fn = nodes[name]["fn"]
                near = unconstraining(name, fn).inv(nodes[name]["value"].detach())
                values[name] = site.constrain(name, fn, near + noise * torch.randn_like(near))[0].requires_grad_()
            with torch.enable_grad():
                log_p = self.one(values, rows)
            if log_p.requires_grad:
                gradients = torch.autograd.grad(log_p, list(values.values()), materialize_grads=True)
                for name, gradient in zip(values, gradients):
                    influence[name] |= gradient != 0
        return influence

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.sites.values())

    # -- one draw ------------------------------------------------------------------------------------------------------

    def run(
        self,
        point: Point,
        rows: dict[str, Tensor] | None = None,
        relative: dict[str, Relative] | None = None,
    ) -> tuple[Trace, Place]:
        """A run of the model at one point."""
        sites = self.sites if isinstance(point, Tensor) else {}
        rows = self.rows() if rows is None else rows
        place = Place(point, sites, rows, self.relative if relative is None else relative, self.is_strict)
        model = Enumerate(first_available_dim=-1 - self.nesting)(self.model) if self.is_enumerated else self.model
        with poutine.block(), _own_dims(), pyro.validation_enabled(False), place:
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        place.check()
        return trace, place

    def _terms(self, point: Point, rows: dict[str, Tensor]) -> list[Tensor]:
        """The terms whose sum is the log-density of one draw; the last one is log|det|."""
        trace, place = self.run(point, rows)
        with pyro.validation_enabled(False):
            apply_validity(trace, self.validated)
            if self.is_enumerated:
                self._factors, self._scale, terms = factors(trace)
            else:
                terms = [trace.log_prob_sum()]
        ladjs = [*place.ladjs.values(), *place.relative_ladjs.values()]
        ladj = sum((ladj.sum() for ladj in ladjs), torch.zeros(()))
        return [*terms, ladj]

    def _total(self, terms: list[Tensor]) -> Tensor:
        *terms, ladj = terms
        return ladj + (total(self._factors, self._scale, terms) if self.is_enumerated else terms[0])

    def one(self, point: Point, rows: dict[str, Tensor] | None = None) -> Tensor:
        """The log-density of one draw, without :func:`torch.func.vmap`."""
        terms = self._terms(point, self.rows() if rows is None else rows)
        return self._total([term.unsqueeze(0) for term in terms])[0]

    # -- many draws ----------------------------------------------------------------------------------------------------

    def __call__(self, points: Point, rows: dict[str, Tensor] | None = None) -> Tensor:
        """The log-density of many draws, ``(N,)``. Each tensor of `points` has the draws on its leftmost axis."""
        rows = self.rows() if rows is None else rows
        if not self.is_mapped or count(points) == 1:
            return torch.stack([self._one_or_reject(point, rows) for point in each(points)])
        pieces = split(points, self.piece)
        if len(pieces) == 1:
            return self._of_piece(points, rows)
        if torch.is_grad_enabled():  # The backward pass then evaluates and holds one piece at a time.
            return torch.cat([checkpoint(self._of_piece, piece, rows, use_reentrant=False) for piece in pieces])
        return torch.cat([self._of_piece(piece, rows) for piece in pieces])

    def _of_piece(self, points: Point, rows: dict[str, Tensor]) -> Tensor:
        try:
            return self.mapped(points, rows)
        except torch.linalg.LinAlgError:  # one draw has raised it, for all of them
            return torch.stack([self._one_or_reject(point, rows) for point in each(points)])

    def _one_or_reject(self, point: Point, rows: dict[str, Tensor]) -> Tensor:
        """The log-density of one draw, which is -inf where a matrix of the model is singular."""
        try:
            return self.one(point, rows)
        except torch.linalg.LinAlgError:
            return torch.tensor(-torch.inf)

    def mapped(self, points: Point, rows: dict[str, Tensor]) -> Tensor:
        return self._total(
            vmap(lambda point: self._terms(point, rows), points, randomness="same", own_tensors=self.own_tensors)
        )

    def mean_over(self, points: Point, passes: list[Pass]) -> Tensor:
        """The log-density of many draws, with all rows of `passes`."""
        return sum(weight * self(points, rows) for weight, rows in passes)

    @property
    def piece(self) -> int:
        """How many draws fit into the memory."""
        return max(1, self.memory // max(1, self.bytes_per_draw))

    def constrain(self, points: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """N values of each site, and log|det| of each element of its batch, of points ``(N, D)``."""
        rows = self.rows()

        def of_one(point: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            place = self.run(point, rows)[1]
            return place.values, place.ladjs

        return join([map_over(of_one, piece, self.is_mapped, self.own_tensors) for piece in points.split(self.piece)])

    @torch.no_grad()
    def relative_sites(self, points: Tensor) -> list[str]:
        """The sites whose priors have a location or a scale that depends on other latents.

        Args:
            points: two points, ``(2, D)``, in unconstrained coordinates.
        """
        rows = self.rows()
        one, two = (self.run(point, rows, relative={})[0].nodes for point in points)
        return [name for name, site in self.sites.items() if is_relative(one[name]["fn"], two[name]["fn"], site.shape)]

    @property
    def has_latents_of_rows(self) -> bool:
        """Whether a latent is under a plate that draws subsamples."""
        return any(map(self._is_of_rows, self.latents))

    def _is_of_rows(self, name: str) -> bool:
        return any(frame.name in self.plates for frame in self.trace.nodes[name]["cond_indep_stack"])

    # -- rows of subsampled plates -------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Tensor]:
        """New rows of each subsampled plate, the same ones for all draws of an evaluation."""
        return {name: fn() for name, fn in self.plates.items()}

    def passes(self, most: int | None = MOST_PASSES) -> list[Pass]:
        """Rows for several evaluations, whose weighted sum sees each row once, or as many as `most` evaluations can."""
        loops = sequential(self.plates, self.trace)
        return passes_of(self.plates, crossed(self.plates, self.trace), most, loops)


@contextmanager
def _own_dims() -> Iterator[None]:
    """Lets a model number its plates and enumerated sites from -1, even where it is run inside of another run."""
    plates, enumerated = _DIM_ALLOCATOR._stack, vars(_ENUM_ALLOCATOR).copy()
    _DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = plates
        vars(_ENUM_ALLOCATOR).update(enumerated)
