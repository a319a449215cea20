# SPDX-License-Identifier: Apache-2.0
"""A model and its guide, run side by side: their sites, their parameters, many draws at once."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to


def model_of(guide: Callable) -> Callable:
    """The model of a guide that was made from one."""
    if hasattr(guide, "plain_model"):
        return guide.plain_model
    if not isinstance(guide, AutoGuide):
        raise ValueError(f"the guide {guide!r} was not made from a model: pass model=")
    if guide._model is None:
        raise RuntimeError("the guide was unpickled without its model: pass model=")
    model = guide.model
    while getattr(model, "args", None):  # Pyro wraps it in handlers that initialise its sites
        model = model.args[-1]
    return model


def check_argument_names(model: Callable, function: Callable, args: tuple) -> None:
    """Raises an error where an option of ours would take a keyword argument of the model's, and the model miss it."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        positional = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):  # a callable that does not say, or arguments that the model itself will refuse
        return
    bound = getattr(model, "keywords", {})  # by functools.partial
    own = {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD} - {"args"}
    taken = [
        p.name
        for p in signature.parameters.values()
        if p.name in own and p.kind is not p.VAR_POSITIONAL and p.name not in positional and p.name not in bound
    ]
    if taken:
        raise ValueError(
            f"the model's arguments {taken} have the names of options of {function.__name__}, which would take them: "
            f"rename them, pass them by position, or bind them with functools.partial(model, {taken[0]}=...) in the "
            "model and the guide"
        )


def run(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    """A trace of the guide, and of the model at its values.

    Raises:
        ValueError: a latent site that only one of them has.
    """
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    missing = latents(model_trace) - set(guide_trace.stochastic_nodes)
    if missing:
        raise ValueError(
            f"the model has the latent sites {sorted(missing)}, which the guide does not have: a guide is made for a "
            "model whose sites do not change from call to call; make it (again) with this model and these arguments"
        )
    extra = {
        name
        for name in guide_trace.stochastic_nodes
        if not guide_trace.nodes[name]["infer"].get("is_auxiliary") and not site_is_subsample(guide_trace.nodes[name])
    } - set(model_trace.nodes)
    if extra:
        raise ValueError(
            f"the guide has the latent sites {sorted(extra)}, which the model does not have: make the guide (again) "
            "with this model and these arguments"
        )
    return model_trace, guide_trace


def latents(trace: Trace) -> set[str]:
    """The names of a model's latent sites."""
    return {name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])}


def run_at(model: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict) -> Trace:
    """A trace of the model at a value for each latent site."""
    return poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)


def check_conditioned(trace: Trace, values: dict[str, Tensor]) -> None:
    """Raises an error where a model that got a value for each latent site has others, or lacks one."""
    more, fewer = latents(trace), set(values) - set(trace.nodes)
    if more or fewer:
        raise ValueError(
            f"the model's latent sites have changed since the guide was made: {sorted(more)} are new, {sorted(fewer)} "
            "are gone; a guide is made for a model whose sites do not change from call to call"
        )


def plate_nesting(*traces: Trace) -> int:
    """How many axes on the left of events are plates."""
    dims = [
        frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def constrain(guide: AutoContinuous, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Points in unconstrained coordinates, ``(..., D)``, as a value for each site, and the sum of log|det|."""
    values, total = {}, z.new_zeros(())
    for site, unconstrained in guide._unpack_latent(z):
        transform = biject_to(site["fn"].support)
        value = values[site["name"]] = transform(unconstrained)
        total = total + transform.log_abs_det_jacobian(unconstrained, value).sum()
    return values, total


@torch.no_grad()
def by_site(guide: AutoContinuous, latents: Tensor) -> dict[str, Tensor]:
    """Points in unconstrained coordinates, ``(N, D)``, as N values for each site."""
    draws = [constrain(guide, z)[0] for z in latents]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """For a while, the parameters require no gradient."""
    required = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in required:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in required:
            p.requires_grad_(was)


def learned_parameters(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[list[Tensor], int]:
    """What requires a gradient in the model and the guide, as Pyro finds it, and how many axes are plates."""
    with poutine.trace(param_only=True) as capture:
        traces = run(model, guide, args, kwargs)
    found = dict.fromkeys(site["value"].unconstrained() for site in capture.trace.nodes.values())
    return [p for p in found if p.requires_grad], plate_nesting(*traces)


def can_vectorize(model: Callable, guide: Callable, nesting: int, args: tuple, kwargs: dict) -> bool:
    """Whether both run with a plate of particles around them; warns where they do not."""
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=nesting)
    try:
        with torch.no_grad(), torch.random.fork_rng(), pyro.validation_enabled(True):
            elbo.loss(model, guide, *args, **kwargs)
    except Exception as error:  # whatever a model may raise when it gets a batch
        lines = str(error).strip().splitlines()
        warnings.warn(
            f"the model cannot be vectorised over particles ({type(error).__name__}: {lines[0] if lines else ''}), so "
            "they are drawn one after the other: index and sum over the last axes (x[..., 0], x.sum(-1))",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
