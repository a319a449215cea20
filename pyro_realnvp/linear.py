# SPDX-License-Identifier: Apache-2.0
"""Learned linear maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection
from .reshape import Permute


class InvertibleLinear(Bijection):
    r""":math:`y = W x` with :math:`W = P L (U + \operatorname{diag}(d))`,
    :math:`\log|\det \partial y / \partial x| = \sum \log|d|`  (Glow; Kingma & Dhariwal 2018, eqs. 10-11).

    L is lower triangular with a unit diagonal, U upper triangular with a zero one, d > 0; these are learned. P is a
    fixed permutation. At birth W = P, by default the identity.

    Args:
        input_dim: the size D of an event.
        permutation: P, as the order of the rows, ``(D,)``; by default the identity.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = InvertibleLinear(3)
        >>> f(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<...>)
    """

    def __init__(self, input_dim: int, *, permutation: Tensor | None = None):
        super().__init__((input_dim,))
        self.permute = Permute(torch.arange(input_dim) if permutation is None else permutation)
        self.permute.forward_shape((input_dim,))
        self.lower = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.upper = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + identity, self.upper.triu(1) + self.log_diagonal.exp().diag()

    def forward_and_ladj(self, x, context=None):
        lower, upper = self._factors()
        y, _ = self.permute.forward_and_ladj(F.linear(F.linear(x, upper), lower))
        return y, self.log_diagonal.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        lower, upper = self._factors()
        rows = self.permute.inverse_and_ladj(y)[0].reshape(-1, len(lower))
        rows = torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
        return rows.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])
