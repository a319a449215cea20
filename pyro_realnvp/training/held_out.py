# SPDX-License-Identifier: Apache-2.0
"""The loss of held-out rows, which single extreme rows cannot decide."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import distributed
from .objective import log_likelihood

EXTREME = 50
"""The distance above the median, in interquartile ranges, beyond which the loss of a row counts no further."""
_MOST_EXTREME_ROWS = 0.05
_MOST_SORTED = 2**24  # more rows, torch.quantile refuses


class HeldOutLoss:
    """The weighted mean negative log-likelihood of the held-out rows, over all processes, at each call.

    A single fill value would make the mean infinite for any weights of the flow, and no weights could be chosen. The
    losses of such rows are therefore lowered to a limit far above those of the other rows, and :attr:`extreme` names the
    rows. If more than a few rows are so extreme, it is the flow that is wrong, and the mean stays as it is.

    Args:
        flow: the flow that is trained.
        batches: an iterable of the held-out batches.
    """

    def __init__(self, flow: nn.Module, batches: Iterable):
        self.flow, self.batches = flow, batches
        self.extreme: list[int] = []
        """The numbers of the extreme rows, in the order of the held-out rows."""

    @torch.no_grad()
    def __call__(self) -> float:
        losses, weights = [], []
        for batch in self.batches:
            losses.append(-log_likelihood(self.flow, batch).double())
            weights.append(torch.ones_like(losses[-1]) if batch.weights is None else batch.weights.to(losses[-1]))
        losses, weights = torch.cat(losses), torch.cat(weights)
        self.extreme, losses = self._limited(losses)
        loss, weight = distributed.total(torch.stack([(weights * losses).sum(), weights.sum()]))
        return float(loss / weight)

    def _limited(self, losses: Tensor) -> tuple[list[int], Tensor]:
        finite = losses[losses.isfinite()]
        if not len(finite):
            return [], losses
        low, median, high = finite[:_MOST_SORTED].quantile(torch.tensor([0.25, 0.5, 0.75]).to(finite))
        limit = median + EXTREME * (high - low)
        # A row of infinite density is not limited, since it is the flow that is wrong then.
        is_extreme = ~(losses <= limit) & (high > low)
        if not 0 < is_extreme.sum() <= max(1, _MOST_EXTREME_ROWS * len(losses)):
            return [], losses
        return is_extreme.nonzero().flatten().tolist(), torch.where(is_extreme, limit, losses)
