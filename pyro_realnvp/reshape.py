# SPDX-License-Identifier: Apache-2.0
"""Bijections that only move entries."""

import torch
from torch import Tensor

from .bijection import Bijection


class Permute(Bijection):
    r""":math:`y_i = x_{\pi(i)},\quad \log|\det \partial y / \partial x| = 0`.

    The permutation is a buffer: it is saved, loaded and moved with the module.

    Args:
        permutation: shape ``(D,)``, each of 0, ..., D - 1 once; ``torch.randperm(D)`` for a random one.

    Example:
        >>> Permute(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    def __init__(self, permutation: Tensor):
        permutation = torch.as_tensor(permutation)
        if permutation.dim() != 1 or sorted(permutation.tolist()) != list(range(len(permutation))):
            raise ValueError(f"expected a vector with each of 0, ..., D - 1 once; got {permutation.tolist()}")
        super().__init__(permutation.shape)
        self.register_buffer("permutation", permutation.clone())
        self.register_buffer("inverse_permutation", permutation.argsort())

    def forward_and_ladj(self, x, context=None):
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y.index_select(-1, self.inverse_permutation), y.new_zeros(y.shape[:-1])

    def changed_entries(self, changed, *, forward=True):
        permutation = self.permutation if forward else self.inverse_permutation
        return changed[permutation.to(changed.device)]
