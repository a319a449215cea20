# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch, compiled if wanted."""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .rows import Batch


def log_likelihood(flow: nn.Module, batch: Batch) -> Tensor:
    """log p(x | context) of each row, in nats."""
    distribution = flow() if batch.context is None else flow(batch.context)
    return distribution.log_prob(batch.x)


class Objective(nn.Module):
    """The mean negative log-likelihood of a batch.

    Args:
        flow: what is trained.
        compile: whether to compile it, or how (the mode of :func:`torch.compile`).
        autocast: the dtype of the networks' products, if not that of the parameters.
    """

    def __init__(self, flow: nn.Module, compile: bool | str, autocast: torch.dtype | None):
        super().__init__()
        self.flow, self.autocast, self.num_rows = flow, autocast, 0
        mode = compile if isinstance(compile, str) else None
        self._compiled = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=mode) if compile else None

    def forward(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if self._compiled is None or len(x) < self.num_rows:  # for a short last batch nothing is compiled anew
            return self._loss(x, context, weights)
        self.num_rows = len(x)
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return self._compiled(x, context, weights)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._compiled = None
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"training goes on uncompiled: {reason}", RuntimeWarning, stacklevel=2)
            return self._loss(x, context, weights)

    def _loss(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast):
            log_prob = log_likelihood(self.flow, Batch(x, context))
        return -(log_prob if weights is None else weights * log_prob).mean()
