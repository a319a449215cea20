# SPDX-License-Identifier: Apache-2.0
"""Learned linear maps."""

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .reshape import Permute
from .shapes import channel_events, positions


class InvertibleLinear(Bijection):
    r""":math:`y = W x` with :math:`W = P L (U + \operatorname{diag}(d))`,
    :math:`\log|\det \partial y / \partial x| = \sum \log|d|`  (Glow; Kingma & Dhariwal 2018, eqs. 10-11).

    L is lower triangular with a unit diagonal, U upper triangular with a zero one, d > 0; these are learned. P is a
    fixed permutation. At birth W = P, by default the identity. On images W mixes the channels of each pixel: Glow's
    1 x 1 convolution, with :math:`\log|\det \partial y / \partial x| = H W \sum \log|d|`.

    Args:
        input_dim: the size D of an event, or its channels.
        permutation: P, as the order of the rows, ``(D,)``; by default the identity.
        event_dim: how many axes an event has, the first of them the channels: 1 for vectors, 3 for images.

    Shapes:
        ``(..., D)`` to ``(..., D)``, images ``(..., D, H, W)`` to the same; the log-determinant, in nats, is shaped
        like the batch.

    Example:
        >>> f = InvertibleLinear(3)
        >>> f(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<...>)
    """

    def __init__(self, input_dim: int, *, permutation: Tensor | None = None, event_dim: int = 1):
        super().__init__(channel_events(input_dim, event_dim))
        self.permute = Permute(torch.arange(input_dim) if permutation is None else permutation)
        self.permute.forward_shape((input_dim,))
        self.lower = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.upper = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + identity, self.upper.triu(1) + self.log_diagonal.exp().diag()

    def _columns(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).mT if len(self.event_shape) == 1 else x.flatten(1 - len(self.event_shape))

    def _events(self, columns: Tensor, shape: torch.Size) -> Tensor:
        return (columns.mT if len(self.event_shape) == 1 else columns).reshape(shape)

    def _ladj(self, x: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        return (positions(x, event_dim) * self.log_diagonal.sum()).expand(x.shape[: x.dim() - event_dim])

    def forward_and_ladj(self, x, context=None):
        lower, upper = self._factors()
        columns = (lower @ (upper @ self._columns(x))).index_select(-2, self.permute.permutation)
        return self._events(columns, x.shape), self._ladj(x)

    def inverse_and_ladj(self, y, context=None):
        lower, upper = self._factors()
        columns = self._columns(y).index_select(-2, self.permute.inverse_permutation)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return self._events(columns, y.shape), -self._ladj(y)
