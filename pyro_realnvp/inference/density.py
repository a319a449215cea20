# SPDX-License-Identifier: Apache-2.0
"""The log-density of a model at one draw of its latents, mapped over many draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .enumeration import Enumerate, factors, total
from .mapping import Point, bytes_per_draw, count, each, join, map_over, reason, split, vmap, warn_that_it_is_slow
from .relative import Relative, is_relative
from .sites import Place, Site, batch_mask, find_sites, is_enumerated, is_latent

DEFAULT_MEMORY = 2**29
"""The bytes that an evaluation of many draws may take by default."""
MOST_PASSES = 100
"""How often, at most, a model with subsampled plates is evaluated to see all rows."""
_TOLERANCE = 1e-3


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
        values: a value of each latent site, at which the model is looked at.
        memory: the bytes that an evaluation of many draws may take.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        values: dict[str, Tensor] | None = None,
        memory: int = DEFAULT_MEMORY,
    ):
        self.model, self.args, self.kwargs = model, args, {} if kwargs is None else kwargs
        self.memory, self.is_mapped, self.bytes_per_draw = memory, True, 0
        self.relative: dict[str, Relative] = {}
        with poutine.block(), _own_plate_dims(), torch.random.fork_rng(), Place(values or {}, {}, {}):
            self.trace = poutine.trace(model).get_trace(*args, **self.kwargs)
        samples = [site for site in self.trace.nodes.values() if site["type"] == "sample"]
        self.latents = [site["name"] for site in samples if is_latent(site)]
        self.plates = {site["name"]: site["fn"] for site in samples if _draws_rows(site)}
        self.nesting = max((-f.dim for site in samples for f in site["cond_indep_stack"] if f.vectorized), default=0)
        self.is_enumerated = any(is_enumerated(site) for site in samples if not site["is_observed"])

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The parts of a vector in unconstrained coordinates."""
        values = {name: self.trace.nodes[name]["value"].detach() for name in self.latents}
        influence = None
        if any(batch_mask(self.trace.nodes[name]) is not None for name in self.latents):
            find_sites(self.trace)  # raises its errors before anything is differentiated
            values = {name: value.requires_grad_() for name, value in values.items()}
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.one(values), list(values.values()), materialize_grads=True)
            influence = dict(zip(values, gradients))
        return find_sites(self.trace, influence)

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
        place = Place(point, sites, rows, self.relative if relative is None else relative)
        model = Enumerate(first_available_dim=-1 - self.nesting)(self.model) if self.is_enumerated else self.model
        with poutine.block(), _own_plate_dims(), pyro.validation_enabled(False), place:
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        place.check()
        return trace, place

    def _terms(self, point: Point, rows: dict[str, Tensor]) -> list[Tensor]:
        """The terms whose sum is the log-density of one draw; the last one is log|det|."""
        trace, place = self.run(point, rows)
        with pyro.validation_enabled(False):
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
            return self._mapped(points, rows)
        except torch.linalg.LinAlgError:  # one draw has raised it, for all of them
            return torch.stack([self._one_or_reject(point, rows) for point in each(points)])

    def _one_or_reject(self, point: Point, rows: dict[str, Tensor]) -> Tensor:
        """The log-density of one draw, which is -inf where a matrix of the model is singular."""
        try:
            return self.one(point, rows)
        except torch.linalg.LinAlgError:
            return torch.tensor(-torch.inf)

    def _mapped(self, points: Point, rows: dict[str, Tensor]) -> Tensor:
        return self._total(vmap(lambda point: self._terms(point, rows), points, randomness="same"))

    def mean_over(self, points: Point, passes: list[dict[str, Tensor]]) -> Tensor:
        """The log-density of many draws, with all rows of `passes`."""
        return torch.stack([self(points, rows) for rows in passes]).mean(0)

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

        return join([map_over(of_one, piece, self.is_mapped) for piece in points.split(self.piece)])

    @torch.no_grad()
    def relative_sites(self, points: Tensor) -> list[str]:
        """The sites whose priors have a location or a scale that depends on other latents.

        Args:
            points: two points, ``(2, D)``, in unconstrained coordinates.
        """
        rows = self.rows()
        one, two = (self.run(point, rows, relative={})[0].nodes for point in points)
        return [name for name, site in self.sites.items() if is_relative(one[name]["fn"], two[name]["fn"], site.shape)]

    # -- rows of subsampled plates -------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Tensor]:
        """New rows of each subsampled plate, the same ones for all draws of an evaluation."""
        return {name: fn() for name, fn in self.plates.items()}

    def passes(self, most: int = MOST_PASSES) -> list[dict[str, Tensor]]:
        """Rows for several evaluations, which together see each row once, or as many rows as `most` of them can."""
        if not self.plates:
            return [{}]
        count = max(fn.size // fn.subsample_size for fn in self.plates.values())
        passes = [self.rows() for _ in range(min(count, most))]
        for name, fn in self.plates.items():
            whole = fn.size // fn.subsample_size
            order = torch.randperm(fn.size)[: whole * fn.subsample_size].reshape(whole, -1)
            for k, rows in enumerate(passes):
                rows[name] = order[k % whole].to(rows[name].device)
        return passes

    # -- the check -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raises an error where the log-density is not finite at the values at which the model was looked at."""
        self.trace.compute_log_prob()  # Where Pyro validates, data outside of a support are Pyro's own error.
        bad = {
            name: site["log_prob_sum"].item()
            for name, site in self.trace.nodes.items()
            if site["type"] == "sample" and not site["log_prob_sum"].isfinite()
        }
        if bad:
            raise ValueError(
                f"the log-density at the start is not finite at the sites {bad}: pass init_loc_fn=, e.g. "
                "pyro.infer.autoguide.init_to_value(values={...}) with values at which it is, or check the data"
            )

    def check(self, points: Point) -> None:
        """Evaluates two draws alone and mapped, with two seeds, and decides whether and how many draws are mapped.

        Raises:
            ValueError: the numbers of a draw depend on the other draws, or on random numbers that no guide draws.

        Warns:
            RuntimeWarning: the model cannot be mapped.
        """
        rows = self.rows()
        first, second = (_seeded(lambda: torch.stack([self.one(p, rows) for p in each(points)]), k) for k in (0, 1))
        _compare(
            first,
            second,
            "two evaluations of the model at the same latents gave {0} and {1}: it draws random numbers that the guide "
            "does not draw, from torch, from dropout, or at a site hidden by poutine.block. Sum over discrete latents "
            "with pyro.infer.config_enumerate (without hiding them), and make what is random a site",
        )
        try:
            mapped = _seeded(lambda: self._mapped(points, rows), 0)
        except Exception as error:  # whatever a model may raise
            self.is_mapped = False
            warn_that_it_is_slow(f"the model cannot be mapped over draws ({reason(error)})")
            return
        _compare(
            first,
            mapped,
            "the model gives a draw the log-density {0} alone and {1} together with others: its numbers depend on the "
            "batch. Let it compute each draw by itself, without state that changes from call to call",
        )
        self.bytes_per_draw = bytes_per_draw(lambda points: self._mapped(points, rows), points)


@contextmanager
def _own_plate_dims() -> Iterator[None]:
    """Lets a model number its plates from -1, even where it is run inside of the plates of another run."""
    outer, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = outer


@torch.no_grad()
def _seeded(evaluate: Callable[[], Tensor], seed: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return evaluate()


def _draws_rows(site: dict) -> bool:
    return site_is_subsample(site) and site["fn"].subsample_size not in (None, site["fn"].size)


def _compare(a: Tensor, b: Tensor, message: str) -> None:
    same = torch.isclose(a.double(), b.double(), rtol=_TOLERANCE / 10, atol=_TOLERANCE, equal_nan=True)
    if not same.all():
        k = int((~same).nonzero()[0])
        raise ValueError(message.format(f"{a[k].item():.6g}", f"{b[k].item():.6g}"))
