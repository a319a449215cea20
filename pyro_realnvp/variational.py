# SPDX-License-Identifier: Apache-2.0
"""Training of guides: of ours and of Pyro's."""

import warnings
from collections.abc import Callable, Sequence

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from .guides import AutoRealNVP
from .history import Callback, History
from .optimization import Training
from .particles import can_vectorize, check_conditioned, constrain, frozen, inspect, model_of, run_at

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
        args: what the model takes; so do the other keyword arguments.
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
        ValueError: latent sites of the model that the guide does not have, or the other way round.

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
    for name, steps in (("num_steps", num_steps), ("validate_every", validate_every)):
        if steps < 1:
            raise ValueError(f"expected {name} >= 1; got {steps}")
    if seed is not None:
        pyro.set_rng_seed(seed)
    parameters, nesting = inspect(model, guide, args, kwargs)
    if not parameters:
        raise ValueError("neither the guide nor the model has a parameter that requires a gradient: nothing to fit")
    vectorize = (num_particles > 1 or validation_particles > 1) and can_vectorize(model, guide, nesting, args, kwargs)
    if path_derivative is None:
        path_derivative = getattr(guide, "is_warm", False)

    def elbo(particles: int, *, path_derivative: bool) -> Trace_ELBO:
        options = {"vectorize_particles": vectorize, "max_plate_nesting": nesting}
        if isinstance(guide, AutoRealNVP) and (vectorize or particles == 1):
            return _DirectELBO(parameters, path_derivative, num_particles=particles, **options)
        if path_derivative:
            return _PathDerivative(parameters, num_particles=particles, **options)
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
            num_steps=num_steps,
            lr=lr,
            warmup=warmup,
            max_grad_norm=max_grad_norm,
            averaging=averaging,
            validate_every=validate_every,
            patience=patience,
            tolerance=_TOLERANCE,
        )
        history = training.run(
            lambda: loss.differentiable_loss(model, guide, *args, **kwargs),
            validate if validation_particles else None,
            progress=progress,
            validate_start=validation_particles > 0,
            callbacks=callbacks,
            remedy="lower lr, or look at the model's supports and priors",
        )
    if isinstance(guide, AutoRealNVP):
        guide.fitted.fill_(True)
    return history


class _PathDerivative(Trace_ELBO):
    """The ELBO whose gradient goes only through the values that the guide draws."""

    def __init__(self, parameters: list[Tensor], **options):
        super().__init__(**options)
        self.parameters = parameters

    def _get_trace(self, model, guide, args, kwargs):
        recorded = poutine.trace(guide)  # with the rows that plates have drawn
        model_trace, guide_trace = super()._get_trace(model, recorded, args, kwargs)
        if not all(guide_trace.nodes[name]["fn"].has_rsample for name in guide_trace.stochastic_nodes):
            return model_trace, guide_trace
        with frozen(self.parameters):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*requires_grad=False")  # for this moment only
                guide_trace = poutine.trace(poutine.replay(guide, recorded.trace)).get_trace(*args, **kwargs)
            guide_trace = prune_subsample_sites(guide_trace)
            guide_trace.compute_score_parts()
        return model_trace, guide_trace


class _DirectELBO(Trace_ELBO):
    """The ELBO of an :class:`AutoRealNVP`: one pass of its flow and one of the model, and no trace of the guide."""

    def __init__(self, parameters: list[Tensor], path_derivative: bool, **options):
        super().__init__(**options)
        self.parameters, self.path_derivative = parameters, path_derivative

    def differentiable_loss(self, model, guide, *args, **kwargs):
        base, transform = guide.get_base_dist(), guide.get_transform()
        particles = self.num_particles
        if particles > 1:  # the axis of the particles is on the left of all plates, as Pyro has it
            model = self._vectorized_num_particles(model)
        noise = base.sample((particles,))
        z, ladj = transform.evaluate(noise, forward=True, remember=False)
        log_q = base.log_prob(noise) - ladj
        if self.path_derivative:
            with frozen(self.parameters):  # log q as a function of z only
                log_q = guide.get_posterior().log_prob(z)
        nesting = self.max_plate_nesting - (particles > 1)
        latent = z.reshape(particles, *(1,) * nesting, -1) if particles > 1 else z[0]
        values, ladj = constrain(guide, latent)
        trace = run_at(model, values, args, kwargs)
        check_conditioned(trace, values)
        return (log_q.sum() - ladj - trace.log_prob_sum()) / particles
