# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers. The way from data to latent is forward; a flow from base to data holds their ``.inv``."""

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .elementwise import column_statistics


class ActNorm(Bijection):
    r""":math:`y = (x - \mu) \odot \exp(-s),\quad \log|\det \partial y / \partial x| = -\sum s`, both learned and
    initialised on data  (Glow; Kingma & Dhariwal 2018, section 3.1).

    It starts as the identity. It is initialised, so that y has mean 0 and deviation 1 in each column, either explicitly
    by :meth:`initialize` or by the first pass in the data direction, which is forward, in train mode with gradients on
    and at least two rows. Nothing else initialises it: not sampling, not scoring under ``no_grad`` or in ``eval`` mode,
    not a single row. A constant column is centred, and its scale stays. The flag is saved with the state. (That pass
    looks at values, so initialise before ``torch.compile(fullgraph=True)`` in train mode.)

    Args:
        input_dim: the size D of an event.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Raises:
        ValueError: initialised on values that are not finite.

    Example:
        >>> f = ActNorm(2).initialize(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> f(torch.tensor([1.0, 20.0]))
        tensor([0., 0.], grad_fn=<...>)
        >>> f.initialized
        True
    """

    def __init__(self, input_dim: int):
        super().__init__((input_dim,))
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.initialized = False

    @torch.no_grad()
    def initialize(self, x: Tensor) -> "ActNorm":
        """Sets location and scale from x, ``(..., D)`` with at least two rows; returns itself."""
        loc, scale = column_statistics(x, self.event_shape[0])
        self.loc.copy_(loc)
        self.log_scale.copy_(torch.where(scale > 0, scale, 1.0).log())
        self.initialized = True
        return self

    def forward_and_ladj(self, x, context=None):
        if not self.initialized and _is_training_batch(self, x):
            self.initialize(x.detach())
        return (x - self.loc) * (-self.log_scale).exp(), -self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y * self.log_scale.exp() + self.loc, self.log_scale.sum().expand(y.shape[:-1])

    def changed_entries(self, changed, *, forward=True):
        return changed

    # A Python flag, not a buffer: reading a buffer would stall a GPU at every step and break a compiled graph.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = bool(state)


class BatchNorm(Bijection):
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
        input_dim: the size D of an event.
        momentum: :math:`\rho`, in [0, 1).
        eps: :math:`\epsilon > 0`, the smallest variance; it keeps a constant column harmless.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = BatchNorm(2)
        >>> _ = f(torch.randn(100, 2) + 5.0)  # a training pass: the averages move
        >>> bool((f.mean > 0).all())
        True
    """

    def __init__(self, input_dim: int, *, momentum: float = 0.9, eps: float = 1e-5):
        super().__init__((input_dim,))
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1); got {momentum}")
        if not eps > 0:
            raise ValueError(f"expected eps > 0; got {eps}")
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("variance", torch.ones(input_dim))

    def forward_and_ladj(self, x, context=None):
        mean, variance = self.mean, self.variance
        if _is_training_batch(self, x):
            rows = x.reshape(-1, x.shape[-1])
            mean = mean.lerp(rows.mean(0), 1 - self.momentum)
            variance = variance.lerp(rows.var(0) + self.eps, 1 - self.momentum)
            self._remember(mean.detach(), variance.detach())
        return (x - mean) * variance.rsqrt(), -0.5 * variance.log().sum().expand(x.shape[:-1])

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        finite = mean.isfinite() & variance.isfinite()  # a bad batch shows in its loss; it must not stay for ever
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))

    def inverse_and_ladj(self, y, context=None):
        return y * self.variance.sqrt() + self.mean, 0.5 * self.variance.log().sum().expand(y.shape[:-1])

    def changed_entries(self, changed, *, forward=True):
        return changed


def _is_training_batch(bijection: Bijection, x: Tensor) -> bool:
    """Whether x may move statistics: a pass that trains, over at least two rows."""
    return bijection.training and torch.is_grad_enabled() and x.shape[:-1].numel() > 1
