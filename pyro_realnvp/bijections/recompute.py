# SPDX-License-Identifier: Apache-2.0
"""Gradients of a stack that keeps only its output: the backward pass recomputes each input by the inverse."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

Evaluate = Callable[[Any, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
"""Evaluates a step of a composition, given the step, its input, the context and whether forward."""


def can_be_recomputed(part: nn.Module) -> bool:
    """Whether a part reads nothing but parameters, as PyroModules with sampled weights do not."""
    return part.can_be_recomputed and not any(isinstance(module, PyroModule) for module in part.modules())


def from_output(
    evaluate: Evaluate,
    steps: Sequence,
    x: Tensor,
    context: Tensor | None,
    *,
    forward: bool,
) -> tuple[Tensor, Tensor]:
    """Applies the steps, each with its `part`, to x (Gomez et al. 2017, section 3.3).

    Returns the output and the log-determinant.
    """
    parameters = _trained(*(step.part for step in steps))
    return _FromOutput.apply(evaluate, steps, forward, x, context, *parameters)


class _FromOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, evaluate: Evaluate, steps: Sequence, forward: bool, x: Tensor, context: Tensor | None, *parameters
    ):
        ctx.call, ctx.states, total = (evaluate, steps, forward), [], 0
        for step in steps:
            ctx.states.append(_random_state(x.device))
            x, ladj = evaluate(step, x, context, forward)
            total = total + ladj
        # Autograd refuses a backward pass after a saved tensor was changed, which the recomputation would not notice.
        ctx.save_for_backward(x, context, *parameters)
        kind = x.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return x, total

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # torch's `once_differentiable` lets torch.autograd.grad return zeros
            raise RuntimeError(
                "create_graph=True asks for gradients that can be differentiated again, but Compose(checkpoint="
                "'inverse') has no second derivatives: leave it out, or take checkpoint=True or False"
            )
        (evaluate, steps, forward), (y, context, *parameters) = ctx.call, ctx.saved_tensors
        now = _trained(*(step.part for step in steps))
        if [p.data_ptr() for p in now] != [p.data_ptr() for p in parameters]:
            raise RuntimeError(
                "expected the parameters of the forward pass in the backward pass; got others: take checkpoint=True "
                "where parameters are replaced, as by torch.func.functional_call"
            )
        grad_context, found = None, []
        for step, state in zip(reversed(steps), reversed(ctx.states)):
            with torch.autocast(y.device.type, **ctx.autocast):
                with torch.no_grad(), _same_random_numbers(state, y.device):
                    x, _ = evaluate(step, y, context, not forward)
                with torch.enable_grad(), _same_random_numbers(state, y.device):
                    x, its_context = x.detach().requires_grad_(), context
                    if context is not None:
                        its_context = context.detach().requires_grad_(context.requires_grad)
                    outputs = evaluate(step, x, its_context, forward)
            pairs = [pair for pair in zip(outputs, (grad_y, grad_ladj)) if pair[0].requires_grad]
            inputs = [x, *_trained(step.part)]
            with_context = its_context is not None and its_context.requires_grad
            grad_y, *grads = torch.autograd.grad(
                [output for output, _ in pairs],
                inputs + [its_context] * with_context,
                [grad for _, grad in pairs],
                allow_unused=True,
            )
            if with_context and (grad := grads.pop()) is not None:
                grad_context = grad if grad_context is None else grad_context + grad
            found = grads + found
            y = x.detach()
        return None, None, None, grad_y, grad_context, *found


def _trained(*parts: nn.Module) -> list[Tensor]:
    return [p for part in parts for p in part.parameters() if p.requires_grad]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _same_random_numbers(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draws the random numbers that followed this state, such as those of a dropout."""
    of_cpu, of_device = state
    with torch.random.fork_rng([] if of_device is None else [device]):
        torch.set_rng_state(of_cpu)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
        yield
