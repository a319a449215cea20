# SPDX-License-Identifier: Apache-2.0
"""The masks that split an event in two: a coupling keeps and reads the entries with b = 1, and changes the others."""

import operator

import torch
from torch import Tensor

from .constants import Constants
from .inputs import check_even
from .shapes import squeeze, unsqueeze


class Mask(Constants):
    r"""Splits an event :math:`x` into the kept :math:`x_{b=1}` and the changed :math:`x_{b=0}`, and joins them again
    (the binary mask b of Dinh et al. 2017, eq. 9).

    The network of a coupling gets only the kept entries, so it computes nothing that a multiplication by b would throw
    away. ``b`` is saved, loaded and moved with the module. It is no buffer, so that averages of buffers leave it as it
    is.

    Args:
        b: a boolean vector with at least one True and one False, which runs over the first axis of an event.
        event_dim: the number of axes of an event: 1 for vectors, 3 for images, whose first axis holds the channels.
        squeeze: whether to squeeze an image first (see :class:`Squeeze`), so that b runs over the 4 sub-pixels of each
            channel.

    Raises:
        ValueError: b is not a boolean vector with both values, or an event does not fit it.

    Example:
        >>> mask = Mask(torch.tensor([True, False, False]))
        >>> kept, changed = mask.split(torch.tensor([1.0, 2.0, 3.0]))
        >>> kept, changed
        (tensor([1.]), tensor([2., 3.]))
        >>> mask.join(kept, changed)
        tensor([1., 2., 3.])
    """

    constant = "b"

    def __init__(self, b: Tensor, *, event_dim: int = 1, squeeze: bool = False):
        super().__init__()
        b = torch.as_tensor(b)
        if b.dim() != 1 or b.dtype != torch.bool:
            raise ValueError(
                f"expected a mask of shape (input_dim,) and dtype torch.bool; got {tuple(b.shape)}, {b.dtype}"
            )
        if event_dim < 1 or (squeeze and (event_dim != 3 or len(b) % 4)):
            raise ValueError(
                f"expected event_dim >= 1, and with squeeze event_dim=3 and 4 entries of b for each channel; "
                f"got event_dim={event_dim}, squeeze={squeeze}, {len(b)} entries"
            )
        self.event_dim = event_dim
        self.squeeze = squeeze
        self.event_shape: tuple[int | None, ...] = (len(b) // 4 if squeeze else len(b),) + (None,) * (event_dim - 1)
        self.b: Tensor = b.clone()
        self.derive()

    def derive(self) -> None:
        """Derives from b how `split` and `join` work.

        Halves and even/odd masks split an event into views, which costs nothing. All other masks copy by an index.
        """
        if self.b.all() or not self.b.any():
            raise ValueError(
                f"expected a mask that keeps some entries and changes some; got all {bool(self.b.all())}: "
                "a coupling needs both"
            )
        b = self.b.cpu()
        self.num_kept: int = int(b.sum())
        self.num_changed: int = int((~b).sum())
        # The entries in the order of `split`: first the kept, then the changed.
        order = torch.argsort(~b, stable=True)
        self.layout: tuple[int, ...] = tuple(order.tolist())
        self.kept_first: bool = bool(b[0])
        flips = int((b[1:] != b[:-1]).sum())
        self.is_halves: bool = flips == 1
        self.is_interleaved: bool = flips == len(b) - 1 and len(b) % 2 == 0
        sizes = self.num_kept, self.num_changed
        self.sizes: tuple[int, int] = sizes[::-1] if self.is_halves and not self.kept_first else sizes
        if self.is_halves or self.is_interleaved:
            self.order = self.inverse_order = None
        else:
            self.order: Tensor | None = order.to(self.b.device)
            self.inverse_order: Tensor | None = torch.argsort(self.order)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the kept and the changed entries of an event.

        For a vector, their shapes are ``(..., num_kept)`` and ``(..., num_changed)``. For an image, height and width
        follow, and a mask that squeezes halves them.
        """
        dim = -self.event_dim
        if x.dim() < self.event_dim or x.shape[dim] != self.event_shape[0]:
            expected = str(self.event_shape).replace("None", "any size")
            raise ValueError(f"expected event shape {expected}, which fits the mask; got shape {tuple(x.shape)}")
        if self.squeeze:
            check_even("a checkerboard", x.shape)
            x = squeeze(x)
        if self.is_halves:
            first, second = x.split(self.sizes, dim)
        elif self.is_interleaved:
            first, second = x.unflatten(dim, (-1, 2)).unbind(dim)
        else:
            return x.index_select(dim, self.order).split(self.sizes, dim)
        return (first, second) if self.kept_first else (second, first)

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        """Returns the event with these kept and changed entries: the inverse of :meth:`split`."""
        dim = -self.event_dim
        pair = [kept, changed] if self.kept_first else [changed, kept]
        if self.is_halves:
            x = torch.cat(pair, dim)
        elif self.is_interleaved:
            x = torch.stack(pair, dim).flatten(dim - 1, dim)
        else:
            x = torch.cat([kept, changed], dim).index_select(dim, self.inverse_order)
        return unsqueeze(x) if self.squeeze else x

    def __invert__(self) -> "Mask":
        """Returns the mask that keeps the entries that this mask changes, and changes those that it keeps."""
        return Mask(~self.b, event_dim=self.event_dim, squeeze=self.squeeze)

    def extra_repr(self) -> str:
        bits = "".join("1" if bit else "0" for bit in self.b)
        return ", ".join(filter(None, [bits, self.architecture_repr()]))

    def architecture_repr(self) -> str:
        """Returns the options of the mask, which a saved file records beside the state; the state holds b."""
        image_options = [f"event_dim={self.event_dim}"] * (self.event_dim > 1) + ["squeeze"] * self.squeeze
        return ", ".join(image_options)


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
    """Keeps a random half of the entries, which is drawn once and saved with the module.

    >>> random(6).num_kept
    3
    """
    return Mask(torch.randperm(_checked(input_dim), generator=generator) < (input_dim + 1) // 2)


def channelwise(channels: int, parity: int = 0) -> Mask:
    """Keeps the first half of an image's channels (parity 0) or the second (parity 1), at all positions
    (Dinh et al. 2017, figure 3, right).

    >>> kept, changed = channelwise(4).split(torch.zeros(10, 4, 8, 8))
    >>> kept.shape, changed.shape
    (torch.Size([10, 2, 8, 8]), torch.Size([10, 2, 8, 8]))
    """
    if operator.index(channels) < 2:
        raise ValueError(f"expected two or more channels to split; got {channels}: squeeze first, or use checkerboard")
    return Mask(half(channels, parity).b, event_dim=3)


def checkerboard(channels: int, parity: int = 0) -> Mask:
    """Keeps the pixels of an image whose row + column is even (parity 0) or odd (parity 1), in all channels
    (Dinh et al. 2017, figure 3, left). Height and width must be even.

    The mask keeps one diagonal of each square of 2 x 2 pixels, which are two of the four sub-pixels of the squeezed
    image. So both parts are images with twice the channels and half the height and width, and a network computes
    nothing that is thrown away.

    >>> kept, changed = checkerboard(1).split(torch.arange(16.0).reshape(1, 4, 4))
    >>> kept.shape, kept[:, 0, 0]  # the diagonal of the first square
    (torch.Size([2, 2, 2]), tensor([0., 5.]))
    """
    if operator.index(channels) < 1:
        raise ValueError(f"expected one or more channels; got {channels}")
    diagonal = torch.tensor([True, False, False, True]) ^ bool(parity)
    return Mask(diagonal.repeat(channels), event_dim=3, squeeze=True)


def _checked(input_dim: int) -> int:
    if operator.index(input_dim) < 2:
        raise ValueError(f"expected input_dim >= 2, since a mask splits an event in two; got {input_dim}")
    return input_dim
