# SPDX-License-Identifier: Apache-2.0
"""Shapes: what fits, what broadcasts, what is summed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints


def real_events(event_dim: int) -> constraints.Constraint:
    """The constraint of real events with `event_dim` axes."""
    return constraints.independent(constraints.real, event_dim) if event_dim else constraints.real


def sum_events(x: Tensor, event_dim: int) -> Tensor:
    """The sum over the last `event_dim` axes."""
    return x.sum(tuple(range(-event_dim, 0))) if event_dim else x


def check_event_shape(bijection: nn.Module, shape: Sequence[int], event_shape: Sequence[int | None]) -> torch.Size:
    """`shape`, if it ends in `event_shape`, where None fits every size."""
    shape = torch.Size(shape)
    event_dim = len(event_shape)
    event = shape[len(shape) - event_dim :] if len(shape) >= event_dim else shape
    if len(event) != event_dim or any(want not in (None, got) for want, got in zip(event_shape, event)):
        expected = str(tuple(event_shape)).replace("None", "any size")
        raise ValueError(
            f"{type(bijection).__name__} expected event shape {expected}; got shape {tuple(shape)}: "
            f"the last {event_dim} axes are the event, all before them the batch"
        )
    return shape


def check_context(bijection: nn.Module, context: Tensor | None) -> None:
    """Raises an error that says what to do where `context` is not what `bijection` expects."""
    name, width = type(bijection).__name__, bijection.context_dim
    if context is None:
        if width:
            raise ValueError(f"{name} expected a context of width {width}; got none: pass context=")
        return
    if not width:
        raise ValueError(
            f"{name} takes no context, but one was given: build it with context_dim=, or, inside "
            "ConditionalTransformedDistribution, put it into a Compose with the parts that take one"
        )
    if not isinstance(context, Tensor) or context.dim() == 0 or context.shape[-1] != width:
        got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{name} expected a context of shape (..., {width}); got {got}")
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(context.device.type):
        return
    own = next(bijection.parameters(), context)
    if own.dtype != context.dtype:
        raise TypeError(
            f"{name} has parameters of {own.dtype}; got a context of {context.dtype}: convert one with .to()"
        )


def broadcast_batch(x: Tensor, context: Tensor | None, event_dim: int = 1) -> Tensor:
    """x, expanded so that its batch has the context's batch shape too."""
    if context is None or context.dim() == 1:
        return x
    batch_dim = x.dim() - event_dim
    batch_shape = torch.broadcast_shapes(x.shape[:batch_dim], context.shape[:-1])
    return x if batch_shape == x.shape[:batch_dim] else x.expand(batch_shape + x.shape[batch_dim:])
