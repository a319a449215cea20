# SPDX-License-Identifier: Apache-2.0
"""Bijections that act on each entry by itself. They are named for the way from data to latent."""

import torch
from torch import Tensor

from .bijection import Bijection


class Standardize(Bijection):
    r""":math:`y = (x - \mu) / \sigma,\quad \log|\det \partial y / \partial x| = -\sum \log \sigma`, fitted on data.

    The way from data to latent is forward; a flow from base to data ends in ``Standardize(D).fit(x).inv``. Mean and
    standard deviation are fixed once fitted, and part of the ``state_dict``. Before :meth:`fit` it is the identity.

    Args:
        input_dim: the size D of an event.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = Standardize(2).fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> f(torch.tensor([1.0, 20.0]))
        tensor([0., 0.])
    """

    def __init__(self, input_dim: int):
        super().__init__((input_dim,))
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("std", torch.ones(input_dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> "Standardize":
        """Sets mean and standard deviation to those of x, ``(..., D)``; returns itself.

        Raises:
            ValueError: fewer than two rows, values that are not finite, or a constant column.
        """
        mean, std = column_statistics(x, self.event_shape[0])
        constant = (std == 0).nonzero().squeeze(-1).tolist()
        if constant:
            raise ValueError(f"columns {constant} are constant and cannot be standardised: drop them or add noise")
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self

    def forward_and_ladj(self, x, context=None):
        return (x - self.mean) / self.std, -self.std.log().sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y * self.std + self.mean, self.std.log().sum().expand(y.shape[:-1])

    def changed_entries(self, changed, *, forward=True):
        return changed


def column_statistics(x: Tensor, input_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column of x, ``(..., input_dim)``; errors as in `Standardize.fit`.

    The deviation of a constant column is exactly 0.
    """
    rows = torch.as_tensor(x).reshape(-1, x.shape[-1] if x.dim() else 1)
    if rows.shape[-1] != input_dim or len(rows) < 2:
        raise ValueError(f"expected at least two rows of {input_dim} columns; got shape {tuple(x.shape)}")
    bad = (~rows.isfinite()).any(-1).sum()
    if bad:
        raise ValueError(f"expected finite values; got nan or inf in {bad} of {len(rows)} rows")
    std = torch.where((rows == rows[0]).all(0), 0.0, rows.std(0))
    return rows.mean(0), std
