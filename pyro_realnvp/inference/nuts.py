# SPDX-License-Identifier: Apache-2.0
"""NUTS in the coordinates of a guide."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from .traces import by_site, check_argument_names, frozen, model_of


@dataclass
class PosteriorSamples:
    """What :func:`neutra` has drawn, with its diagnostics; ``print`` it."""

    samples: dict[str, Tensor]
    """Of each latent site of the model, ``(num_chains * num_samples,) + site shape``."""
    divergences: int
    """Steps of NUTS that left the true trajectory; there should be none."""
    r_hat: dict[str, Tensor]
    """Split R-hat of each entry; 1 where the chains agree. It needs no second chain."""
    effective_sample_size: dict[str, Tensor]
    """Of each entry."""
    seconds: float
    """Wall-clock time, with the warmup."""

    @property
    def min_ess_per_second(self) -> float:
        """The smallest effective sample size of all entries, per second."""
        return min(ess.min().item() for ess in self.effective_sample_size.values()) / self.seconds

    def __str__(self) -> str:
        lines = [f"{'site':<20} {'mean':>9} {'std':>9} {'r-hat':>7} {'ess':>8}"]
        for name, values in self.samples.items():
            columns = (values.mean(0), values.std(0), self.r_hat[name], self.effective_sample_size[name])
            rows = zip(*(column.reshape(-1).tolist() for column in columns))
            for k, (mean, std, r_hat, ess) in enumerate(rows):
                label = name if values.dim() == 1 else f"{name}[{k}]"
                lines.append(f"{label:<20} {mean:>9.3g} {std:>9.3g} {r_hat:>7.3f} {ess:>8.0f}")
        return "\n".join(
            [*lines, f"{self.divergences} divergences, {self.seconds:.1f} s, {self.min_ess_per_second:.1f} draws/s"]
        )


def neutra(
    guide: AutoContinuous,
    *args,
    model: Callable | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    progress: bool = True,
    **kwargs,
) -> PosteriorSamples:
    r"""Draws from the posterior by NUTS in the coordinates :math:`\epsilon` of a guide :math:`z = T(\epsilon)`, where
    it is nearly a standard normal (NeuTra; Hoffman et al. 2019).

    The draws are exact however good the guide is; a better one makes them cheaper. The chains run one after the other,
    each from a draw of the guide.

    Args:
        guide: a trained :class:`AutoRealNVP`, or another of Pyro's with a transform.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; known for guides made from one.
        num_samples: draws of each chain.
        warmup_steps: steps of each chain before them.
        num_chains: how many chains.
        target_accept_prob: of NUTS; nearer to one for smaller steps.
        max_tree_depth: of NUTS.
        progress: whether to show Pyro's progress bar.

    Returns:
        Draws in the model's own sites, with divergences, R-hat and effective sample sizes.

    Raises:
        RuntimeError: a guide that is not trained.
        ValueError: an argument of the model that has the name of an option of this function.
        TypeError: a guide without a transform.

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
    if not isinstance(guide, AutoContinuous):
        raise TypeError(f"expected a guide with a transform, such as AutoRealNVP; got {type(guide).__name__}")
    if guide.prototype_trace is None or not getattr(guide, "is_trained", True):
        raise RuntimeError("the guide is not trained: call fit_guide(guide, *args) first")
    if num_samples < 4 or num_chains < 1:
        raise ValueError(f"expected num_samples >= 4 and num_chains >= 1; got {num_samples} and {num_chains}")
    model = model_of(guide) if model is None else model
    check_argument_names(model, neutra, args)
    started = time.perf_counter()
    chains, divergences = [], 0
    with frozen(guide.parameters()):  # NUTS wants gradients of the latents only
        base = guide.get_base_dist()
        latent = f"{next(iter(guide.prototype_trace.iter_stochastic_nodes()))[0]}_shared_latent"
        for _ in range(num_chains):
            reparam = NeuTraReparam(guide)
            kernel = NUTS(
                poutine.reparam(model, config=lambda _, reparam=reparam: reparam),
                target_accept_prob=target_accept_prob,
                max_tree_depth=max_tree_depth,
            )
            mcmc = MCMC(
                kernel,
                num_samples,
                warmup_steps,
                initial_params={latent: base.sample()},
                disable_progbar=not progress,
            )
            mcmc.run(*args, **kwargs)
            with torch.no_grad():
                chains.append(guide.get_transform()(mcmc.get_samples()[latent]))
            divergences += sum(len(steps) for steps in mcmc.diagnostics()["divergences"].values())
    samples = by_site(guide, torch.cat(chains))
    by_chain = {name: values.reshape(num_chains, num_samples, *values.shape[1:]) for name, values in samples.items()}
    return PosteriorSamples(
        samples=samples,
        divergences=divergences,
        r_hat={name: split_gelman_rubin(values) for name, values in by_chain.items()},
        effective_sample_size={name: effective_sample_size(values) for name, values in by_chain.items()},
        seconds=time.perf_counter() - started,
    )
