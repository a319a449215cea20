# SPDX-License-Identifier: Apache-2.0
"""The losses of a guide."""

import warnings

import pyro
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .traces import check_conditioned, constrain, frozen, run_at


class PathDerivativeELBO(Trace_ELBO):
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


class DirectELBO(Trace_ELBO):
    """The ELBO of an :class:`AutoRealNVP`: one pass of its flow and one of the model, and no trace of the guide."""

    def __init__(self, parameters: list[Tensor], path_derivative: bool, **options):
        super().__init__(**options)
        self.parameters, self.path_derivative = parameters, path_derivative

    def differentiable_loss(self, model, guide, *args, **kwargs):
        base, transform = guide.get_base_dist(), guide.get_transform()
        particles = self.num_particles
        if particles > 1:  # the axis of the particles is on the left of all plates, as Pyro has it
            model = pyro.plate("particles", particles, dim=-self.max_plate_nesting)(model)
        noise = base.sample((particles,))
        z, ladj = transform.forward_and_ladj(noise)
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
