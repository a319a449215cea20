# SPDX-License-Identifier: Apache-2.0
"""Ready-made flows of images, from base to data: several scales, half of the entries leaving at each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..bijections import masks
from ..bijections.bijection import Bijection
from ..bijections.compose import Compose
from ..bijections.conditioners import ConvResNet
from ..bijections.coupling import AffineCoupling, Coupling
from ..bijections.factor_out import FactorOut
from ..bijections.linear import InvertibleLinear
from ..bijections.masks import Mask
from ..bijections.normalization import ActNorm
from ..bijections.reshape import Squeeze


def _act_norm(channels: int) -> Bijection:
    return ActNorm(channels, event_dim=3)


def image_real_nvp(
    image_shape: Sequence[int],
    *,
    num_scales: int | None = None,
    num_couplings: int = 3,
    hidden_channels: int = 32,
    num_blocks: int = 2,
    context_dim: int = 0,
    context_image: Sequence[int] | None = None,
    max_log_scale: float | None = None,
    coupling: type[Coupling] = AffineCoupling,
    conditioner: Callable[..., nn.Module] | None = None,
    between: Callable[[int], Bijection] | None = _act_norm,
    checkpoint: bool = False,
) -> Bijection:
    r"""The multi-scale RealNVP of images, base to data (Dinh et al. 2017, sections 3.4 to 3.6). Identity at birth.

    From data to latent, at each scale: ``num_couplings`` couplings with alternating checkerboards, a squeeze,
    ``num_couplings`` with alternating halves of the channels; then half of the entries leave, every other pixel of each
    channel (eqs. 13-14). At the last scale: one more coupling, all with checkerboards. What has left is put back where
    it came from, so that the latent is an image of the same shape; :func:`latent_scales` says which entry left where.

    Its data are real images without bounds. For pixels, put ``Logit().inv`` behind it, and for integer levels wrap the
    :class:`Flow` in a :class:`DequantizedFlow`.

    Args:
        image_shape: (C, H, W).
        num_scales: how many scales, 1 for no squeeze; by default as many as leave 4 x 4 pixels or more. Height and
            width must be multiples of 2 to this power.
        num_couplings: couplings before and after each squeeze.
        hidden_channels: channels of each coupling's :class:`ConvResNet`.
        num_blocks: its residual blocks.
        context_dim: width of the context for a conditional flow, 0 for none.
        context_image: the shape (C', H, W) of a context that is an image, of the same height and width, and is given
            flattened.
        max_log_scale: the bound of each coupling's log-scale; by default the coupling's own.
        coupling: :class:`AffineCoupling`, :class:`AdditiveCoupling`, :class:`VolumePreservingCoupling` or a
            :class:`Coupling` of your own.
        conditioner: makes the networks in place of ``ConvResNet``, given the numbers of channels of input and output
            (and ``context_dim=``, or ``context_image=`` and ``context_scale=``, if there is a context). The last layer
            of each should start at zero.
        between: makes a bijection of so many channels that stands, from data to latent, before each coupling: by
            default an :class:`ActNorm`, which the first training batch initialises. (The paper's has batch
            normalisation: ``lambda channels: BatchNorm(channels, event_dim=3)``.) ``None`` for none.
        checkpoint: compute what happens inside each coupling again in the backward pass instead of keeping it: far less
            memory, for about a third more time.

    Raises:
        ValueError: an image shape that is not (C, H, W), too small or too odd for the scales.

    Example:
        >>> flow = image_real_nvp((1, 8, 8), hidden_channels=8)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> torch.equal(flow(x), x)  # identity at birth
        True
    """
    make = _coupling_maker(
        image_shape, coupling, conditioner, hidden_channels, num_blocks, context_dim, context_image, max_log_scale
    )

    def parts(mask_of: Callable[[int, int], Mask], channels: int, scale: int, count: int) -> list[Bijection]:
        couplings = []
        for k in range(count):
            couplings += [between(channels)] if between is not None else []
            couplings.append(make(mask_of(channels, k % 2), scale))
        return couplings

    def layers(channels: int, scale: int, is_last: bool) -> list[Bijection]:
        if is_last:
            return parts(masks.checkerboard, channels, scale, num_couplings + 1)
        checkerboards = parts(masks.checkerboard, channels, scale, num_couplings)
        return [*checkerboards, Squeeze(), *parts(masks.channelwise, 4 * channels, scale, num_couplings), Squeeze().inv]

    if num_couplings < 2:
        raise ValueError(f"expected num_couplings >= 2, so that every pixel is changed; got {num_couplings}")
    return _multi_scale(*_checked(image_shape, num_scales), layers, checkpoint).inv


def glow(
    image_shape: Sequence[int],
    *,
    num_scales: int | None = None,
    num_couplings: int = 8,
    hidden_channels: int = 64,
    num_blocks: int = 1,
    context_dim: int = 0,
    context_image: Sequence[int] | None = None,
    max_log_scale: float | None = None,
    coupling: type[Coupling] = AffineCoupling,
    conditioner: Callable[..., nn.Module] | None = None,
    checkpoint: bool = False,
) -> Bijection:
    r"""The arrangement of Glow, base to data (Kingma & Dhariwal 2018, figure 2). Identity at birth.

    From data to latent, at each scale: a squeeze, then ``num_couplings`` times :class:`ActNorm`, a 1 x 1 convolution
    (:class:`InvertibleLinear`) and a coupling of the channels; then half of the entries leave. What has left is put
    back where it came from, so that the latent is an image of the same shape.

    Args and errors are those of :func:`image_real_nvp`. Of the couplings there are ``num_couplings`` at each scale.

    Example:
        >>> flow = glow((3, 8, 8), num_couplings=2, hidden_channels=8)
        >>> flow(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 3, 8, 8])
    """
    make = _coupling_maker(
        image_shape, coupling, conditioner, hidden_channels, num_blocks, context_dim, context_image, max_log_scale
    )

    def layers(channels: int, scale: int, is_last: bool) -> list[Bijection]:
        steps: list[Bijection] = []
        for k in range(num_couplings):
            steps += [_act_norm(4 * channels), InvertibleLinear(4 * channels, event_dim=3)]
            steps.append(make(masks.channelwise(4 * channels, k % 2), scale))
        return [Squeeze(), *steps, Squeeze().inv]

    if num_couplings < 2:
        raise ValueError(f"expected num_couplings >= 2, so that every channel is changed; got {num_couplings}")
    return _multi_scale(*_checked(image_shape, num_scales), layers, checkpoint).inv


def latent_scales(image_shape: Sequence[int], *, num_scales: int | None = None) -> Tensor:
    """At which scale each latent entry of an :func:`image_real_nvp` or :func:`glow` left: 1 the finest.

    Args:
        image_shape: (C, H, W).
        num_scales: as it was given to the flow.

    Returns:
        Integers of shape (C, H, W).

    Example:
        >>> latent_scales((1, 4, 4), num_scales=2)
        tensor([[[1, 2, 1, 2],
                 [2, 1, 2, 1],
                 [1, 2, 1, 2],
                 [2, 1, 2, 1]]])
    """
    image_shape, num_scales = _checked(image_shape, num_scales)
    scales = torch.full(image_shape, 1)
    if num_scales > 1:
        channels, height, width = image_shape
        later = 1 + latent_scales((2 * channels, height // 2, width // 2), num_scales=num_scales - 1)
        scales = masks.checkerboard(channels).join(torch.ones_like(later), later)
    return scales


def _multi_scale(
    shape: torch.Size,
    num_scales: int,
    layers: Callable[[int, int, bool], list[Bijection]],
    checkpoint: bool,
    scale: int = 1,
) -> Compose:
    """Data to latent: at each scale its layers, then half of the entries leave.

    The layers are made for so many channels, networks on images so many times smaller, and the last scale or not.
    """
    channels, height, width = shape
    leave = []
    if num_scales > 1:
        smaller = torch.Size([2 * channels, height // 2, width // 2])
        rest = _multi_scale(smaller, num_scales - 1, layers, checkpoint, 2 * scale)
        leave = [FactorOut(masks.checkerboard(channels), rest)]
    own = layers(channels, 2 * scale, num_scales == 1)
    return Compose([*own, *leave], event_shape=shape, checkpoint=checkpoint)


def _coupling_maker(
    image_shape, coupling, conditioner, hidden_channels, num_blocks, context_dim, context_image, max_log_scale
) -> Callable[[Mask, int], Coupling]:
    """Makes a coupling with its network, given the mask and how many times smaller its image is."""
    if context_image is not None:
        if context_dim or len(context_image) != 3 or tuple(context_image[1:]) != tuple(image_shape[1:]):
            raise ValueError(
                f"expected a context_image (C, H, W) of the image's height and width, and no context_dim; "
                f"got {tuple(context_image)} and {context_dim} for an image of shape {tuple(image_shape)}"
            )
        context_dim = torch.Size(context_image).numel()
    options = coupling.check_options(max_log_scale=max_log_scale)

    def make(mask: Mask, scale: int) -> Coupling:
        given: dict = {"context_dim": context_dim} if context_dim else {}
        if context_image is not None:
            given = {"context_image": context_image, "context_scale": scale}
        channels = mask.num_kept, mask.num_changed * coupling.outputs_per_entry
        if conditioner is None:
            net = ConvResNet(*channels, hidden_channels, num_blocks, **given)
        else:
            net = conditioner(*channels, **given)
        return coupling(mask, net, context_dim=context_dim, **options)

    return make


def _checked(image_shape: Sequence[int], num_scales: int | None) -> tuple[torch.Size, int]:
    """The image's shape, and the number of scales, by default the most that leave 4 x 4 pixels or more."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"expected image_shape to be (channels, height, width); got {tuple(image_shape)}")
    size = image_shape[1:]
    if num_scales is None:
        num_scales = 1
        while all(n % 2 ** (num_scales + 1) == 0 and n // 2**num_scales >= 4 for n in size):
            num_scales += 1
    if num_scales < 1:
        raise ValueError(f"expected num_scales >= 1; got {num_scales}")
    multiple = 2**num_scales
    if any(n % multiple for n in size):
        up = [-n % multiple for n in size]
        raise ValueError(
            f"expected height and width to be multiples of {multiple}, for {num_scales} scales; "
            f"got (C, H, W) = {tuple(image_shape)}: pad the images, "
            f"e.g. torch.nn.functional.pad(x, (0, {up[1]}, 0, {up[0]})), or use fewer scales"
        )
    return torch.Size(image_shape), num_scales
