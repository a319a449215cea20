# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers. The way from data to latent is forward; a flow from base to data holds their ``.inv``."""

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .elementwise import column_statistics
from .inputs import check_event_shape
from .shapes import along_channels, channel_events, positions


class _Normalization(Bijection):
    """What both share: statistics for each entry of a vector or for each channel of an image."""

    elementwise = True

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
        """Whether x may move statistics: a pass that trains, over at least two events."""
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        return self.training and torch.is_grad_enabled() and batch_shape.numel() > 1


class ActNorm(_Normalization):
    r""":math:`y = (x - \mu) \odot \exp(-s),\quad \log|\det \partial y / \partial x| = -\sum s`, both learned and
    initialised on data  (Glow; Kingma & Dhariwal 2018, section 3.1).

    It starts as the identity. It is initialised, so that y has mean 0 and deviation 1 in each column, either explicitly
    by :meth:`initialize` or by the first pass in the data direction, which is forward, in train mode with gradients on
    and at least two rows. Nothing else initialises it: not sampling, not scoring under ``no_grad`` or in ``eval`` mode,
    not a single row. A constant column is centred, and its scale stays. The flag is saved with the state. (That pass
    looks at values, so initialise before ``torch.compile(fullgraph=True)`` in train mode.)

    Args:
        input_dim: the size D of an event, or its channels.
        event_dim: how many axes an event has, the first of them the channels: 1 for vectors, 3 for images, whose
            channels are normalised over all positions.

    Shapes:
        ``(..., D)`` to ``(..., D)``, images ``(..., D, H, W)`` to the same; the log-determinant, in nats, is shaped
        like the batch.

    Raises:
        ValueError: initialised on values that are not finite.

    Example:
        >>> f = ActNorm(2).initialize(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> f(torch.tensor([1.0, 20.0]))
        tensor([0., 0.], grad_fn=<...>)
        >>> f.initialized
        True
    """

    def __init__(self, input_dim: int, *, event_dim: int = 1):
        super().__init__(input_dim, event_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.initialized = False

    @property
    def needs_data(self) -> bool:
        return not self.initialized

    @torch.no_grad()
    def initialize(self, x: Tensor) -> "ActNorm":
        """Sets location and scale from x, ``(..., D)`` with at least two rows, or images; returns itself."""
        check_event_shape(self, x.shape, self.event_shape)
        loc, scale = column_statistics(self._rows(x), self.event_shape[0])
        self.loc.copy_(loc)
        self.log_scale.copy_(torch.where(scale > 0, scale, 1.0).log())
        self.initialized = True
        return self

    def forward_and_ladj(self, x, context=None):
        if not self.initialized and self._is_training_batch(x):
            self.initialize(x.detach())
        y = (x - self._along(self.loc)) * self._along((-self.log_scale).exp())
        return y, self._expand(-self.log_scale.sum(), x)

    def inverse_and_ladj(self, y, context=None):
        x = y * self._along(self.log_scale.exp()) + self._along(self.loc)
        return x, self._expand(self.log_scale.sum(), x)

    # A Python flag, not a buffer: reading a buffer would stall a GPU at every step and break a compiled graph.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = bool(state)


class BatchNorm(_Normalization):
    r""":math:`y = (x - \tilde\mu) / \sqrt{\tilde\sigma^2},\quad
    \log|\det \partial y / \partial x| = -\tfrac12 \sum \log \tilde\sigma^2`, with running averages
    (Dinh et al. 2017, section 3.7 and appendix E).

    A training pass in the data direction, which is forward, moves the averages first,
    :math:`\tilde\mu \leftarrow \rho \tilde\mu + (1 - \rho) \hat\mu`,
    :math:`\tilde\sigma^2 \leftarrow \rho \tilde\sigma^2 + (1 - \rho) (\hat\sigma^2 + \epsilon)`, and then normalises
    with the moved ones; gradients flow through the batch's own :math:`\hat\mu, \hat\sigma^2`. Both directions use the
    same averages, so the round trip is exact in train mode too. Sampling, ``eval`` mode, ``no_grad``, batches of a
    single row and columns with nan or inf move nothing. In train mode the density of a row depends on its batch, so
    score in ``eval`` mode.

    Args:
        input_dim: the size D of an event, or its channels.
        momentum: :math:`\rho`, in [0, 1).
        eps: :math:`\epsilon > 0`, the smallest variance; it keeps a constant column harmless.
        event_dim: how many axes an event has, the first of them the channels: 1 for vectors, 3 for images.

    Shapes:
        ``(..., D)`` to ``(..., D)``, images ``(..., D, H, W)`` to the same; the log-determinant, in nats, is shaped
        like the batch.

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
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("variance", torch.ones(input_dim))

    def forward_and_ladj(self, x, context=None):
        mean, variance = self.mean, self.variance
        if self._is_training_batch(x):
            rows = self._rows(x)
            mean = mean.lerp(rows.mean(0), 1 - self.momentum)
            variance = variance.lerp(rows.var(0) + self.eps, 1 - self.momentum)
            self._remember(mean.detach(), variance.detach())
        y = (x - self._along(mean)) * self._along(variance.rsqrt())
        return y, self._expand(-0.5 * variance.log().sum(), x)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        finite = mean.isfinite() & variance.isfinite()  # a bad batch shows in its loss; it must not stay for ever
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))

    def inverse_and_ladj(self, y, context=None):
        x = y * self._along(self.variance.sqrt()) + self._along(self.mean)
        return x, self._expand(0.5 * self.variance.log().sum(), x)
