# SPDX-License-Identifier: Apache-2.0
"""The loss of held-out rows, which single extreme rows cannot decide."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .objective import log_likelihood

EXTREME = 50
"""The distance above the median, in interquartile ranges, beyond which the loss of a row counts no more than there."""
_MOST_EXTREME_ROWS = 0.05
_MOST_SORTED = 2**24  # more rows, torch.quantile refuses


class HeldOutLoss:
    """The weighted mean negative log-likelihood of the held-out rows, over all processes, at each call.

    A single fill value would make the mean infinite for any weights of the flow, and no weights could be chosen. The
    losses of such rows are therefore cut at a limit, and :attr:`extreme` names them. The limit is that of the first
    call at which few rows are extreme: if it followed the weights, those that are better at other rows could seem
    worse, since a row counts for them that did not count before. If more than a few rows are so extreme, it is the flow
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
        self.limit: float = math.inf
        """The highest loss that counts."""

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
        if not math.isfinite(self.limit):
            self.limit = _limit(losses)
        is_extreme = _beyond(losses, self.limit)
        self.extreme = [] if is_extreme is None else sorted(numbers[is_extreme].tolist())
        losses = losses if is_extreme is None else torch.where(is_extreme, self.limit, losses)
        return float((weights * losses).sum() / weights.sum())

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]


def _limit(losses: Tensor) -> float:
    finite = losses[losses.isfinite()]
    if not len(finite):
        return math.inf
    low, median, high = finite[:_MOST_SORTED].quantile(torch.tensor([0.25, 0.5, 0.75]).to(finite)).tolist()
    limit = median + EXTREME * (high - low)
    return limit if high > low and _beyond(losses, limit) is not None else math.inf


def _beyond(losses: Tensor, limit: float) -> Tensor | None:
    """Which rows are beyond the limit, None if they are many. A row of infinite density is not."""
    is_beyond = ~(losses <= limit)
    return is_beyond if is_beyond.sum() <= max(1, _MOST_EXTREME_ROWS * len(losses)) else None
