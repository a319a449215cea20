# SPDX-License-Identifier: Apache-2.0
"""Training of guides, those of this package and those of Pyro."""

import math
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import ELBO, ReweightedWakeSleep, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.poutine import Trace
from torch import Tensor, nn

from ..supports import plain
from ..training.history import Callback, History
from ..training.loop import Training
from ..training.options import LoopOptions
from .agreement import seeded
from .base import GuideBase
from .density import DEFAULT_MEMORY, LogDensity
from .particles import particles_of
from .traces import check_argument_names, check_gradients, learned_parameters, model_of, values_of

_TOLERANCE = 0.01  # nats, which validation cannot tell from its noise
_FEWEST_PER_PASS = 64  # draws that each pass over the rows of subsampled plates takes in a validation
_MOST_REPEATS = 64  # evaluations of another ELBO in a validation


def fit_guide(
    guide: Callable,
    *args: Any,
    model: Callable | None = None,
    num_steps: int = 2000,
    num_particles: int | None = None,
    lr: float = 1e-2,
    warmup: float = 0.1,
    max_grad_norm: float = 10.0,
    averaging: float = 0.1,
    path_derivative: bool | None = None,
    loss: ELBO | None = None,
    validation_particles: int | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    seed: int | None = None,
    memory: int = DEFAULT_MEMORY,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **kwargs: Any,
) -> History:
    r"""Fits a guide, and the parameters of the model itself: maximizes the ELBO
    :math:`E_{q(z)}[\log p(x, z) - \log q(z)]`.

    The model may be written in any way that is right for one draw of its latents: its log-density is a function of one
    draw, mapped over many by :func:`torch.func.vmap`. Before the first step, two draws are evaluated alone and mapped,
    with two seeds, and a difference is an error. Adam (fused) updates all parameters at once; the learning rate rises
    and then falls to zero along a cosine. The weights that are validated are an exponential moving average of Adam's,
    and those with the best ELBO over many draws stay. Steps that are not finite are skipped, counted and reported, and
    Ctrl-C stops with the best weights so far. A second call continues from the weights of the first.

    Args:
        guide: any guide of Pyro, such as an :class:`AutoRealNVP`.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; only needed for a guide that was not made from one.
        num_steps: the number of optimizer steps, which the schedule spans.
        num_particles: the number of draws of the guide in a step; by default 64, or 4 if the model cannot be mapped
            and its draws are evaluated one after the other.
        lr: the highest learning rate.
        warmup: the fraction of the steps in which the learning rate rises.
        max_grad_norm: the norm to which longer gradients are scaled down.
        averaging: the time constant of the moving average of the weights, as a fraction of the steps; 0 for none.
        path_derivative: whether to leave out the part of the gradient whose mean is zero ("sticking the landing",
            Roeder et al. 2017). No noise is then left where the guide is exact, far away there may be more, and a step
            evaluates the guide's density a second time. By default only for an :class:`AutoRealNVP` with a warm start.
            Guides with sites that are not reparametrized keep the whole gradient. Guides such as Pyro's
            ``AutoStructured``, which scale their noise between two sites, are refused.
        loss: another ELBO of Pyro's in place of ``Trace_ELBO``. It brings its own number of particles, and the best
            weights are those with the best value of it.
        validation_particles: the number of draws for the ELBO that chooses the best weights, with the same random
            numbers at each validation; by default 1024, or 64 if the model cannot be mapped. 0 chooses by the mean ELBO
            of the recent steps.
        validate_every: the number of steps between validations.
        patience: the number of steps without a better ELBO after which the training stops; ``None`` for never.
        seed: the seed of the draws; by default torch's generator goes on.
        memory: the bytes that an evaluation of many draws may take. More draws are evaluated in pieces.
        callbacks: functions of the :class:`History` so far, called after each step; one that returns True stops the
            training.
        progress: whether to show a progress bar with the mean of the last 50 negative ELBOs and the best one; where
            the output is no terminal, one line for each tenth of the steps.

    Returns:
        The :class:`History`, which ``plots.plot_loss`` draws.

    Raises:
        ValueError: the model and the guide have different latent sites; the log-density of a draw depends on other
            draws or on random numbers that are no sites; an argument of the model has the name of an option of this
            function; ``loss`` is a ``TraceMeanField_ELBO``, and sites of the guide have Jacobians, which it leaves out.

    Warns:
        RuntimeWarning: steps were skipped; the model or the guide cannot be mapped over draws.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.1))
        >>> from pyro_realnvp import AutoRealNVP
        >>> guide = AutoRealNVP(model)
        >>> history = fit_guide(guide, num_steps=20, progress=False)
        >>> 2.9 < guide.median()["z"] < 3.1
        tensor(True)
    """
    model = model_of(guide, model)
    check_argument_names(model, fit_guide, args)
    check_gradients(fit_guide)
    options = LoopOptions(
        num_steps=num_steps,
        lr=lr,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        averaging=averaging,
        validate_every=validate_every,
        patience=patience,
        tolerance=_TOLERANCE,
    )
    if seed is not None:
        pyro.set_rng_seed(seed)
    if isinstance(guide, GuideBase):
        guide.build(*args, **kwargs)
    parameters, guide_trace = learned_parameters(model, guide, args, kwargs)
    if not parameters:
        raise ValueError("neither the guide nor the model has a parameter that requires a gradient: nothing to fit")
    if loss is None:
        density = LogDensity(model, args, kwargs, values=values_of(guide_trace), memory=memory)
        particles = particles_of(guide, density, parameters)
        if num_particles is None:
            num_particles = 64 if particles.is_mapped else 4
        if validation_particles is None:
            validation_particles = 1024 if particles.is_mapped else 64
        if path_derivative is None:
            path_derivative = isinstance(guide, GuideBase) and guide.is_warm
        if path_derivative:
            particles.check_path_derivative()
        passes = seeded(density.passes)
        per_pass = max(1, validation_particles // len(passes), min(validation_particles, _FEWEST_PER_PASS))

        def step_loss() -> Tensor:
            return particles.loss(num_particles, path_derivative)

        def validate() -> float:
            return -float(seeded(lambda: particles.log_weights(per_pass, passes)[1].mean()))

    else:
        _check_loss(loss, guide_trace)
        repeats = _repeats(loss, validation_particles)

        def step_loss() -> Tensor:
            return _surrogate(loss, parameters, model, guide, args, kwargs)

        def validate() -> float:
            return seeded(lambda: fmean(loss.loss(model, guide, *args, **kwargs) for _ in range(repeats)))

    # A step that is not finite is skipped, and no error.
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        training = Training(
            [module for module in (guide, model) if isinstance(module, nn.Module)],
            parameters,
            options,
        )
        history = training.run(
            step_loss,
            validate if validation_particles != 0 else None,
            progress=progress,
            validate_start=validation_particles != 0,
            callbacks=callbacks,
            remedy="lower lr, or look at the model's supports and priors",
        )
    if isinstance(guide, GuideBase):
        guide.mark_trained()
    return history


def _check_loss(loss: ELBO, guide_trace: Trace) -> None:
    """Refuses losses without one finite value, and Pyro's analytic KL divergence of a Delta without its log-density."""
    if isinstance(loss, (ReweightedWakeSleep, TraceTailAdaptive_ELBO)):
        raise ValueError(
            f"Pyro's {type(loss).__name__} has no single value that a training could compare: use pyro.infer.SVI, or "
            "another loss such as RenyiELBO()"
        )
    if not isinstance(loss, TraceMeanField_ELBO):
        return
    sites = {name: plain(guide_trace.nodes[name]["fn"]) for name in guide_trace.stochastic_nodes}
    wrong = [name for name, fn in sites.items() if isinstance(fn, Delta) and torch.as_tensor(fn.log_density).any()]
    if wrong:
        raise ValueError(
            f"Pyro's TraceMeanField_ELBO leaves out the Jacobians of the guide's sites {wrong}, and so is no bound: "
            "leave out loss=, or use Trace_ELBO()"
        )


def _repeats(loss: ELBO, validation_particles: int | None) -> int:
    """How often an ELBO of Pyro's, which has a number of particles of its own, is evaluated for a validation."""
    wanted = 1024 if validation_particles is None else validation_particles
    return max(1, min(_MOST_REPEATS, math.ceil(wanted / loss.num_particles)))


def _surrogate(loss: ELBO, parameters: list[Tensor], model: Callable, guide: Callable, args, kwargs) -> Tensor:
    """A tensor with the value and the gradient of any ELBO of Pyro's, which takes its gradient itself."""
    for p in parameters:
        p.grad = None
    value = torch.tensor(loss.loss_and_grads(model, guide, *args, **kwargs))
    linear = [(p.grad.clone() * (p - p.detach())).sum() for p in parameters if p.grad is not None]
    return value + torch.stack(linear).sum()
