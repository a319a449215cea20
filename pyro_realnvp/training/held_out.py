# SPDX-License-Identifier: Apache-2.0
"""The loss of held-out rows, which single extreme rows cannot decide."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .objective import log_likelihood

EXTREME = 50
"""The distance above the median, in interquartile ranges, beyond which the loss of a row does not count."""
_MOST_EXTREME_ROWS = 0.05
_MOST_SORTED = 2**24  # more rows, torch.quantile refuses


class HeldOutLoss:
    """The weighted mean negative log-likelihood of the held-out rows, over all processes, at each call.

    A single fill value would make the mean infinite for any weights of the flow, and no weights could be chosen. Such
    rows are therefore left out, and :attr:`extreme` names them. If more than a few rows are so extreme, it is the flow
    that is wrong, and all rows count.

    Args:
        flow: the flow that is trained.
        batches: an iterable of the held-out batches.
    """

    def __init__(self, flow: nn.Module, batches: Iterable[Any]):
        self.flow = flow
        self.batches = batches
        self.extreme: list[int] = []
        """The numbers of the extreme rows: in the data that they are a part of, or in the order of a stream."""

    @torch.no_grad()
    def __call__(self) -> float:
        # A process may have no held-out row.
        nothing = torch.zeros(0, dtype=torch.float64, device=next(self.flow.parameters()).device)
        losses, weights = [nothing], [nothing]
        for batch in self.batches:
            losses.append(-log_likelihood(self.flow, batch).double())
            weights.append(torch.ones_like(losses[-1]) if batch.weights is None else batch.weights.to(losses[-1]))
        losses, weights = torch.cat(losses), torch.cat(weights)
        positions = torch.arange(len(losses))
        numbers = self.batches.numbers(positions) if hasattr(self.batches, "numbers") else positions
        # All processes look at all rows, so that they agree on which of them are extreme.
        parts = distributed.gather((losses.cpu(), weights.cpu(), numbers))
        losses, weights, numbers = (torch.cat(each) for each in zip(*parts))
        is_extreme = _find_extreme(losses)
        self.extreme = sorted(numbers[is_extreme].tolist())
        weights = weights[~is_extreme]
        return float((weights * losses[~is_extreme]).sum() / weights.sum())


def _find_extreme(losses: Tensor) -> Tensor:
    finite = losses[losses.isfinite()]
    if not len(finite):
        return torch.zeros_like(losses, dtype=torch.bool)
    low, median, high = finite[:_MOST_SORTED].quantile(torch.tensor([0.25, 0.5, 0.75]).to(finite))
    # A row of infinite density is not extreme, since it is the flow that is wrong then.
    is_extreme = ~(losses <= median + EXTREME * (high - low)) & (high > low)
    return is_extreme & (is_extreme.sum() <= max(1, _MOST_EXTREME_ROWS * len(losses)))
