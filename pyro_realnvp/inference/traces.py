# SPDX-License-Identifier: Apache-2.0
"""A model and its guide, run side by side: their sites and their parameters."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .base import GuideBase
from .sites import counts, is_latent

_ATTEMPTS = 10


def model_of(guide: Callable, model: Callable | None) -> Callable:
    """The model that was passed, or that of a guide that was made from one."""
    if model is not None:
        if isinstance(guide, GuideBase):
            guide.keep_model(model)
        return model
    if isinstance(guide, GuideBase):
        return guide.plain_model
    if isinstance(guide, (GuideMessenger, EasyGuide)):
        return guide.model
    if not isinstance(guide, AutoGuide):
        raise ValueError(f"the guide {guide!r} was not made from a model: pass model=")
    if guide._model is None:
        raise RuntimeError("the guide was unpickled without its model: pass model=")
    model = guide.model
    while _is_wrapped_by_pyro(model):
        model = model.args[-1]
    return model


def _is_wrapped_by_pyro(model: Callable) -> bool:
    """Whether Pyro's guide has wrapped the model in the handler that initializes its sites."""
    args = getattr(model, "args", ())
    return len(args) > 1 and isinstance(args[0], InitMessenger)


def check_gradients(function: Callable) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{function.__name__} needs gradients, which are disabled here: call it outside of torch.no_grad() and "
            "torch.inference_mode()"
        )


def check_argument_names(model: Callable, function: Callable, args: tuple[Any, ...]) -> None:
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


def run(model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Runs the guide, and the model at its values. Returns the trace of the guide.

    Raises:
        ValueError: a latent site that only one of them has.
    """
    with guide.at(args, kwargs) if isinstance(guide, GuideBase) else nullcontext():
        guide_trace, model_trace = _traces(model, guide, args, kwargs)
    drawn = {name for name in guide_trace.stochastic_nodes if not site_is_subsample(guide_trace.nodes[name])}
    missing = {name for name, site in model_trace.nodes.items() if is_latent(site) and counts(site)} - drawn
    if missing:
        raise ValueError(
            f"the model has the latent sites {sorted(missing)}, which the guide does not have: a guide is made for a "
            "model whose sites do not change from call to call; make it (again) with this model and these arguments"
        )
    extra = {name for name in drawn if not guide_trace.nodes[name]["infer"].get("is_auxiliary")} - set(
        model_trace.nodes
    )
    if extra:
        raise ValueError(
            f"the guide has the latent sites {sorted(extra)}, which the model does not have: make the guide (again) "
            "with this model and these arguments"
        )
    return guide_trace


def _traces(model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
    """A run of the guide, and one of the model at its values. Where Pyro validates, data outside of a support are its
    own error.

    A single draw may put an observation out of its support, and so may a draw of a discrete site that is summed over.
    So the error is raised only if other draws do the same.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        try:
            with torch.random.fork_rng():
                model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
            model_trace.compute_log_prob()
            break
        except ValueError:
            if not attempts_left:
                raise
    return guide_trace, model_trace


def drop_observed(trace: Trace, guide: Callable, observed: Mapping[str, dict[str, Any]]) -> None:
    """Removes from the trace of a guide what the model observes: one of Pyro's kinds of guides runs the model."""
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        for name, site in observed.items():
            if name in trace and site["type"] == "sample" and site["is_observed"]:
                trace.remove_node(name)


def learned_parameters(
    model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Trace]:
    """The tensors of the model and the guide that require a gradient, as Pyro finds them, and a trace of the guide."""
    with poutine.trace(param_only=True) as capture:
        guide_trace = run(model, guide, args, kwargs)
    # With module_local_params, the value of a site is the parameter itself.
    values = (site["value"] for site in capture.trace.nodes.values())
    found = dict.fromkeys(value.unconstrained() if hasattr(value, "unconstrained") else value for value in values)
    return [p for p in found if p.requires_grad], guide_trace


def values_of(guide_trace: Trace) -> dict[str, Tensor]:
    """The values that a guide has drawn."""
    return {name: guide_trace.nodes[name]["value"].detach() for name in guide_trace.stochastic_nodes}
