# SPDX-License-Identifier: Apache-2.0
"""Training of guides: of ours and of Pyro's."""

import warnings
from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from ..training.history import Callback, History
from ..training.loop import Training
from ..training.options import LoopOptions
from .base import GuideBase
from .elbos import DirectELBO, PathDerivativeELBO
from .traces import can_vectorize, check_argument_names, learned_parameters, model_of

_TOLERANCE = 0.01  # nats: what validation cannot tell from its noise


def fit_guide(
    guide: Callable,
    *args,
    model: Callable | None = None,
    num_steps: int = 2000,
    num_particles: int = 64,
    lr: float = 1e-2,
    warmup: float = 0.1,
    max_grad_norm: float = 10.0,
    averaging: float = 0.1,
    path_derivative: bool | None = None,
    loss: Trace_ELBO | None = None,
    validation_particles: int = 1024,
    validate_every: int = 100,
    patience: int | None = None,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **kwargs,
) -> History:
    r"""Fits a guide, and what the model itself learns: maximises the ELBO
    :math:`E_{q(z)}[\log p(x, z) - \log q(z)]`.

    Adam (fused) on all parameters at once; the learning rate warms up and then falls to zero along a cosine. The
    weights that are validated, and that stay, are an exponential moving average of Adam's: those with the best ELBO
    over many particles. Particles are drawn in one pass where the model can be vectorised, else one after the other.
    Steps that are not finite are skipped, counted and reported; Ctrl-C stops with the best so far. Calling it again
    goes on.

    Args:
        guide: any guide of Pyro, such as an :class:`AutoRealNVP`.
        args, kwargs: the model's arguments, passed on to model and guide.
        model: the model; known for guides made from one.
        num_steps: optimizer steps; the schedule spans all of them.
        num_particles: draws of the guide in a step.
        lr: the highest learning rate.
        warmup: the fraction of the steps in which it rises.
        max_grad_norm: gradients are scaled down to this norm.
        averaging: the time constant of the moving average of the weights, as a fraction of the steps; 0 for none.
        path_derivative: leave out the part of the gradient whose mean is zero ("sticking the landing", Roeder et al.
            2017): no noise is left where the guide is exact, for a second evaluation of the guide's density; far away
            there may be more. By default for an :class:`AutoRealNVP` with a warm start. Guides with sites that are not
            reparametrised keep the whole gradient.
        loss: another ELBO of Pyro's, in place of ``Trace_ELBO``; it brings its own particles.
        validation_particles: draws for the ELBO that chooses the best weights, the same at each time; 0 to choose by
            the mean ELBO of the steps.
        validate_every: steps between validations.
        patience: stop after so many steps without a better ELBO; ``None`` for never.
        seed: of the draws; by default torch's generator goes on.
        callbacks: functions that are called after each step with the :class:`History` so far; one that returns True
            stops the training.
        progress: whether to show a progress bar with the mean of the last 50 negative ELBOs and the best.

    Returns:
        The :class:`History`; ``plots.plot_loss`` draws it.

    Raises:
        ValueError: latent sites of the model that the guide does not have, or the other way round; an argument of the
            model that has the name of an option of this function.

    Warns:
        RuntimeWarning: steps were skipped; the model cannot be vectorised.

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
    model = model_of(guide) if model is None else model
    check_argument_names(model, fit_guide, args)
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
    parameters, nesting = learned_parameters(model, guide, args, kwargs)
    if not parameters:
        raise ValueError("neither the guide nor the model has a parameter that requires a gradient: nothing to fit")
    vectorize = (num_particles > 1 or validation_particles > 1) and can_vectorize(model, guide, nesting, args, kwargs)
    if path_derivative is None:
        path_derivative = isinstance(guide, GuideBase) and guide.is_warm

    def elbo(particles: int, *, path_derivative: bool) -> Trace_ELBO:
        options = {"vectorize_particles": vectorize, "max_plate_nesting": nesting}
        if isinstance(guide, GuideBase) and guide.draws_all_at_once and (vectorize or particles == 1):
            return DirectELBO(parameters, path_derivative, num_particles=particles, **options)
        if path_derivative:
            return PathDerivativeELBO(parameters, num_particles=particles, **options)
        return Trace_ELBO(particles, **options)

    loss = elbo(num_particles, path_derivative=path_derivative) if loss is None else loss
    validation = elbo(max(validation_particles, 1), path_derivative=False)

    @torch.no_grad()
    def validate() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float(validation.differentiable_loss(model, guide, *args, **kwargs))

    # A step that is not finite is skipped, and no error.
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        training = Training(
            [module for module in (guide, model) if isinstance(module, nn.Module)],
            parameters,
            options,
        )
        history = training.run(
            lambda: loss.differentiable_loss(model, guide, *args, **kwargs),
            validate if validation_particles else None,
            progress=progress,
            validate_start=validation_particles > 0,
            callbacks=callbacks,
            remedy="lower lr, or look at the model's supports and priors",
        )
    if isinstance(guide, GuideBase):
        guide.mark_trained()
    return history
