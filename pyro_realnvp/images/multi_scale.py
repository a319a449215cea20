# SPDX-License-Identifier: Apache-2.0
"""Ready-made multi-scale flows of images, from base to data: half of the entries are factored out at each scale."""

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
    checkpoint: bool | str = False,
) -> Bijection:
    r"""The multi-scale RealNVP of images, from base to data (Dinh et al. 2017, sections 3.4 to 3.6). A new flow is the
    identity.

    From data to latent, each scale consists of ``num_couplings`` couplings with alternating checkerboard masks, a
    squeeze, and ``num_couplings`` couplings with alternating channel-wise masks. Then every other pixel of each channel
    is factored out (eqs. 13-14). The last scale has ``num_couplings`` + 1 couplings, all with checkerboard masks. The
    factored-out entries return to their positions, so that the latent is an image of the same shape;
    :func:`latent_scales` returns the scale of each entry.

    The flow models real images without bounds. For pixels in [0, 1], put ``Logit().inv`` behind it; for integer levels,
    also wrap the :class:`Flow` in a :class:`DequantizedFlow`.

    Args:
        image_shape: the shape (C, H, W) of one image.
        num_scales: the number of scales, 1 for no squeeze; by default the most that leave 4 x 4 pixels or more. Height
            and width must be multiples of 2 to this power.
        num_couplings: the number of couplings before and after each squeeze, at least 2.
        hidden_channels: the number of hidden channels of each coupling's :class:`ConvResNet`.
        num_blocks: the number of residual blocks of each ``ConvResNet``.
        context_dim: the width of the context of a conditional flow, 0 for none.
        context_image: the shape (C', H, W) of a context that is an image of the same height and width. The flow takes
            this image flattened.
        max_log_scale: the bound of each coupling's log-scale; by default the coupling's own.
        coupling: :class:`AffineCoupling`, :class:`AdditiveCoupling`, :class:`VolumePreservingCoupling`,
            :class:`SplineCoupling` or a :class:`Coupling` of your own.
        conditioner: a function that makes the networks in place of ``ConvResNet``. It takes the numbers of input and
            output channels and, if there is a context, ``context_dim=``, or ``context_image=`` and ``context_scale=``.
            The last layer of each network should start at zero.
        between: a function of the number of channels that makes the bijection before each coupling (from data to
            latent); ``None`` for none. By default it makes an :class:`ActNorm`, which the first training batch
            initializes. For the paper's batch normalization pass ``lambda channels: BatchNorm(channels, event_dim=3)``.
        checkpoint: True, and the backward pass recomputes the inside of each coupling instead of keeping it. This takes
            far less memory, and about a third more time. ``"inverse"`` recomputes the couplings' inputs too, see
            :class:`Compose`.

    Raises:
        ValueError: ``image_shape`` is not (C, H, W), height or width do not fit the number of scales, ``num_scales`` is
            less than 1 or ``num_couplings`` less than 2, the context image has another height or width, or the coupling
            does not have one of the options.

    Example:
        >>> flow = image_real_nvp((1, 8, 8), hidden_channels=8)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> torch.equal(flow(x), x)  # a new flow is the identity
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
    checkpoint: bool | str = False,
) -> Bijection:
    r"""A flow with the layers of Glow, from base to data (Kingma & Dhariwal 2018, figure 2). A new flow is the
    identity.

    From data to latent, each scale consists of a squeeze and ``num_couplings`` times an :class:`ActNorm`, a 1 x 1
    convolution (:class:`InvertibleLinear`) and a coupling with a channel-wise mask. Then half of the entries are
    factored out, as in :func:`image_real_nvp`, so that the latent is an image of the same shape.

    Args and errors are those of :func:`image_real_nvp`, except that ``num_couplings`` is the number of couplings of
    each scale, and that there is no ``between``.

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
    """The scale at which each latent entry of an :func:`image_real_nvp` or :func:`glow` is factored out.

    The finest scale is 1. The last scale holds all entries that were not factored out before.

    Args:
        image_shape: the shape (C, H, W) of one image.
        num_scales: the number of scales that was passed to the flow.

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
    checkpoint: bool | str,
    scale: int = 1,
) -> Compose:
    """The flow from data to latent: the layers of each scale, then the rest after half of the entries are factored out.

    Args:
        shape: the shape (C, H, W) of the images at this scale.
        num_scales: the number of scales from this one on.
        layers: a function that makes the layers of a scale. It takes the number of channels, how many times smaller
            than the whole image the squeezed image is, and whether this is the last scale.
        checkpoint: as in :func:`image_real_nvp`.
        scale: how many times smaller the images at this scale are than the whole image.
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
    """A function that makes a coupling and its network.

    It takes the mask, and how many times smaller than the whole image the input of the network is: a network with a
    context image must squeeze that image by this factor.
    """
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


def check_image_shape(image_shape: Sequence[int]) -> None:
    """Raises an error unless the shape is one of an image."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"expected image_shape to be (channels, height, width); got {tuple(image_shape)}")


def _checked(image_shape: Sequence[int], num_scales: int | None) -> tuple[torch.Size, int]:
    """Checks both arguments. Without ``num_scales`` it chooses the most scales that leave 4 x 4 pixels or more."""
    check_image_shape(image_shape)
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
        remedy = f"pad the images, e.g. torch.nn.functional.pad(x, (0, {up[1]}, 0, {up[0]}))"
        remedy += ", or use fewer scales" * (num_scales > 1)
        if size[1] <= 4 < min(image_shape[0], size[0]):
            first = (size[1], image_shape[0], size[0])
            remedy = f"the channels come first, so if they are last, pass {first} and x.movedim(-1, -3); or {remedy}"
        raise ValueError(
            f"expected height and width to be multiples of {multiple}, for {num_scales} scales; "
            f"got (C, H, W) = {tuple(image_shape)}: {remedy}"
        )
    return torch.Size(image_shape), num_scales
