# SPDX-License-Identifier: Apache-2.0
"""NUTS in the coordinates of a guide."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from ..training.progress import Progress
from .agreement import check
from .base import GuideBase
from .density import LogDensity
from .particles import frozen
from .traces import check_argument_names, model_of, run, values_of


@dataclass
class PosteriorSamples:
    """The draws of :func:`neutra` with their diagnostics, to be printed."""

    samples: dict[str, Tensor]
    """The draws of each latent site of the model, ``(num_chains * num_samples,) + site shape``."""
    divergences: int
    """The number of trajectories whose integration failed. There should be none."""
    r_hat: dict[str, Tensor]
    """Split R-hat of each entry, which is 1 if the halves of all chains agree. One chain is enough for it."""
    effective_sample_size: dict[str, Tensor]
    """The number of independent draws of each entry that the draws are worth."""
    seconds: float
    """The wall-clock time, including the warmup."""

    @property
    def min_ess_per_second(self) -> float:
        """The smallest effective sample size of all entries, per second."""
        return min(ess.min().item() for ess in self.effective_sample_size.values()) / self.seconds

    def __repr__(self) -> str:
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
        ValueError: the log-density of a draw depends on random numbers that are no sites; an argument of the model has
            the name of an option of this function.
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
    if not isinstance(guide, AutoContinuous):
        raise TypeError(f"expected a guide with a transform, such as AutoRealNVP; got {type(guide).__name__}")
    if guide.prototype_trace is None or not getattr(guide, "is_trained", True):
        raise RuntimeError("the guide is not trained: call fit_guide(guide, *args) first")
    if num_samples < 4 or num_chains < 1:
        raise ValueError(f"expected num_samples >= 4 and num_chains >= 1; got {num_samples} and {num_chains}")
    model = model_of(guide, model)
    check_argument_names(model, neutra, args)
    started = time.perf_counter()
    values = values_of(run(model, guide, args, kwargs))
    density = LogDensity(model, args, kwargs, values=values)
    base = guide.get_base_dist()
    if isinstance(guide, GuideBase) and guide.draws_all_at_once:
        guide.set_coordinates(density)
        transform = guide.own("transform")
    else:
        transform = guide.get_transform(*args, **kwargs)
    if density.dim != base.event_shape[0]:
        raise ValueError(
            f"the guide draws {base.event_shape[0]} numbers, and the model has {density.dim} latents (entries that "
            "poutine.mask takes out of the density are none): use AutoRealNVP"
        )
    with torch.no_grad():
        check(density, transform(base.sample((2,))))
    passes = density.passes(most=None)

    def potential(point: dict[str, Tensor]) -> Tensor:
        noise = point["base"]
        latent = transform(noise)
        log_p = sum(weight * density.one(latent, rows) for weight, rows in passes)
        return -(log_p + transform.log_abs_det_jacobian(noise, latent)).to(noise)

    chains, divergences = [], 0
    bar = Progress(num_chains * (warmup_steps + num_samples), show=progress)
    with closing(bar), frozen(guide.parameters()):  # NUTS needs gradients with respect to the latents only
        for _ in range(num_chains):
            kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept_prob, max_tree_depth=max_tree_depth)
            mcmc = MCMC(
                kernel,
                num_samples,
                warmup_steps,
                initial_params={"base": base.sample()},
                hook_fn=lambda kernel, *_: bar.update(bar.done + 1, kernel.logging()),
                disable_progbar=True,  # in a log file, Pyro's bar would write a line at each step
            )
            mcmc.run()
            chains.append(mcmc.get_samples()["base"])
            divergences += sum(len(steps) for steps in mcmc.diagnostics()["divergences"].values())
    with torch.no_grad():
        samples = density.constrain(transform(torch.cat(chains)))[0]
    by_chain = {name: values.reshape(num_chains, num_samples, *values.shape[1:]) for name, values in samples.items()}
    return PosteriorSamples(
        samples=samples,
        divergences=divergences,
        r_hat={name: split_gelman_rubin(values) for name, values in by_chain.items()},
        effective_sample_size={name: effective_sample_size(values) for name, values in by_chain.items()},
        seconds=time.perf_counter() - started,
    )
