# SPDX-License-Identifier: Apache-2.0
"""The networks that compute log-scale and shift."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if context is not None or self.context_dim:
            self._check_context(context)
            h = h + self.context(context)
        activation = self.activation
        for layer in self.hidden:
            update = layer(activation(h))
            h = h + update if self.residual else update
        return self.last(activation(h))

    def _check_context(self, context: Tensor | None) -> None:
        got = "none" if context is None else f"one of shape {tuple(context.shape)}"
        if not self.context_dim:
            raise ValueError(f"expected no context; got {got}: build it with context_dim={context.shape[-1]}")
        if context is None or context.shape[-1:] != (self.context_dim,):
            raise ValueError(f"expected a context of shape (..., {self.context_dim}); got {got}")
