# SPDX-License-Identifier: Apache-2.0
"""Normalization layers. Their forward direction is data to latent, so a flow from base to data holds their ``.inv``."""

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .elementwise import column_statistics
from .inputs import check_event_shape, check_tensor
from .modes import is_eager
from .shapes import along_channels, channel_events, positions


class _Normalization(Bijection):
    """The base class of both layers, with statistics for each entry of a vector or each channel of an image."""

    elementwise = True
    sign = 1

    def __init__(self, input_dim: int, event_dim: int):
        super().__init__(channel_events(input_dim, event_dim))

    def _rows(self, x: Tensor) -> Tensor:
        return x.movedim(-len(self.event_shape), -1).reshape(-1, self.event_shape[0])

    def _along(self, values: Tensor) -> Tensor:
        return along_channels(values, len(self.event_shape))

    def _expand(self, ladj: Tensor, x: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        return (positions(x, event_dim) * ladj).expand(x.shape[: x.dim() - event_dim])

    def _is_training_batch(self, x: Tensor) -> bool:
        """Whether x may set or move the statistics: it is a training pass with gradients, over at least two events."""
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        return self.training and torch.is_grad_enabled() and batch_shape.numel() > 1


class ActNorm(_Normalization):
    r""":math:`y = (x - \mu) \odot \exp(-s),\quad \log|\det \partial y / \partial x| = -\sum s`, where :math:`\mu`
    and s are learned after they were initialized from data  (Glow; Kingma & Dhariwal 2018, section 3.1).

    Until it is initialized, the bijection is the identity. The initialization gives each column of y mean 0 and
    standard deviation 1; a constant column gets mean 0 and keeps its scale. It happens when you call
    :meth:`initialize`, or in the first pass in the data direction, which is forward, if that pass runs in train mode,
    with gradients, on at least two rows. Other passes (sampling, ``eval`` mode, ``no_grad``) never initialize it.

    Parameters that come from elsewhere (a moving average, ``vector_to_parameters``, ``copy_``) count as initialized,
    as soon as one of them differs from 0, and are never overwritten. The ``state_dict`` holds the flag ``initialized``.
    The initializing pass branches on values, so initialize before you compile the train mode with
    ``torch.compile(fullgraph=True)``.

    Args:
        input_dim: the size D of a vector, or the number D of channels of an image.
        event_dim: the number of axes of an event: 1 for vectors, 3 for images, whose first axis holds the channels.
            Each channel is normalized over all positions.

    Shapes:
        ``(..., D)`` to ``(..., D)``; images ``(..., D, H, W)`` to the same. The log-determinant, in nats, is shaped
        like the batch.

    Raises:
        ValueError: the values of the initialization are not finite.

    Example:
        >>> f = ActNorm(2).initialize(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> f(torch.tensor([1.0, 20.0]))
        tensor([0., 0.], grad_fn=<...>)
        >>> f.initialized
        True
    """

    def __init__(self, input_dim: int, *, event_dim: int = 1):
        super().__init__(input_dim, event_dim)
        self.loc: nn.Parameter = nn.Parameter(torch.zeros(input_dim))
        self.log_scale: nn.Parameter = nn.Parameter(torch.zeros(input_dim))
        self._initialized = False

    @property
    def initialized(self) -> bool:
        """Whether the parameters hold something that a pass must not overwrite."""
        if not self._initialized:
            self._initialized = bool(self.loc.any() or self.log_scale.any())
        return self._initialized

    @property
    def needs_data(self) -> bool:
        return not self.initialized

    @property
    def can_be_recomputed(self) -> bool:
        return self.initialized

    @torch.no_grad()
    def initialize(self, x: Tensor) -> "ActNorm":
        """Sets the location and the scale from x and returns the bijection itself.

        Args:
            x: at least two rows, of shape ``(..., D)``, or images of shape ``(..., D, H, W)``.
        """
        check_tensor("initialize", x)
        check_event_shape(self, x.shape, self.event_shape)
        loc, scale = column_statistics(self._rows(x), self.event_shape[0])
        self.loc.copy_(loc)
        self.log_scale.copy_(torch.where(scale > 0, scale, 1.0).log())
        self._initialized = True
        return self

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._is_training_batch(x) and not self.initialized:
            self.initialize(x.detach())
        y = (x - self._along(self.loc)) * self._along((-self.log_scale).exp())
        return y, self._expand(-self.log_scale.sum(), x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y * self._along(self.log_scale.exp()) + self._along(self.loc)
        return x, self._expand(self.log_scale.sum(), x)

    # The flag is a Python value and not a buffer, since code that branches on a buffer would wait for the GPU at every
    # step and break a compiled graph. So it needs these two methods to get into the state_dict. The parameters alone
    # would not do: they may be exactly 0 after an initialization.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self._initialized = bool(state)


class BatchNorm(_Normalization):
    r""":math:`y = (x - \tilde\mu) / \sqrt{\tilde\sigma^2},\quad
    \log|\det \partial y / \partial x| = -\tfrac12 \sum \log \tilde\sigma^2`, where
    :math:`\tilde\mu, \tilde\sigma^2` are running averages (Dinh et al. 2017, section 3.7 and appendix E).

    A training pass in the data direction, which is forward, first moves the averages towards the statistics
    :math:`\hat\mu, \hat\sigma^2` of its batch,
    :math:`\tilde\mu \leftarrow \rho \tilde\mu + (1 - \rho) \hat\mu`,
    :math:`\tilde\sigma^2 \leftarrow \rho \tilde\sigma^2 + (1 - \rho) (\hat\sigma^2 + \epsilon)`. It then normalizes
    with the moved averages, and gradients flow through :math:`\hat\mu, \hat\sigma^2`. The inverse uses the same
    averages, so the round trip is exact in train mode too. Sampling, ``eval`` mode, ``no_grad`` and a batch of a single
    row do not move the averages, and a column with nan or inf does not move its own. In train mode the density of a row
    depends on its batch, so score in ``eval`` mode.

    Args:
        input_dim: the size D of a vector, or the number D of channels of an image.
        momentum: the weight :math:`\rho` of the old averages, in [0, 1).
        eps: a constant :math:`\epsilon > 0` that is added to the variance of a batch, so that a constant column never
            leads to a division by zero.
        event_dim: the number of axes of an event: 1 for vectors, 3 for images, whose first axis holds the channels.

    Shapes:
        ``(..., D)`` to ``(..., D)``; images ``(..., D, H, W)`` to the same. The log-determinant, in nats, is shaped
        like the batch.

    Raises:
        ValueError: ``momentum`` is not in [0, 1), or ``eps`` is not positive.

    Example:
        >>> f = BatchNorm(2)
        >>> _ = f(torch.randn(100, 2) + 5.0)  # a training pass: the averages move
        >>> bool((f.mean > 0).all())
        True
    """

    def __init__(self, input_dim: int, *, momentum: float = 0.9, eps: float = 1e-5, event_dim: int = 1):
        super().__init__(input_dim, event_dim)
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1); got {momentum}")
        if not eps > 0:
            raise ValueError(f"expected eps > 0; got {eps}")
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("variance", torch.ones(input_dim))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = self.mean, self.variance
        if self._is_training_batch(x):
            rows = self._rows(x)
            mean, variance = self._moved(mean, rows.mean(0)), self._moved(variance, rows.var(0) + self.eps)
            self._remember(mean.detach(), variance.detach())
        y = (x - self._along(mean)) * self._along(variance.rsqrt())
        return y, self._expand(-0.5 * variance.log().sum(), x)

    def _moved(self, average: Tensor, of_batch: Tensor) -> Tensor:
        # Within a backward pass a checkpoint evaluates a batch again, towards which the averages have moved already.
        if is_eager() and torch._C._current_graph_task_id() != -1:
            return average + (1 - self.momentum) * (of_batch - of_batch.detach())
        return average.lerp(of_batch, 1 - self.momentum)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        # The loss reveals a batch with nan or inf, but such a batch must not spoil the averages for all later batches.
        finite = mean.isfinite() & variance.isfinite()
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y * self._along(self.variance.sqrt()) + self._along(self.mean)
        return x, self._expand(0.5 * self.variance.log().sum(), x)
