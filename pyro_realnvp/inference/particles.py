# SPDX-License-Identifier: Apache-2.0
"""Draws of a guide with their importance weights, many at once: what a loss and a diagnosis are made of."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..bijections.bijection import Bijection
from ..supports import plain
from .agreement import check
from .base import GuideBase
from .density import LogDensity, Pass
from .mapping import Point, bytes_per_draw, map_over, reason, warn_that_it_is_slow
from .sites import Rows
from .traces import drop_observed


class Particles:
    r"""Draws :math:`z_i \sim q` of a guide, and :math:`\log w_i = \log p(x, z_i) - \log q(z_i)`.

    Args:
        guide: a guide that has been called once.
        density: the log-density of the model.
        parameters: what is learned, for gradients that leave it out.
    """

    bytes_per_draw: int = 0

    def __init__(self, guide: Callable, density: LogDensity, parameters: list[Tensor]):
        self.guide = guide
        self.density = density
        self.parameters = parameters
        with torch.no_grad(), torch.random.fork_rng():
            points, _, _ = self.draw(2, density.rows(), False)
        check(density, points)

    def draw(self, count: int, rows: dict[str, Tensor], path_derivative: bool) -> tuple[Point, Tensor, Tensor | None]:
        """Returns the draws; log q of them; and log q of those sites that are not reparametrized, if there are any.

        Args:
            count: the number of draws.
            rows: the rows of subsampled plates.
            path_derivative: whether the gradient of log q goes through the draws only.
        """
        raise NotImplementedError

    def values(self, points: Point) -> dict[str, Tensor]:
        """The values of each site at the draws."""
        raise NotImplementedError

    @property
    def is_mapped(self) -> bool:
        return self.density.is_mapped

    @property
    def piece(self) -> int:
        """How many draws fit into the memory."""
        return max(1, self.density.memory // max(1, self.density.bytes_per_draw + self.bytes_per_draw))

    def check_path_derivative(self) -> None:
        """Raises an error where log q has parameters that no value of a draw carries.

        A guide has them in the log-density of a Delta if it scales and shifts its noise between two sites.
        """

    def loss(self, count: int, path_derivative: bool) -> Tensor:
        """The negative ELBO, estimated by so many draws."""
        rows = self.density.rows()
        sizes = self._sizes(count)
        if len(sizes) == 1:
            return self._sum_of_losses(count, rows, path_derivative) / count
        pieces = [checkpoint(self._sum_of_losses, n, rows, path_derivative, use_reentrant=False) for n in sizes]
        return torch.stack(pieces).sum() / count

    def _sum_of_losses(self, count: int, rows: dict[str, Tensor], path_derivative: bool) -> Tensor:
        points, log_q, score = self.draw(count, rows, path_derivative)
        losses = log_q - self.density(points, rows)
        if score is None:
            return losses.sum()
        # Sites without rsample have the gradient of the score function. The mean loss of the other draws is a baseline
        # that does not depend on the draw, so it takes away noise and leaves the expectation as it is.
        total = losses.detach().sum()
        baseline = (total - losses.detach()) / (count - 1) if count > 1 else 0.0
        advantage = losses.detach() - baseline
        return (losses + advantage * (score - score.detach())).sum()

    @torch.no_grad()
    def log_weights(self, count: int, passes: list[Pass]) -> tuple[Point, Tensor]:
        """Draws, and the logarithms of their weights, ``(count,)``, with all rows of `passes`.

        Where rows have latents of their own, each pass has new draws, for its rows. Then only the mean is that of all
        rows.
        """
        if len(passes) > 1 and self.density.has_latents_of_rows:
            each = [(weight, *self.log_weights(count, [(1.0, rows)])) for weight, rows in passes]
            return each[-1][1], sum(weight * log_weights for weight, _, log_weights in each)
        drawn = [self.draw(n, passes[0][1], False)[:2] for n in self._sizes(count)]
        weights = [self.density.mean_over(points, passes) - log_q for points, log_q in drawn]
        points = [points for points, _ in drawn]
        if isinstance(points[0], Tensor):
            return torch.cat(points), torch.cat(weights)
        return {name: torch.cat([piece[name] for piece in points]) for name in points[0]}, torch.cat(weights)

    def _sizes(self, count: int) -> list[int]:
        return [min(self.piece, count - start) for start in range(0, count, self.piece)]


class FlowParticles(Particles):
    """Draws of a guide that takes one draw of its base to all latents, in unconstrained coordinates."""

    def __init__(self, guide: GuideBase, density: LogDensity, parameters: list[Tensor]):
        guide.set_coordinates(density)
        self.has_mixture: bool = not guide.get_base_dist().has_rsample
        self.transform: Bijection = guide.own("transform")
        super().__init__(guide, density, parameters)

    def draw(self, count: int, rows: dict[str, Tensor], path_derivative: bool) -> tuple[Point, Tensor, Tensor | None]:
        base = self.guide.get_base_dist()
        return *self._take(base, base.sample((count,)), path_derivative), None

    def _take(self, base: TorchDistribution, noise: Tensor, path_derivative: bool) -> tuple[Tensor, Tensor]:
        """Where the guide takes draws of its base, and log q there."""
        points, ladj = self.transform.forward_and_ladj(noise)
        if not path_derivative:
            return points, base.log_prob(noise) - ladj
        with frozen(self.parameters):
            noise, ladj = self.transform.inverse_and_ladj(points)
            return points, base.log_prob(noise) + ladj

    def _sum_of_losses(self, count: int, rows: dict[str, Tensor], path_derivative: bool) -> Tensor:
        if not self.has_mixture:
            return super()._sum_of_losses(count, rows, path_derivative)
        # Each component of the mixture draws, and its draws count as much as it weighs.
        noise, weights = self.guide.own("mixture").rsample_each(count)
        with frozen(self.parameters if path_derivative else []):
            base = self.guide.get_base_dist()
        points, log_q = self._take(base, noise, path_derivative)
        return (weights * (log_q - self.density(points, rows))).sum()

    def values(self, points: Point) -> dict[str, Tensor]:
        return self.density.constrain(points)[0]


class TracedParticles(Particles):
    """Draws of any guide of Pyro's, each of which is a run of the guide."""

    def __init__(self, guide: Callable, density: LogDensity, parameters: list[Tensor]):
        self.guide_is_mapped: bool = True
        self.guide = guide
        self.density = density
        self.parameters = parameters
        rows = density.rows()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.draw(2, rows, False)
        except Exception as error:  # whatever a guide may raise
            self.guide_is_mapped = False
            warn_that_it_is_slow(f"the guide cannot be mapped over draws ({reason(error)})")
        super().__init__(guide, density, parameters)
        if self.is_mapped:
            with torch.random.fork_rng():
                self.bytes_per_draw: int = bytes_per_draw(lambda n: self.draw(len(n), rows, False), torch.empty(2))

    @property
    def is_mapped(self) -> bool:
        return self.guide_is_mapped and self.density.is_mapped

    def draw(self, count: int, rows: dict[str, Tensor], path_derivative: bool) -> tuple[Point, Tensor, Tensor | None]:
        values, terms = map_over(lambda _: self._draw_one(rows), torch.zeros(count), self.guide_is_mapped)
        if path_derivative and "score" not in terms:
            with frozen(self.parameters):
                (terms,) = map_over(lambda drawn: self._log_q(drawn, rows), values, self.guide_is_mapped)
        points = {name: values[name] for name in self.density.latents}
        return points, terms["log_q"], terms.get("score")

    def _draw_one(self, rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trace = self._run(self.guide, rows)
        drawn = {name: trace.nodes[name] for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])}
        terms = {"log_q": trace.log_prob_sum()}
        scores = [site["unscaled_log_prob"].sum() for site in drawn.values() if not site["fn"].has_rsample]
        if scores:
            terms["score"] = sum(scores)
        return {name: site["value"] for name, site in drawn.items()}, terms

    def check_path_derivative(self) -> None:
        rows = self.density.rows()
        with torch.random.fork_rng():
            values, terms = self._draw_one(rows)
        if "score" in terms:
            return
        trace = self._run(poutine.condition(self.guide, {name: value.detach() for name, value in values.items()}), rows)
        deltas = [name for name in values if isinstance(plain(trace.nodes[name]["fn"]), Delta)]
        wrong = [name for name in deltas if trace.nodes[name]["log_prob"].requires_grad]
        if wrong:
            raise ValueError(
                "path_derivative=True needs a guide whose draws carry its parameters; got one that has some in the "
                f"Jacobians of the sites {wrong} alone: leave out path_derivative"
            )

    def _log_q(self, values: dict[str, Tensor], rows: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
        return ({"log_q": self._run(poutine.condition(self.guide, values), rows).log_prob_sum()},)

    def _run(self, guide: Callable, rows: dict[str, Tensor]) -> poutine.Trace:
        density = self.density
        with poutine.block(), pyro.validation_enabled(False), Rows(rows):
            trace = poutine.trace(guide).get_trace(*density.args, **density.kwargs)
            drop_observed(trace, guide, density.trace.nodes)
            trace.compute_log_prob()
        return trace

    def values(self, points: Point) -> dict[str, Tensor]:
        return points


def particles_of(guide: Callable, density: LogDensity, parameters: list[Tensor]) -> Particles:
    """The particles of any guide."""
    is_flow = isinstance(guide, GuideBase) and guide.draws_all_at_once
    return (FlowParticles if is_flow else TracedParticles)(guide, density, parameters)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Lets the parameters require no gradient for a while."""
    required = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in required:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in required:
            p.requires_grad_(was)
