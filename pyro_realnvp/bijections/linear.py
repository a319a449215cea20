# SPDX-License-Identifier: Apache-2.0
"""Learned linear and affine maps."""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection
from .inputs import first_real
from .modes import is_autocast
from .reshape import Permute
from .shapes import channel_events, positions


def _in_full_precision(evaluate: Callable) -> Callable:
    """Evaluates a map outside of autocast, which is for the products of networks, and would round the data here."""

    @wraps(evaluate)
    def evaluate_outside(self: Bijection, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not is_autocast(x):
            return evaluate(self, x, context)
        dtype = first_real(self, "_parameters").dtype
        with torch.autocast(x.device.type, enabled=False):
            return evaluate(self, x.to(dtype), None if context is None else context.to(dtype))

    return evaluate_outside


class InvertibleLinear(Bijection):
    r""":math:`y = W x` with :math:`W = P L (U + \operatorname{diag}(d))`,
    :math:`\log|\det \partial y / \partial x| = \sum \log|d|`  (Glow; Kingma & Dhariwal 2018, eqs. 10-11).

    The factors L (lower triangular with a unit diagonal), U (upper triangular with a zero diagonal) and d > 0 are
    learned; the permutation P is fixed. At first W = P, by default the identity. On images, W mixes the channels of
    each pixel, which is Glow's 1 x 1 convolution, and
    :math:`\log|\det \partial y / \partial x| = H W \sum \log|d|`.

    Args:
        input_dim: the size D of a vector, or the number D of channels of an image.
        permutation: the permutation P as the order of the rows, of shape ``(D,)``; by default the identity.
        event_dim: the number of axes of an event: 1 for vectors, 3 for images, whose first axis holds the channels.

    Shapes:
        ``(..., D)`` to ``(..., D)``; images ``(..., D, H, W)`` to the same. The log-determinant, in nats, is shaped
        like the batch.

    Example:
        >>> f = InvertibleLinear(3)
        >>> f(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<...>)
    """

    can_be_recomputed = True

    def __init__(self, input_dim: int, *, permutation: Tensor | None = None, event_dim: int = 1):
        super().__init__(channel_events(input_dim, event_dim))
        self.permute: Permute = Permute(torch.arange(input_dim) if permutation is None else permutation)
        self.permute.forward_shape((input_dim,))
        self.lower: nn.Parameter = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.upper: nn.Parameter = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.zeros(input_dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + identity, self.upper.triu(1) + self.log_diagonal.exp().diag()

    def _columns(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).mT if len(self.event_shape) == 1 else x.flatten(1 - len(self.event_shape))

    def _events(self, columns: Tensor, shape: torch.Size) -> Tensor:
        return (columns.mT if len(self.event_shape) == 1 else columns).reshape(shape)

    def _ladj(self, x: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        return (positions(x, event_dim) * self.log_diagonal.sum()).expand(x.shape[: x.dim() - event_dim])

    @_in_full_precision
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        columns = (lower @ (upper @ self._columns(x))).index_select(-2, self.permute.permutation)
        return self._events(columns, x.shape), self._ladj(x)

    @_in_full_precision
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        columns = self._columns(y).index_select(-2, self.permute.inverse_permutation)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return self._events(columns, y.shape), -self._ladj(y)


class TriangularAffine(Bijection):
    r""":math:`y = \mu + L (m + T x),\quad \log|\det \partial y / \partial x| = \sum \log L_{ii} + \sum \log T_{ii}`:
    an affine map that is learned relative to its starting point :math:`\mu + L x`.

    :meth:`start_at` sets :math:`\mu` and L (lower triangular), by default 0 and the identity. Training changes only m
    and T (lower triangular with a positive diagonal), which start at 0 and the identity. So the steps of an optimizer
    are measured in units of L, even if the entries of y are badly scaled or correlated. The ``state_dict`` holds all
    four.

    Args:
        input_dim: the size D of an event.
        full: whether L and T are triangular matrices; otherwise they are diagonal.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = TriangularAffine(2).start_at(torch.tensor([5.0, 0.0]), torch.tensor([[10.0, 0.0], [1.0, 0.5]]))
        >>> f(torch.ones(2))
        tensor([15.0000,  1.5000], grad_fn=<...>)
    """

    can_be_recomputed = True

    def __init__(self, input_dim: int, *, full: bool = True):
        super().__init__((input_dim,))
        self.elementwise: bool = not full
        self.register_buffer("start_loc", torch.zeros(input_dim))
        self.register_buffer("start_tril", torch.eye(input_dim) if full else torch.ones(input_dim))
        self.loc: nn.Parameter = nn.Parameter(torch.zeros(input_dim))
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.zeros(input_dim))
        self.lower: nn.Parameter | None = nn.Parameter(torch.zeros(input_dim, input_dim)) if full else None

    @property
    def sign(self) -> int:
        if self.elementwise:
            return 1
        return super().sign

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale_tril: Tensor) -> "TriangularAffine":
        """Sets the starting point and returns the bijection itself.

        Args:
            loc: the vector mu, of shape ``(D,)``.
            scale_tril: the matrix L, of shape ``(D, D)``; only its diagonal is used unless ``full``.

        Raises:
            ValueError: a shape does not fit, a value is not finite, L is not lower triangular, or an entry of its
                diagonal is not positive.
        """
        if loc.shape != self.loc.shape or scale_tril.shape != 2 * self.loc.shape:
            raise ValueError(
                f"expected a loc of shape (D,) and a scale_tril of shape (D, D) with D = {len(self.loc)}; "
                f"got {tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        diagonal = scale_tril.diagonal()
        if not loc.isfinite().all() or not scale_tril.isfinite().all() or not (diagonal > 0).all():
            raise ValueError("expected a finite loc and a finite lower triangular matrix with a positive diagonal")
        if scale_tril.triu(1).any():
            raise ValueError(
                "expected a lower triangular matrix; got entries above the diagonal: pass the Cholesky factor of the "
                "covariance, torch.linalg.cholesky(covariance)"
            )
        self.start_loc.copy_(loc)
        self.start_tril.copy_(diagonal if self.lower is None else scale_tril)
        return self

    @_in_full_precision
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.loc + x * self.log_diagonal.exp() + (0.0 if self.lower is None else F.linear(x, self.lower.tril(-1)))
        y = self.start_loc + (x * self.start_tril if self.lower is None else F.linear(x, self.start_tril))
        return y, self._ladj().expand(x.shape[:-1])

    @_in_full_precision
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y - self.start_loc
        if self.lower is None:
            x = (x / self.start_tril - self.loc) * (-self.log_diagonal).exp()
        else:
            x = _solve(self.start_tril, x) - self.loc
            x = _solve(self.lower.tril(-1) + self.log_diagonal.exp().diag(), x)
        return x, -self._ladj().expand(y.shape[:-1])

    def _ladj(self) -> Tensor:
        start = self.start_tril if self.lower is None else self.start_tril.diagonal()
        return start.log().sum() + self.log_diagonal.sum()


class LowRankAffine(Bijection):
    r""":math:`y = \mu + S (1 + V (R - 1) V^T) (m + T x)`: :class:`TriangularAffine` for many dimensions, with a
    diagonal T and a start that is diagonal but for K directions.

    :math:`\mu`, the diagonal S, the orthonormal columns of V, and the diagonal R are fixed by :meth:`start_at`, 0 and 1
    before; m and the diagonal T are learned, and start at 0 and 1. The log-determinant is the sum of the logarithms of
    S, R and T.

    Args:
        input_dim: the size D of an event.
        rank: the number K of directions.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = LowRankAffine(3, rank=1)
        >>> direction = torch.tensor([[1.0], [0.0], [0.0]])
        >>> _ = f.start_at(torch.zeros(3), torch.ones(3), direction, torch.tensor([5.0]))
        >>> f(torch.ones(3))
        tensor([5., 1., 1.], grad_fn=<...>)
    """

    def __init__(self, input_dim: int, *, rank: int):
        super().__init__((input_dim,))
        self.register_buffer("start_loc", torch.zeros(input_dim))
        self.register_buffer("start_scale", torch.ones(input_dim))
        self.register_buffer("directions", torch.zeros(input_dim, rank))
        self.register_buffer("stretches", torch.ones(rank))
        self.loc: nn.Parameter = nn.Parameter(torch.zeros(input_dim))
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.zeros(input_dim))

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale: Tensor, directions: Tensor, stretches: Tensor) -> "LowRankAffine":
        """Sets mu, ``(D,)``, S, ``(D,)``, V, ``(D, k)``, and R, ``(k,)``, with k up to K, and returns the bijection.

        Raises:
            ValueError: an entry is not finite, a scale or stretch is not positive, or V is not orthonormal.
        """
        tensors = (loc, scale, directions, stretches)
        if not all(t.isfinite().all() for t in tensors) or not (scale > 0).all() or not (stretches > 0).all():
            raise ValueError("expected finite tensors, and scale and stretches that are positive")
        eye = torch.eye(directions.shape[1]).to(directions)
        if not torch.allclose(directions.mT @ directions, eye, atol=1e-4):
            raise ValueError("expected directions with orthonormal columns: pass torch.linalg.qr(directions).Q")
        rank = len(stretches)
        self.start_loc.copy_(loc)
        self.start_scale.copy_(scale)
        self.directions.zero_()[:, :rank] = directions.to(self.directions)
        self.stretches.fill_(1.0)[:rank] = stretches.to(self.stretches)
        return self

    @_in_full_precision
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.loc + x * self.log_diagonal.exp()
        x = x + ((x @ self.directions) * (self.stretches - 1)) @ self.directions.mT
        return self.start_loc + self.start_scale * x, self._ladj().expand(x.shape[:-1])

    @_in_full_precision
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = (y - self.start_loc) / self.start_scale
        # The identity of Woodbury. It holds whatever the rounding of V is, as it is after a change of precision.
        along = torch.linalg.solve(self._small(), (x @ self.directions).unsqueeze(-1)).squeeze(-1)
        x = x - ((self.stretches - 1) * along) @ self.directions.mT
        return (x - self.loc) * (-self.log_diagonal).exp(), -self._ladj().expand(y.shape[:-1])

    def _small(self) -> Tensor:
        """1 + V^T V (R - 1), which has the determinant of 1 + V (R - 1) V^T."""
        eye = torch.eye(len(self.stretches), dtype=self.stretches.dtype, device=self.stretches.device)
        return eye + self.directions.mT @ self.directions * (self.stretches - 1)

    def _ladj(self) -> Tensor:
        return self.start_scale.log().sum() + torch.linalg.slogdet(self._small()).logabsdet + self.log_diagonal.sum()


def triangular_root(root: Tensor) -> Tensor:
    """The lower triangular matrix L with a positive diagonal and L L^T = root root^T.

    With the QR decomposition root^T = Q R, the product root root^T is R^T R. Unlike the Cholesky decomposition of the
    product, this does not square the condition number.
    """
    upper = torch.linalg.qr(root.mT).R
    return (upper * upper.diagonal().sign()[:, None]).mT


def _solve(tril: Tensor, x: Tensor) -> Tensor:
    """Solves `tril @ z = v` for each vector v along the last axis of x; `tril` is lower triangular."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.linalg.solve_triangular(tril.mT, rows, upper=True, left=False).reshape(x.shape)


class ConditionalAffine(Bijection):
    r""":math:`y = x \odot \exp(s(c)) + t(c),\quad \log|\det \partial y / \partial x| = \sum s(c)`: one linear layer
    computes the log-scale s and the shift t from the context c. At first it is the identity.

    Args:
        input_dim: the size D of an event.
        context_dim: the width of the context.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> ConditionalAffine(2, context_dim=3).condition(torch.ones(5, 3))(torch.zeros(2)).shape
        torch.Size([5, 2])
    """

    elementwise = True
    sign = 1

    def __init__(self, input_dim: int, context_dim: int):
        super().__init__((input_dim,), context_dim=context_dim)
        self.linear: nn.Linear = nn.Linear(context_dim, 2 * input_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @_in_full_precision
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.linear(context).chunk(2, -1)
        y = x * log_scale.exp() + shift
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    @_in_full_precision
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.linear(context).chunk(2, -1)
        x = (y - shift) * (-log_scale).exp()
        return x, -log_scale.sum(-1).expand(x.shape[:-1])
