# SPDX-License-Identifier: Apache-2.0
"""The networks that compute log-scale and shift."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .memo import is_eager
from .shapes import squeeze


class MLP(nn.Module):
    r"""A perceptron :math:`h_0 = W_0 x + V c,\ h_{l+1} = W_l\,\sigma(h_l)`, zero at birth.

    The last layer starts at zero, so that a coupling starts as the identity. The context enters the first layer by a
    linear map of its own, so that it is broadcast over the batch, never copied.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_dims: widths of the hidden layers, at least one.
        context_dim: width of the context, 0 for none.
        activation: makes the activation, e.g. ``torch.nn.ReLU``.
        residual: whether each hidden layer after the first adds its input; their widths must then be equal.

    Shapes:
        ``(..., in_features)`` and, broadcastable, ``(..., context_dim)`` to ``(..., out_features)``.

    Raises:
        ValueError: widths that are not positive, or unequal under ``residual``; a context that is missing, unexpected
            or of the wrong width.

    Example:
        >>> import torch
        >>> MLP(3, 4, hidden_dims=(16, 16), context_dim=2)(torch.ones(5, 3), torch.ones(2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.Tanh,
        residual: bool = False,
    ):
        super().__init__()
        hidden_dims = tuple(hidden_dims)
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError(f"expected at least one hidden width, all positive; got hidden_dims={hidden_dims}")
        if residual and len(set(hidden_dims)) > 1:
            raise ValueError(f"residual layers need equal widths; got hidden_dims={hidden_dims}")
        self.context_dim, self.residual = context_dim, residual
        self.first = nn.Linear(in_features, hidden_dims[0])
        self.context = nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(nn.Linear(m, n) for m, n in zip(hidden_dims, hidden_dims[1:]))
        self.last = nn.Linear(hidden_dims[-1], out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.activation = activation()

    def extra_repr(self) -> str:
        return "residual" * self.residual

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if context is not None or self.context_dim:
            _check_context(context, self.context_dim)
            h = h + self.context(context)
        activation = self.activation
        for layer in self.hidden:
            update = layer(activation(h))
            h = h + update if self.residual else update
        return self.last(activation(h))


class WeightNormConv(nn.Conv2d):
    r"""A convolution with the kernels :math:`w = g\, v / \lVert v \rVert`, g and v learned
    (Salimans & Kingma 2016, eq. 2). At birth w = v. It is copied and pickled as any module, as torch's own is not.

    Arguments and shapes are those of :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(self._norm().detach())

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if is_eager(self.weight, self.gain):  # the kernel behind torch.nn.utils.parametrizations.weight_norm
            weight = torch._weight_norm(self.weight, self.gain, 0)
        else:
            weight = self.weight * (self.gain / self._norm())
        return self._conv_forward(x, weight, self.bias)


class ConvResNet(nn.Module):
    r"""A convolutional residual network with skip connections, zero at birth (Dinh et al. 2017, section 4.1):
    :math:`h_0 = W_0 * x + V c,\ h_{l+1} = h_l + B_l(h_l)`, and of :math:`\sum_l S_l * h_l` the last layer.

    Each block B is ReLU, 3 x 3 convolution, ReLU, 3 x 3 convolution; each S is a 1 x 1 convolution; all but the last
    layer are weight-normalised.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        hidden_channels: channels in between.
        num_blocks: residual blocks.
        context_dim: width of the context, 0 for none. It enters by a linear map, the same at all positions.
        context_image: where the context is an image, its shape (C, H, W); the context is this image, flattened. It
            enters by a convolution, so that each position sees what is there.
        context_scale: how many times as high and wide as the input that image is; it is squeezed by as much.
        batch_norm: normalise before each ReLU by the batch, as the paper does; off by default. In train mode the
            density of an image then depends on the rest of its batch, and sampling, which sees another batch, does not
            invert it: use ``eval`` mode for both. (With ``Compose(checkpoint=True)`` its averages move twice a step.)

    Shapes:
        ``(..., in_channels, H, W)`` and, broadcastable, ``(..., context_dim)`` to ``(..., out_channels, H, W)``.

    Raises:
        ValueError: sizes that are not positive; a context that is missing, unexpected or of the wrong width; a
            ``context_image`` whose size is not ``context_scale`` times the input's.

    Example:
        >>> import torch
        >>> ConvResNet(2, 4, hidden_channels=8, context_dim=3)(torch.ones(5, 2, 4, 4), torch.ones(3)).shape
        torch.Size([5, 4, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 32,
        num_blocks: int = 2,
        *,
        context_dim: int = 0,
        context_image: Sequence[int] | None = None,
        context_scale: int = 1,
        batch_norm: bool = False,
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "hidden_channels": hidden_channels}
        for name, size in (sizes | {"num_blocks": num_blocks}).items():
            if size < 1:
                raise ValueError(f"expected {name} >= 1; got {size}")
        self.context_image = None if context_image is None else tuple(context_image)
        self.context_dim = context_dim if context_image is None else math.prod(context_image)
        self.context_scale = context_scale

        def norm() -> nn.Module:
            return nn.BatchNorm2d(hidden_channels) if batch_norm else nn.Identity()

        def conv(kernel_size: int) -> nn.Module:
            return WeightNormConv(hidden_channels, hidden_channels, kernel_size, padding=kernel_size // 2)

        self.first = WeightNormConv(in_channels, hidden_channels, 3, padding=1)
        if self.context_image:
            channels = self.context_image[0] * context_scale**2
            self.context = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        else:
            self.context = nn.Linear(context_dim, hidden_channels, bias=False) if context_dim else None
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(), nn.ReLU(), conv(3), norm(), nn.ReLU(inplace=True), conv(3)) for _ in range(num_blocks)
        )
        self.skips = nn.ModuleList(conv(1) for _ in range(num_blocks + 1))
        self.last = nn.Sequential(norm(), nn.ReLU(inplace=True), nn.Conv2d(hidden_channels, out_channels, 1))
        nn.init.zeros_(self.last[-1].weight)
        nn.init.zeros_(self.last[-1].bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch_shape = x.shape[:-3]
        h = self.first(_channels_last(x))
        if context is not None or self.context_dim:
            _check_context(context, self.context_dim)
            h = h.reshape(batch_shape + h.shape[1:]) + self._features(context, x.shape[-2:])
            batch_shape = h.shape[:-3]
            h = _channels_last(h)
        total = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:]):
            h = h + block(h)
            total = total + skip(h)
        out = self.last(total)
        return out.reshape(batch_shape + out.shape[1:])

    def _features(self, context: Tensor, size: torch.Size) -> Tensor:
        """What the context adds to the hidden channels, broadcastable over the positions."""
        if not self.context_image:
            return self.context(context)[..., None, None]
        if self.context_image[1:] != tuple(self.context_scale * n for n in size):
            raise ValueError(
                f"expected a context image {self.context_scale} x the input's {tuple(size)}; got one of shape "
                f"{self.context_image}: pass context_scale="
            )
        image = squeeze(context.reshape(-1, *self.context_image), self.context_scale)
        features = self.context(image)
        return features.reshape(context.shape[:-1] + features.shape[1:])


def _channels_last(x: Tensor) -> Tensor:
    """A batch of images in the order that convolutions are fastest with."""
    x = x.reshape(-1, *x.shape[-3:])
    return x.to(memory_format=torch.channels_last) if is_eager(x) else x


def _check_context(context: Tensor | None, context_dim: int) -> None:
    got = "none" if context is None else f"one of shape {tuple(context.shape)}"
    if not context_dim:
        raise ValueError(f"expected no context; got {got}: build it with context_dim={context.shape[-1]}")
    if context is None or context.shape[-1:] != (context_dim,):
        raise ValueError(f"expected a context of shape (..., {context_dim}); got {got}")
