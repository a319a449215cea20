# SPDX-License-Identifier: Apache-2.0
"""The conditioners: the networks that compute the parameters of a coupling, such as log-scale and shift."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .modes import is_eager
from .shapes import squeeze


class MLP(nn.Module):
    r"""A perceptron :math:`h_0 = W_0 x + V c,\ h_{l+1} = W_{l+1}\,\sigma(h_l)`, whose output is zero at first.

    The last layer starts at zero, so that a coupling starts as the identity. A linear map of its own, V, takes the
    context into the first layer, so that the context broadcasts with the batch and is never copied.

    Args:
        in_features: the width of the input x.
        out_features: the width of the output.
        hidden_dims: the widths of the hidden layers, at least one.
        context_dim: the width of the context c, 0 for none.
        activation: a function without arguments that makes the activation, e.g. ``torch.nn.ReLU``.
        residual: whether each hidden layer after the first adds its input; their widths must then be equal.

    Shapes:
        ``(..., in_features)`` and a context ``(..., context_dim)``, whose batch shapes broadcast, to
        ``(..., out_features)``.

    Raises:
        ValueError: a width is not positive, the hidden widths are unequal although ``residual`` is set, or the
            context is missing, unexpected or of the wrong width.

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
        for name, width in {"in_features": in_features, "out_features": out_features}.items():
            if width < 1:
                raise ValueError(f"expected {name} >= 1; got {width}")
        hidden_dims = tuple(hidden_dims)
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError(f"expected at least one hidden width, all positive; got hidden_dims={hidden_dims}")
        if residual and len(set(hidden_dims)) > 1:
            raise ValueError(f"expected equal widths for residual layers; got hidden_dims={hidden_dims}")
        self.context_dim = context_dim
        self.residual = residual
        self.first: nn.Linear = nn.Linear(in_features, hidden_dims[0])
        self.context: nn.Module | None = nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        self.hidden: nn.ModuleList = nn.ModuleList(nn.Linear(m, n) for m, n in zip(hidden_dims, hidden_dims[1:]))
        self.last: nn.Linear = nn.Linear(hidden_dims[-1], out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.activation: nn.Module = activation()

    def extra_repr(self) -> str:
        return "residual" * self.residual

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        apply = _called if torch.compiler.is_compiling() or _has_any_global_hook() else _applied
        layers = self._modules  # `self.first` takes a fifth of the time of a small activation
        activation = layers["activation"]
        h = apply(layers["first"], x)
        if context is not None or self.context_dim:
            _check_context(context, self.context_dim)
            h = h + apply(layers["context"], context)
        for layer in layers["hidden"]:
            update = apply(layer, apply(activation, h))
            h = h + update if self.residual else update
        return apply(layers["last"], apply(activation, h))


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), without a module call if nothing watches the layer: the calls take a fifth of a small network's time.

    With that of global hooks, the conditions are those under which a :class:`torch.nn.Module` calls only `forward`.
    """
    state = vars(layer)
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "_compiled_call_impl" in state
        or type(layer).__call__ is not nn.Module.__call__
    ):
        return layer(x)
    parameters = state["_parameters"]
    if type(layer) is nn.Linear and "forward" not in state and parameters.keys() == {"weight", "bias"}:
        return F.linear(x, parameters["weight"], parameters["bias"])
    return layer.forward(x)


class WeightNormConv(nn.Conv2d):
    r"""A convolution with the kernels :math:`w = g\, v / \lVert v \rVert`, where g and v are learned
    (Salimans & Kingma 2016, eq. 2). At first w = v.

    Unlike torch's own weight normalization, it can be copied and pickled like any module.

    The arguments and shapes are those of :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gain: nn.Parameter = nn.Parameter(self._norm().detach())

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        # The kernel behind torch.nn.utils.parametrizations.weight_norm serves eager tensors only. Compilers and
        # torch.func take the formula.
        if is_eager(self.weight, self.gain):
            weight = torch._weight_norm(self.weight, self.gain, 0)
        else:
            weight = self.weight * (self.gain / self._norm())
        return self._conv_forward(x, weight, self.bias)


class ConvResNet(nn.Module):
    r"""A convolutional residual network :math:`h_0 = W_0 * x + V c,\ h_{l+1} = h_l + B_l(h_l)` with skip connections,
    which passes :math:`\sum_l S_l * h_l` to its last layer (Dinh et al. 2017, section 4.1).

    The last layer starts at zero, so that a coupling starts as the identity.
    Each block :math:`B_l` is ReLU, 3 x 3 convolution, ReLU, 3 x 3 convolution; each :math:`S_l` is a 1 x 1 convolution.
    :math:`W_0` and these convolutions are weight-normalized; V and the last layer, ReLU and 1 x 1 convolution, are not.

    Args:
        in_channels: the number of channels of the input.
        out_channels: the number of channels of the output.
        hidden_channels: the number of channels of all hidden layers.
        num_blocks: the number of residual blocks.
        context_dim: the width of the context, 0 for none. A linear map adds the same values at all positions.
        context_image: the shape (C, H, W) of the context, if it is an image. The context is then passed in flattened,
            and a convolution takes it in, so that each position reads the context around it.
        context_scale: the ratio of the height and width of that image to those of the input. The image is squeezed by
            this factor before the convolution.
        batch_norm: whether to normalize by the batch before each ReLU, as the paper does. In train mode the density of
            an image then depends on the rest of its batch, and sampling does not invert it, since it sees another
            batch: use ``eval`` mode for both. With ``Compose(checkpoint=True)`` the running averages move twice a step.

    Shapes:
        ``(..., in_channels, H, W)`` and a context ``(..., context_dim)``, whose batch shapes broadcast, to
        ``(..., out_channels, H, W)``.

    Raises:
        ValueError: a number of channels or blocks is not positive, the context is missing, unexpected or of the wrong
            width, or the ``context_image`` is not ``context_scale`` times as high and wide as the input.

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
        self.context_image: tuple[int, ...] | None = None if context_image is None else tuple(context_image)
        self.context_dim: int = context_dim if context_image is None else math.prod(context_image)
        self.context_scale = context_scale

        def norm() -> nn.Module:
            return nn.BatchNorm2d(hidden_channels) if batch_norm else nn.Identity()

        def conv(kernel_size: int) -> nn.Module:
            return WeightNormConv(hidden_channels, hidden_channels, kernel_size, padding=kernel_size // 2)

        self.first: WeightNormConv = WeightNormConv(in_channels, hidden_channels, 3, padding=1)
        if self.context_image:
            channels = self.context_image[0] * context_scale**2
            self.context: nn.Module | None = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        else:
            self.context = nn.Linear(context_dim, hidden_channels, bias=False) if context_dim else None
        self.blocks: nn.ModuleList = nn.ModuleList(
            nn.Sequential(norm(), nn.ReLU(), conv(3), norm(), nn.ReLU(inplace=True), conv(3)) for _ in range(num_blocks)
        )
        self.skips: nn.ModuleList = nn.ModuleList(conv(1) for _ in range(num_blocks + 1))
        self.last: nn.Sequential = nn.Sequential(
            norm(), nn.ReLU(inplace=True), nn.Conv2d(hidden_channels, out_channels, 1)
        )
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
        """Returns the term that the context adds to the hidden channels; it broadcasts over the positions."""
        if not self.context_image:
            return self.context(context)[..., None, None]
        if self.context_image[1:] != tuple(self.context_scale * n for n in size):
            raise ValueError(
                f"expected a context image {self.context_scale} x the input's {tuple(size)}; got one of shape "
                f"{self.context_image}: pass its size relative to the input as context_scale="
            )
        image = squeeze(context.reshape(-1, *self.context_image), self.context_scale)
        features = self.context(image)
        return features.reshape(context.shape[:-1] + features.shape[1:])


def _channels_last(x: Tensor) -> Tensor:
    """Returns the images with one batch axis, in the memory format in which convolutions are fastest."""
    x = x.reshape(-1, *x.shape[-3:])
    return x.to(memory_format=torch.channels_last) if is_eager(x) else x


def _check_context(context: Tensor | None, context_dim: int) -> None:
    got = "none" if context is None else f"one of shape {tuple(context.shape)}"
    if not context_dim:
        raise ValueError(f"expected no context; got {got}: build the network with context_dim={context.shape[-1]}")
    if context is None or context.shape[-1:] != (context_dim,):
        raise ValueError(f"expected a context of shape (..., {context_dim}); got {got}")
