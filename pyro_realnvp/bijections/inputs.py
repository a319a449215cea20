# SPDX-License-Identifier: Apache-2.0
"""Checks of the inputs of a bijection. Each error says what was expected, what came, and what to do."""

from collections.abc import Callable, Sequence
from textwrap import shorten

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .modes import is_autocast, is_eager
from .shapes import Region, bounds, of_entries, strictly_inside


def check_event_shape(bijection: nn.Module, shape: Sequence[int], event_shape: Sequence[int | None]) -> torch.Size:
    """Returns `shape` if it ends in `event_shape`, in which None fits every size, and otherwise raises an error."""
    shape = torch.Size(shape)
    event_dim = len(event_shape)
    event = shape[len(shape) - event_dim :] if len(shape) >= event_dim else shape
    if event == event_shape:
        return shape
    if len(event) != event_dim or any(want is not None and want != got for want, got in zip(event_shape, event)):
        expected = str(tuple(event_shape)).replace("None", "any size")
        raise ValueError(
            f"{type(bijection).__name__} expected event shape {expected}; got shape {tuple(shape)}: "
            + remedy_of_shape(tuple(shape), event_shape)
        )
    return shape


def remedy_of_shape(shape: tuple[int, ...], event_shape: Sequence[int | None]) -> str:
    """Returns a guess at what is wrong with `shape`, as advice for the error message."""

    def fits(event: tuple[int, ...]) -> bool:
        return len(event) == len(event_shape) and all(want in (None, got) for want, got in zip(event_shape, event))

    if len(event_shape) == 3 and event_shape[0] is not None:
        if fits(shape[-1:] + shape[-3:-1]):
            return "the channels come first: pass x.movedim(-1, -3)"
        if event_shape[0] == 1 and fits((1,) + shape[-2:]):
            return "the axis of the one channel is missing: pass x.unsqueeze(-3)"
    return f"the last {len(event_shape)} axes are the event, and all axes before them are the batch"


def check_even(what: str, shape: Sequence[int]) -> None:
    """Raises an error unless the last two sizes of `shape` are even."""
    height, width = shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"{what} expected an even height and width; got {height} x {width}: "
            f"pad the images, e.g. torch.nn.functional.pad(x, (0, {width % 2}, 0, {height % 2}))"
        )


def check_tensor(who: str, value: object) -> None:
    """Raises an error if the value is not a tensor, such as an array."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who} expected a tensor; got {type(value).__name__}: pass torch.as_tensor(value)")


def check_value(bijection: nn.Module, value: Tensor, shape_of: Callable) -> None:
    """Raises an error if the shape, dtype or device of `value` does not fit, or if a context is missing."""
    name = type(bijection).__name__
    check_tensor(name, value)
    shape_of(value.shape)
    if not value.is_floating_point():
        raise TypeError(
            f"{name} expected floating-point values; got {value.dtype}: pass value.to(torch.float32), "
            "or score integer levels with Dequantized"
        )
    if bijection.context_dim:
        raise ValueError(
            f"{name} expected a context of width {bijection.context_dim}; got none: "
            "use f.condition(context), or call a Flow with its context"
        )
    if torch.compiler.is_compiling():  # The compiler cannot trace the walk over the parameters.
        return
    own = first_real(bijection, "_parameters")
    if own is None:
        own = first_real(bijection, "_buffers")
    if own is None:
        return
    # Under autocast, values of half precision come from networks; doubles would be rounded without a word.
    if own.dtype != value.dtype and (value.dtype == torch.float64 or not is_autocast(value)):
        raise TypeError(
            f"{name} has parameters of {own.dtype}; got values of {value.dtype}: "
            f"convert the module with .to({value.dtype}) or the values with .to({own.dtype})"
        )
    if own.device != value.device:
        raise ValueError(
            f"{name} has parameters on {own.device}; got values on {value.device}: "
            f"move the module with .to({str(value.device)!r}) or the values with .to({str(own.device)!r})"
        )


def first_real(module: nn.Module, held: str) -> Tensor | None:
    """The first of the parameters or buffers that holds real numbers; the public iterators take ten times as long."""
    for tensor in getattr(module, held).values():
        if tensor is not None and tensor.is_floating_point():
            return tensor
    for child in module._modules.values():
        if child is not None and (found := first_real(child, held)) is not None:
            return found
    return None


def check_bounds(bijection: nn.Module, value: Tensor, domain: constraints.Constraint) -> None:
    """Raises an error if entries of `value` lie beyond the bounds of the domain, unless Pyro's validation is off."""
    low, high = bounds(domain)
    is_region = isinstance(domain, Region)
    is_bounded = is_region or low is not None or high is not None
    if not (is_bounded and dist.is_validation_enabled() and isinstance(value, Tensor)):
        return
    if not is_eager(value, *(bound for bound in (low, high) if isinstance(bound, Tensor))):
        return
    beyond = ~strictly_inside(domain, value) if is_region else torch.zeros_like(value, dtype=torch.bool)
    if low is not None:
        beyond |= value < torch.as_tensor(low).to(value)
    if high is not None:
        beyond |= value > torch.as_tensor(high).to(value)
    if beyond.any():
        raise ValueError(
            f"{type(bijection).__name__} expected values in {shorten(repr(of_entries(domain)), 200)}; got "
            f"{int(beyond.sum())} of {value.numel()} beyond it, such as {value[beyond][0].item():.6g}: rescale them, "
            "or choose a bijection with other bounds"
        )


def check_context(bijection: nn.Module, context: Tensor | None) -> None:
    """Raises an error if `context` is missing, unexpected, or does not fit `bijection` in width or dtype."""
    name, width = type(bijection).__name__, bijection.context_dim
    if context is None:
        if width:
            raise ValueError(f"{name} expected a context of width {width}; got none: pass context=")
        return
    if not width:
        raise ValueError(
            f"{name} takes no context, but one was given: build it with context_dim=, or, inside "
            "ConditionalTransformedDistribution, put it into a Compose with the parts that take a context"
        )
    check_tensor(name, context)
    if context.dim() == 0 or context.shape[-1] != width:
        remedy = f": labels enter as torch.nn.functional.one_hot(labels, {width}).float()"
        raise ValueError(
            f"{name} expected a context of shape (..., {width}); got shape {tuple(context.shape)}"
            + remedy * (not context.is_floating_point())
        )
    if torch.compiler.is_compiling() or is_autocast(context):
        return
    own = first_real(bijection, "_parameters")
    if own is not None and own.dtype != context.dtype:
        raise TypeError(
            f"{name} has parameters of {own.dtype}; got a context of {context.dtype}: convert one of them with .to()"
        )
