# SPDX-License-Identifier: Apache-2.0
"""Exact draws from a posterior by hundreds of chains at once."""

import time
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.guides import AutoContinuous

from ..training.progress import Progress
from .chains import Chains
from .density import DEFAULT_MEMORY
from .posterior import PosteriorSamples
from .pulled_back import PulledBack

_LARGEST_R_HAT, _LEAST_ESS = 1.01, 400  # Vehtari et al. 2021
_MOST_DIVERGENCES = 0.002  # of the trajectories
_FEWEST_CHAINS, _FEWEST_SAMPLES = 4, 4


def sample_posterior(
    guide: AutoContinuous,
    *args: Any,
    model: Callable | None = None,
    num_samples: int = 100,
    warmup_steps: int = 200,
    num_chains: int | None = None,
    seed: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
    **kwargs: Any,
) -> PosteriorSamples:
    r"""Draws from the posterior by hundreds of chains at once, in the coordinates :math:`\epsilon` of a guide
    :math:`z = T(\epsilon),\ \epsilon \sim p_0`.

    Each iteration of a chain makes two moves, both of which leave the posterior as it is. The first proposes an
    independent draw :math:`\epsilon' \sim p_0` of the guide, which is accepted with the probability
    :math:`\min(1, w(\epsilon') / w(\epsilon))`, where :math:`w = p(x, T(\epsilon))\, |\det \partial T / \partial
    \epsilon|\, / p_0(\epsilon)`. The second is a Hamiltonian trajectory of random length. In the warmup, all chains
    adapt the step size and the length of the trajectories together (ChEES; Hoffman, Radul & Sountsov 2021), and a
    scale of each coordinate. Then these are fixed, so the draws are exact however good the guide is; a better guide
    makes them cheaper. The chains start at draws of the guide, chosen by their importance weights. If plates draw
    subsamples of their rows, each evaluation sees all rows.

    Ctrl-C ends the sampling with the draws so far, if there are four or more of each chain.

    Args:
        guide: a trained :class:`AutoRealNVP`, or another of Pyro's with a transform.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; only needed for a guide that was not made from one.
        num_samples: the number of draws of each chain.
        warmup_steps: the number of iterations of each chain before its draws.
        num_chains: the number of chains, at least 4; by default 256, or 16 if the model cannot be mapped and its draws
            are evaluated one after the other.
        seed: the seed of the draws; by default torch's generator goes on.
        memory: the bytes that one evaluation of all chains may take. More chains are evaluated in pieces.
        progress: whether to show a progress bar; where the output is no terminal, one line for each tenth of the steps.

    Returns:
        The draws of the model's own sites, with divergences, acceptance, energies, R-hat and effective sample sizes.

    Raises:
        RuntimeError: the guide is not trained.
        ValueError: the log-density is not finite at any draw of the guide; the log-density of a draw depends on random
            numbers that are no sites; an argument of the model has the name of an option of this function.
        TypeError: the guide has no transform.

    Warns:
        RuntimeWarning: an R-hat is above 1.01, or an effective sample size below 400; more than 0.2 % of the
            trajectories have diverged; the model cannot be mapped over draws; Ctrl-C has ended the sampling.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import AutoRealNVP, fit_guide
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.1))
        >>> guide = AutoRealNVP(model)
        >>> history = fit_guide(guide, num_steps=20, progress=False)
        >>> posterior = sample_posterior(guide, num_samples=10, warmup_steps=50, progress=False)
        >>> posterior.samples["z"].shape, posterior.by_chain["z"].shape
        (torch.Size([2560]), torch.Size([256, 10]))
    """
    if num_samples < _FEWEST_SAMPLES or warmup_steps < 1:
        raise ValueError(
            f"expected num_samples >= {_FEWEST_SAMPLES} of each chain and warmup_steps >= 1; got {num_samples} and "
            f"{warmup_steps}"
        )
    if num_chains is not None and num_chains < _FEWEST_CHAINS:
        raise ValueError(
            f"expected num_chains >= {_FEWEST_CHAINS}, which adapt their steps together and which R-hat compares; got "
            f"{num_chains}: take more chains, which cost little, or neutra(guide) for a single one"
        )
    started = time.perf_counter()
    if seed is not None:
        pyro.set_rng_seed(seed)
    target = PulledBack(sample_posterior, guide, args, kwargs, model, memory)
    if num_chains is None:
        num_chains = 256 if target.density.is_mapped else 16
    points, moves = [], []
    bar = Progress(warmup_steps + num_samples, show=progress)
    with closing(bar), torch.no_grad(), target.frozen():
        chains = Chains(target, num_chains)
        for _ in range(warmup_steps):
            chains.iterate(adapt=True)
            bar.update(bar.done + 1, {})
        chains.freeze()
        try:
            for _ in range(num_samples):
                move = chains.iterate()
                points.append(chains.state.point)
                moves.append(move)
                bar.update(bar.done + 1, {})
        except KeyboardInterrupt:
            if len(moves) < _FEWEST_SAMPLES:
                raise
            points = points[: len(moves)]
            warnings.warn(f"interrupted after {len(moves)} of {num_samples} draws", RuntimeWarning, stacklevel=2)
        # The draws of a chain stand one after the other.
        samples = target.constrain(torch.stack(points, 1).flatten(0, 1))
    jumped, acceptance, is_divergent, energy = (torch.stack(values, 1) for values in zip(*moves))
    posterior = PosteriorSamples(
        samples=samples,
        divergences=is_divergent,
        acceptance=acceptance,
        seconds=time.perf_counter() - started,
        jumps=jumped,
        energy=energy,
        model=target.model,
    )
    _warn_unless_converged(posterior)
    return posterior


def _warn_unless_converged(posterior: PosteriorSamples) -> None:
    r_hat, ess = posterior.max_r_hat, posterior.min_ess
    if not (r_hat <= _LARGEST_R_HAT and ess >= _LEAST_ESS):
        warnings.warn(
            f"the largest R-hat is {r_hat:.3f} and the least effective sample size {ess:.0f}, where up to "
            f"{_LARGEST_R_HAT} and at least {_LEAST_ESS} are wanted: take a larger num_samples and warmup_steps, or "
            "train the guide longer",
            RuntimeWarning,
            stacklevel=3,
        )
    diverged = posterior.divergences.double().mean().item()
    if diverged > _MOST_DIVERGENCES:
        warnings.warn(
            f"{diverged:.1%} of the trajectories have diverged, so there may be a region that the chains hardly enter, "
            "such as the neck of a funnel: train the guide longer, or change the coordinates of the model, as by "
            "pyro.infer.reparam.LocScaleReparam",
            RuntimeWarning,
            stacklevel=3,
        )
