# SPDX-License-Identifier: Apache-2.0
"""How a coupling splits an event in two: b = 1 is kept and read by the network, b = 0 is changed."""

import operator

import torch
from torch import Tensor, nn


class Mask(nn.Module):
    r"""Splits an event :math:`x` into the kept :math:`x_{b=1}` and the changed :math:`x_{b=0}`, and joins them again.

    (The binary mask b of Dinh et al. 2017, eq. 9. The network sees only the kept half, so nothing is computed for the
    entries that a multiplication by b would throw away.) ``b`` is a buffer: it is saved, loaded and moved with the
    module.

    Args:
        b: a boolean vector with at least one True and one False.

    Example:
        >>> mask = Mask(torch.tensor([True, False, False]))
        >>> kept, changed = mask.split(torch.tensor([1.0, 2.0, 3.0]))
        >>> kept, changed
        (tensor([1.]), tensor([2., 3.]))
        >>> mask.join(kept, changed)
        tensor([1., 2., 3.])
    """

    def __init__(self, b: Tensor):
        super().__init__()
        b = torch.as_tensor(b)
        if b.dim() != 1 or b.dtype != torch.bool:
            raise ValueError(
                f"expected a mask of shape (input_dim,) and dtype torch.bool; got {tuple(b.shape)}, {b.dtype}"
            )
        self.register_buffer("b", b.clone())
        self.register_buffer("order", None, persistent=False)
        self.register_buffer("inverse_order", None, persistent=False)
        self._plan()

    def _plan(self) -> None:
        """Derives from b what split and join do: halves and even/odd masks are views, all others index."""
        if self.b.all() or not self.b.any():
            raise ValueError(
                f"expected a mask that keeps some entries and changes some; got all {bool(self.b.all())}: "
                "a coupling needs both"
            )
        b = self.b.cpu()
        self.num_kept, self.num_changed = int(b.sum()), int((~b).sum())
        self.kept_first = bool(b[0])
        flips = int((b[1:] != b[:-1]).sum())
        self.is_halves = flips == 1
        self.is_interleaved = flips == len(b) - 1 and len(b) % 2 == 0
        self.sizes = [self.num_kept, self.num_changed]
        if self.is_halves and not self.kept_first:
            self.sizes.reverse()
        if self.is_halves or self.is_interleaved:
            self.order = self.inverse_order = None
        else:
            self.order = torch.argsort(~self.b, stable=True)
            self.inverse_order = torch.argsort(self.order)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the changed entries, of shapes ``(..., num_kept)`` and ``(..., num_changed)``."""
        if x.shape[-1] != self.num_kept + self.num_changed:
            raise ValueError(f"expected event shape {tuple(self.b.shape)}, the mask's; got shape {tuple(x.shape)}")
        if self.is_halves:
            first, second = x.split(self.sizes, -1)
        elif self.is_interleaved:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            return x.index_select(-1, self.order).split(self.sizes, -1)
        return (first, second) if self.kept_first else (second, first)

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        """The event whose kept and changed entries these are."""
        pair = [kept, changed] if self.kept_first else [changed, kept]
        if self.is_halves:
            return torch.cat(pair, -1)
        if self.is_interleaved:
            return torch.stack(pair, -1).flatten(-2)
        return torch.cat([kept, changed], -1).index_select(-1, self.inverse_order)

    def __invert__(self) -> "Mask":
        """The mask that keeps what this one changes."""
        return Mask(~self.b)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plan()

    def extra_repr(self) -> str:
        return "".join("1" if bit else "0" for bit in self.b)


def half(input_dim: int, parity: int = 0) -> Mask:
    """Keeps the first half of the entries (parity 0) or the second (parity 1).

    >>> half(5), half(5, parity=1)
    (Mask(11100), Mask(00011))
    """
    return Mask((torch.arange(_checked(input_dim)) < (input_dim + 1) // 2) ^ bool(parity))


def alternating(input_dim: int, parity: int = 0) -> Mask:
    """Keeps the even entries (parity 0) or the odd ones (parity 1): a checkerboard in one dimension.

    >>> alternating(5), alternating(5, parity=1)
    (Mask(10101), Mask(01010))
    """
    return Mask((torch.arange(_checked(input_dim)) % 2 == 0) ^ bool(parity))


def random(input_dim: int, generator: torch.Generator | None = None) -> Mask:
    """Keeps a random half of the entries, drawn once and saved with the module.

    >>> random(6).num_kept
    3
    """
    return Mask(torch.randperm(_checked(input_dim), generator=generator) < (input_dim + 1) // 2)


def _checked(input_dim: int) -> int:
    if operator.index(input_dim) < 2:
        raise ValueError(f"expected input_dim >= 2, since a mask splits an event in two; got {input_dim}")
    return input_dim
