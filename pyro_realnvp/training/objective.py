# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch, compiled if the user asks for it."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .rows import Batch

_TOLERANCE = 0.1


def log_likelihood(flow: nn.Module, batch: Batch) -> Tensor:
    """log p(x | context) of each row, in nats."""
    distribution = flow() if batch.context is None else flow(batch.context)
    log_prob = distribution.log_prob(batch.x)
    if log_prob.shape != batch.x.shape[:1]:
        raise ValueError(
            f"expected one log-density for each of the {len(batch.x)} rows; got shape {tuple(log_prob.shape)}: declare "
            "the axes of a row as an event by .to_event(), or flatten the axes before them"
        )
    return log_prob


def refuse_unknown_parameters(loss: Tensor, flow: nn.Module) -> None:
    """Raises an error if a loss has parameters that the flow does not list, so that no step would change them.

    A plain function or object in the flow may hold them, such as `lambda: Normal(loc, 1.0)` as a base.
    """
    known = set(map(id, flow.parameters()))
    met, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        stack += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"expected all that trains to be in flow.parameters(); got a parameter of shape {tuple(leaf.shape)} "
                "which is not there, so that no step would change it and no file would hold it: make it an attribute "
                "of a module of the flow, such as Base(...), or detach it"
            )


class Objective(nn.Module):
    """The weighted mean negative log-likelihood of a batch: a module, so that ``DistributedDataParallel`` can wrap it.

    Args:
        flow: the flow that is trained.
        compile: whether to compile the loss, or the mode of :func:`torch.compile`.
        autocast: a dtype for the products in the networks; ``None`` for that of the parameters.
    """

    def __init__(self, flow: nn.Module, compile: bool | str, autocast: torch.dtype | None):
        super().__init__()
        self.flow = flow
        self.autocast = autocast
        self.num_rows: int = 0
        mode = compile if isinstance(compile, str) else None
        self._compiled = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=mode) if compile else None

    def forward(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        # A compiled graph holds for one batch size. A batch shorter than those before is probably the last of an epoch;
        # a graph of its own would cost more than it saves, so it runs uncompiled.
        if self._compiled is None or len(x) < self.num_rows:
            return self._loss(x, context, weights)
        is_first, self.num_rows = not self.num_rows, len(x)
        if x.is_cuda:
            # CUDA graphs write each result into the same memory. This call says that the previous one is used up.
            torch.compiler.cudagraph_mark_step_begin()
        # The compiler runs at the first call, so this is where it fails if it cannot handle the flow or is missing. The
        # loss is the same without it, only slower, so training goes on with a warning.
        try:
            if is_first and not self._is_right(x, context, weights):
                raise torch._dynamo.exc.TorchDynamoException("its gradients would be others than without compilation")
            return self._compiled(x, context, weights)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._compiled = None
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the loss could not be compiled, so training goes on uncompiled: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._loss(x, context, weights)

    def _is_right(self, *batch: Tensor | None) -> bool:
        """Whether the compiled gradients are those of the loss: of Pyro's splines, torch's compiler makes others.

        Where random layers or noise change the gradients, there is nothing to compare.
        """
        parameters, found = [p for p in self.flow.parameters() if p.requires_grad], []
        for seed, loss in enumerate((self._loss, self._loss, self._compiled)):
            before = [buffer.clone() for buffer in self.flow.buffers()]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found.append(torch.autograd.grad(loss(*batch), parameters, materialize_grads=True))
            for buffer, was in zip(self.flow.buffers(), before):
                buffer.copy_(was)
        first, second, compiled = found
        total = torch.stack([g.norm() for g in first]).norm()

        def error(others: Sequence[Tensor]) -> float:
            return max(float((g - o).norm() / (g.norm() + _TOLERANCE * total)) for g, o in zip(first, others))

        return error(second) > _TOLERANCE**2 or not error(compiled) > _TOLERANCE

    def _loss(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast):
            log_prob = log_likelihood(self.flow, Batch(x, context))
        return -(log_prob if weights is None else weights * log_prob).mean()
