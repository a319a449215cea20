# SPDX-License-Identifier: Apache-2.0
"""Markov chains in the coordinates of a guide, hundreds at once: proposals of the flow and Hamiltonian trajectories."""

import math
from typing import NamedTuple

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from .pulled_back import PulledBack, never_finite

_DIVERGENT = 1000.0  # nats of error in the energy, as in Stan
_TARGET = 0.651  # the best acceptance probability of a Hamiltonian trajectory (Beskos et al. 2013)
_LEAST_ACCEPTANCE = 0.1  # that counts in the harmonic mean: at a wall of the density, no step is short enough
_LEARNING_RATE, _DECAY = 0.025, 0.95  # of the length of trajectories
_MOST_LEAPS = 200  # of a trajectory
_CANDIDATES = 4  # draws of the guide, for each chain, among which its start is chosen
_MEMORY = 0.05  # the weight of the newest iteration in a moving average


class State(NamedTuple):
    """Where all chains are. The first axis of each tensor has the chains."""

    point: Tensor
    """The points in the coordinates of the base, ``(C, D)``."""
    log_p: Tensor
    """The log-densities there, ``(C,)``."""
    gradient: Tensor
    """Their gradients, ``(C, D)``."""
    log_w: Tensor
    """The log-densities less those of the base, ``(C,)``."""


class Move(NamedTuple):
    """What an iteration has done, for each chain."""

    jumped: Tensor
    """Whether the proposal of the flow was accepted, ``(C,)``."""
    acceptance: Tensor
    """The acceptance probability of the trajectory, ``(C,)``."""
    is_divergent: Tensor
    """Whether the integration of the trajectory failed, ``(C,)``."""
    energy: Tensor
    """The energy at the end of the iteration, ``(C,)``, in nats."""


class Chains:
    r"""Chains whose stationary density is p(x, z), pulled back to the coordinates :math:`\epsilon` of a guide.

    An iteration proposes to each chain an independent draw :math:`\epsilon' \sim p_0` of the guide, accepted with the
    probability :math:`\min(1, w(\epsilon') / w(\epsilon))`, where w is the importance weight. From where this leads, a
    Hamiltonian trajectory of L leapfrog steps follows. All chains share its step size and its length, which
    :meth:`adapt` sets.

    Args:
        target: the log-density.
        num_chains: the number C of chains.
    """

    def __init__(self, target: PulledBack, num_chains: int):
        self.target = target
        self.state: State = self._start(num_chains)
        self.num_iterations: int = 0
        self.log_step: float = -0.25 * math.log(self.state.point.shape[1])
        self.log_length: float = self.log_step
        spread = self.state.point.std(0)
        self.scale: Tensor = torch.where(spread > 0, spread, 1.0)  # it is zero if all chains start at one point
        self._steps = DualAveraging(prox_center=self.log_step)
        self._square, self._length_average = 0.0, self.log_length

    def _evaluate(self, point: Tensor) -> State:
        log_p, gradient = self.target.with_gradient(point)
        log_p = torch.where(log_p.isfinite(), log_p, -torch.inf)
        return State(point, log_p, gradient, log_p - self.target.base.log_prob(point))

    def _start(self, num_chains: int) -> State:
        """Starts each chain at another draw of the guide, chosen in proportion to the weights, so far as they go."""
        point = self.target.base.sample((_CANDIDATES * num_chains,))
        log_w = self.target(point) - self.target.base.log_prob(point)
        is_finite = log_w.isfinite()
        if not is_finite.any():
            raise never_finite(len(log_w))
        # The largest of log w + Gumbel noise are a sample without replacement.
        gumbel = -torch.empty_like(log_w).exponential_().log()
        order = torch.where(is_finite, log_w + gumbel, -torch.inf).argsort(descending=True)[: int(is_finite.sum())]
        return self._evaluate(point[order[torch.arange(num_chains) % len(order)]])

    # -- an iteration --------------------------------------------------------------------------------------------------

    def iterate(self, adapt: bool = False) -> Move:
        """Moves all chains; while the chains warm up, with `adapt`."""
        self.num_iterations += 1
        proposal = self._evaluate(self.target.base.sample(self.state.log_p.shape))
        jumped = (proposal.log_w - self.state.log_w).exp() > torch.rand_like(self.state.log_p)
        self.state = _where(jumped, proposal, self.state)
        time = van_der_corput(self.num_iterations) * math.exp(self.log_length)
        start, momentum = self.state, torch.randn_like(self.state.point)
        end, velocity, alive = self._integrate(start, momentum, time)
        energy, new_energy = (s.log_p.neg() + v.square().sum(-1) / 2 for s, v in ((start, momentum), (end, velocity)))
        error = torch.where(alive, new_energy - energy, torch.inf)
        acceptance = error.neg().exp().clamp(max=1.0)
        accepted = acceptance > torch.rand_like(acceptance)
        if adapt:
            self._adapt(start, end, velocity, acceptance, time)
        self.state = _where(accepted, end, start)
        return Move(jumped, acceptance, error > _DIVERGENT, torch.where(accepted, new_energy, energy))

    def _integrate(self, state: State, momentum: Tensor, time: float) -> tuple[State, Tensor, Tensor]:
        """The end of the trajectories, their momenta there, and which of them were finite all the way."""
        step, start = math.exp(self.log_step), state
        alive = state.gradient.isfinite().all(-1)
        for _ in range(max(1, math.ceil(time / step))):
            momentum = momentum + step / 2 * self.scale * state.gradient.nan_to_num(0.0, 0.0, 0.0)
            state = self._evaluate(state.point + step * self.scale * momentum)
            alive = alive & state.log_p.isfinite() & state.gradient.isfinite().all(-1)
            # A model need not bear points that are nan, so a trajectory that has failed goes on from its start. The
            # reverse trajectory visits the same points and fails, too, so the chains stay exact.
            state = _where(alive, state, start)
            momentum = momentum + step / 2 * self.scale * state.gradient.nan_to_num(0.0, 0.0, 0.0)
        return state, momentum, alive & momentum.isfinite().all(-1)

    # -- adaptation ----------------------------------------------------------------------------------------------------

    def _adapt(self, start: State, end: State, velocity: Tensor, acceptance: Tensor, time: float) -> None:
        r"""Step size: dual averaging of the harmonic mean of the acceptance probabilities. Longest time T: Adam on
        log T, by the gradient of the ChEES criterion :math:`\frac14 E[(|q' - E q'|^2 - |q - E q|^2)^2]` (Hoffman, Radul
        & Sountsov 2021), the mean of :math:`t\, (|q' - E q'|^2 - |q - E q|^2)\, (q' - E q') \cdot p'` over the chains,
        weighted by their acceptance probabilities."""
        harmonic = 1 / (1 / acceptance.clamp(min=_LEAST_ACCEPTANCE)).mean()
        self._steps.step(_TARGET - harmonic.item())
        self.log_step, _ = self._steps.get_state()
        total = acceptance.sum()
        if total > 0:
            old, new = start.point / self.scale, end.point / self.scale
            old = old - old.mean(0)
            new = new - (acceptance @ new) / total
            change = new.square().sum(-1) - old.square().sum(-1)
            slope = time * change * (new * velocity).sum(-1)
            slope = ((acceptance * slope).sum() / total).item()
            if slope and math.isfinite(slope):
                self._square = _DECAY * self._square + (1 - _DECAY) * slope**2
                root = math.sqrt(self._square / (1 - _DECAY**self.num_iterations))
                self.log_length += _LEARNING_RATE * slope / root
        self.log_length = min(self.log_length, self.log_step + math.log(_MOST_LEAPS))
        self._length_average += _MEMORY * (self.log_length - self._length_average)
        self.scale = self.scale.square().lerp(start.point.var(0), _MEMORY).sqrt()

    def freeze(self) -> None:
        """Ends the adaptation."""
        self.log_step = self._steps.get_state()[1]
        self.log_length = self._length_average


def van_der_corput(n: int) -> float:
    """The n-th point of the base-2 Halton sequence in (0, 1)."""
    digits = f"{n:b}"
    return int(digits[::-1], 2) / 2 ** len(digits)


def _where(condition: Tensor, one: State, other: State) -> State:
    return State(
        *(torch.where(condition.unsqueeze(-1) if a.dim() > 1 else condition, a, b) for a, b in zip(one, other))
    )
