# SPDX-License-Identifier: Apache-2.0
"""NUTS in the coordinates of a guide."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor

from ..training.progress import Progress
from .posterior import PosteriorSamples
from .pulled_back import PulledBack, never_finite
from .traces import check_gradients

_MOST_STARTS = 100


def neutra(
    guide: AutoContinuous,
    *args: Any,
    model: Callable | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    progress: bool = True,
    **kwargs: Any,
) -> PosteriorSamples:
    r"""Draws from the posterior by NUTS in the coordinates :math:`\epsilon` of a guide :math:`z = T(\epsilon)`, where
    it is nearly a standard normal (NeuTra; Hoffman et al. 2019).

    The draws are exact however good the guide is; a better guide makes them cheaper. The chains run one after the
    other, each from a draw of the guide. If plates draw subsamples of their rows, each evaluation sees all rows.

    Args:
        guide: a trained :class:`AutoRealNVP`, or another of Pyro's with a transform.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; only needed for a guide that was not made from one.
        num_samples: the number of draws of each chain.
        warmup_steps: the number of steps of each chain before its draws.
        num_chains: the number of chains.
        target_accept_prob: the acceptance probability to which NUTS adapts its step size; nearer to one gives smaller
            steps.
        max_tree_depth: the largest depth of the trees of NUTS.
        progress: whether to show a progress bar with the step size and the acceptance probability; where the
            output is no terminal, one line for each tenth of the steps.

    Returns:
        The draws of the model's own sites, with divergences, R-hat and effective sample sizes.

    Raises:
        RuntimeError: the guide is not trained.
        ValueError: the log-density of a draw depends on random numbers that are no sites, or is finite at no draw of
            the guide; an argument of the model has the name of an option of this function.
        TypeError: the guide has no transform.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import AutoRealNVP, fit_guide
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.1))
        >>> guide = AutoRealNVP(model)
        >>> history = fit_guide(guide, num_steps=20, progress=False)
        >>> posterior = neutra(guide, num_samples=50, warmup_steps=20, progress=False)
        >>> posterior.samples["z"].shape
        torch.Size([50])
    """
    if num_samples < 4 or num_chains < 1:
        raise ValueError(f"expected num_samples >= 4 and num_chains >= 1; got {num_samples} and {num_chains}")
    check_gradients(neutra)
    started = time.perf_counter()
    target = PulledBack(neutra, guide, args, kwargs, model)

    def potential(point: dict[str, Tensor]) -> Tensor:
        return -target.one(point["base"])

    chains, divergences, acceptance = [], torch.zeros(num_chains, num_samples, dtype=torch.bool), []
    bar = Progress(num_chains * (warmup_steps + num_samples), show=progress)
    with closing(bar), target.frozen():  # NUTS needs gradients with respect to the latents only
        for k in range(num_chains):
            kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept_prob, max_tree_depth=max_tree_depth)
            mcmc = MCMC(
                kernel,
                num_samples,
                warmup_steps,
                initial_params={"base": _start(target)},
                hook_fn=lambda kernel, *_: bar.update(bar.done + 1, kernel.logging()),
                disable_progbar=True,  # in a log file, Pyro's bar would write a line at each step
            )
            mcmc.run()
            chains.append(mcmc.get_samples()["base"])
            diagnostics = mcmc.diagnostics()
            divergences[k, diagnostics["divergences"]["chain 0"]] = True
            acceptance.append(diagnostics["acceptance rate"]["chain 0"])
    samples = target.constrain(torch.cat(chains))
    return PosteriorSamples(
        samples=samples,
        divergences=divergences,
        acceptance=torch.tensor(acceptance).unsqueeze(-1).expand(num_chains, num_samples),
        seconds=time.perf_counter() - started,
        model=target.model,
    )


@torch.no_grad()
def _start(target: PulledBack) -> Tensor:
    """A draw of the guide at which the log-density is finite, as NUTS needs it."""
    for _ in range(_MOST_STARTS):
        start = target.base.sample()
        if target.one(start).isfinite():
            return start
    raise never_finite(_MOST_STARTS)
