# SPDX-License-Identifier: Apache-2.0
"""Bijections that only move entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bijection import Bijection
from .constants import Constants
from .inputs import check_even, check_event_shape
from .shapes import squeeze, unsqueeze


class Permute(Constants, Bijection):
    r""":math:`y_i = x_{\pi(i)},\quad \log|\det \partial y / \partial x| = 0`.

    The permutation is saved, loaded and moved with the module. It is no buffer, so that averages of buffers leave it as
    it is.

    Args:
        permutation: the permutation :math:`\pi`, a vector of shape ``(D,)`` that holds each of 0, ..., D - 1 once;
            ``torch.randperm(D)`` gives a random one.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Raises:
        ValueError: the vector does not hold each of 0, ..., D - 1 once.

    Example:
        >>> Permute(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    constant = "permutation"
    can_be_recomputed = True

    def __init__(self, permutation: Tensor):
        permutation = torch.as_tensor(permutation)
        if permutation.dim() != 1 or sorted(permutation.tolist()) != list(range(len(permutation))):
            raise ValueError(f"expected a vector with each of 0, ..., D - 1 once; got {permutation.tolist()}")
        super().__init__(permutation.shape)
        self.permutation: Tensor = permutation.clone()
        self.derive()

    def derive(self) -> None:
        self.inverse_permutation: Tensor = self.permutation.argsort()
        self.layout: tuple[int, ...] = tuple(self.permutation.tolist())

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.inverse_permutation), y.new_zeros(y.shape[:-1])

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        permutation = self.permutation if forward else self.inverse_permutation
        return changed[permutation.to(changed.device)]


class Squeeze(Bijection):
    r""":math:`(C, H, W) \to (4C, H/2, W/2),\quad \log|\det \partial y / \partial x| = 0`: space to channels
    (Dinh et al. 2017, section 3.6 and figure 3).

    Each square of 2 x 2 pixels of channel c becomes one position with the channels 4c, ..., 4c + 3, in reading order:
    upper left, upper right, lower left, lower right.

    Shapes:
        ``(..., C, H, W)`` with even H and W to ``(..., 4 C, H / 2, W / 2)``; the log-determinant, in nats, is shaped
        like the batch.

    Raises:
        ValueError: the height or width is odd, or the input of the inverse has a number of channels that is not a
            multiple of four.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 4, 4)
        >>> Squeeze()(x)[:, 0, 0]
        tensor([0., 1., 4., 5.])
    """

    can_be_recomputed = True

    def __init__(self):
        super().__init__((None, None, None))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return squeeze(x), x.new_zeros(x.shape[:-3])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return unsqueeze(y), y.new_zeros(y.shape[:-3])

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        *batch_shape, channels, height, width = check_event_shape(self, shape, self.event_shape)
        check_even("Squeeze", (height, width))
        return torch.Size([*batch_shape, 4 * channels, height // 2, width // 2])

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        *batch_shape, channels, height, width = check_event_shape(self, shape, self.event_shape)
        if channels % 4:
            raise ValueError(f"Squeeze.inv expected a multiple of 4 channels; got shape {tuple(shape)}")
        return torch.Size([*batch_shape, channels // 4, 2 * height, 2 * width])

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        return squeeze(changed) if forward else unsqueeze(changed)
