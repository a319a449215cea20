# SPDX-License-Identifier: Apache-2.0
"""Monotone rational-quadratic splines: as a coupling, and as a map of each entry by itself."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection
from .conditioners import MLP
from .coupling import Coupling, bounded
from .masks import Mask
from .shapes import broadcast_batch

_LEAST_SHARE = 0.1  # of the bins of equal width: no bin becomes narrower


def rational_quadratic(
    x: Tensor, raw: Tensor, bound: float, max_log_slope: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""The monotone rational-quadratic spline (Durkan et al. 2019, eqs. 4-8) from [-bound, bound] to itself, and
    the identity outside.

    Within a bin of width w and height h, with :math:`\xi = (x - x_k) / w`, :math:`s = h / w` and the slopes
    :math:`\delta_0, \delta_1` at its ends,

    .. math:: y = y_k + \frac{h\,(s \xi^2 + \delta_0 \xi (1 - \xi))}{s + (\delta_0 + \delta_1 - 2 s)\,\xi (1 - \xi)}.

    Args:
        x: the values.
        raw: the parameters, ``x.shape + (3 K - 1,)``, for K bins: their widths, their heights and the slopes between
            them, all unconstrained. If all are zero, the spline is the identity.
        bound: the end of the outer bins, where the slope is 1.
        max_log_slope: the bound of the logarithms of the slopes between bins.
        inverse: whether to return the inverse of the spline at x.

    Returns:
        The value of the spline (or of its inverse), and the logarithm of the slope of the spline there; both shaped
        like x.
    """
    num_bins = (raw.shape[-1] + 1) // 3
    widths, heights, slopes = raw.split((num_bins, num_bins, num_bins - 1), -1)
    x_knots, y_knots = _knots(widths, bound), _knots(heights, bound)
    slopes = F.pad(bounded(slopes, max_log_slope).exp(), (1, 1), value=1.0)
    # Outside, the formula is evaluated at 0, so that it is finite there, and so is the gradient of what is not used.
    is_inside = x.abs() < bound
    inner = torch.where(is_inside, x, 0.0).unsqueeze(-1)
    left = (inner >= (y_knots if inverse else x_knots)[..., 1:-1]).sum(-1, keepdim=True)

    def at(knots: Tensor, k: Tensor) -> Tensor:
        return knots.gather(-1, k)

    x0, y0, slope0, slope1 = at(x_knots, left), at(y_knots, left), at(slopes, left), at(slopes, left + 1)
    width, height = at(x_knots, left + 1) - x0, at(y_knots, left + 1) - y0
    mean = height / width
    bend = slope0 + slope1 - 2 * mean
    if inverse:
        # xi solves a quadratic equation; this form of its root does not cancel (eq. 29).
        rise = inner - y0
        b = height * slope0 - rise * bend
        discriminant = b.square() + 4 * (height * (mean - slope0) + rise * bend) * mean * rise
        xi = 2 * mean * rise / (b + discriminant.clamp(min=0).sqrt())
        # Rounding may lead out of a steep bin, a little, where the gradient stays, or far.
        inside = xi.clamp(0, 1)
        xi = torch.where((xi - inside).abs() < 0.01, xi + (inside - xi).detach(), inside)
    else:
        xi = (inner - x0) / width
    mixed = xi * (1 - xi)
    denominator = mean + bend * mixed
    if inverse:
        y = x0 + xi * width
    else:
        y = y0 + height * (mean * xi.square() + slope0 * mixed) / denominator
    slope = mean.square() * (slope1 * xi.square() + 2 * mean * mixed + slope0 * (1 - xi).square())
    log_slope = slope.log() - 2 * denominator.log()
    y = torch.where(is_inside, y.squeeze(-1), x)
    log_slope = torch.where(is_inside, log_slope.squeeze(-1), 0.0)
    return y, log_slope


def _knots(raw: Tensor, bound: float) -> Tensor:
    """The ends of the bins, from -bound to bound."""
    shares = (1 - _LEAST_SHARE) * raw.softmax(-1) + _LEAST_SHARE / raw.shape[-1]
    inner = bound * (2 * shares[..., :-1].cumsum(-1) - 1)
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


class SplineCoupling(Coupling):
    r""":math:`y_b = x_b,\quad y_{1-b} = g(x_{1-b};\, \theta(x_b)), \quad
    \log|\det \partial y / \partial x| = \sum \log g'`, where g is a monotone rational-quadratic spline in
    [-bound, bound] and the identity outside (Durkan et al. 2019, eqs. 4-8).

    One coupling can give an entry several modes. It takes more time than an :class:`AffineCoupling`, and it changes
    nothing outside of its bound, so data should be standardized, for example by ``Standardize(D).fit(x).inv``.
    :attr:`num_bins` belongs to the class: ``class Fine(SplineCoupling): num_bins = 32`` makes a finer one.

    Args:
        mask: the :class:`Mask` that says which entries are kept (b = 1) and which are changed (b = 0).
        conditioner: a module that maps the kept entries, ``(..., num_kept)``, to the outputs,
            ``(..., (3 K - 1) * num_changed)``, where K is :attr:`num_bins`: the widths and heights of the bins and the
            slopes between them, unconstrained. If there is a context, it is the second argument.
        context_dim: the width of the context that the conditioner expects, 0 for none.
        bound: the end of the splines.
        max_log_scale: the bound of the logarithms of the slopes between bins.

    The shapes and errors are those of :class:`AffineCoupling`.

    Example:
        >>> from pyro_realnvp import MLP, masks
        >>> mask = masks.half(4)
        >>> f = SplineCoupling(mask, MLP(mask.num_kept, SplineCoupling.outputs_per_entry * mask.num_changed))
        >>> f(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    num_bins = 8
    outputs_per_entry: int = 3 * num_bins - 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.outputs_per_entry = 3 * cls.num_bins - 1

    def __init__(
        self,
        mask: Mask,
        conditioner: nn.Module,
        *,
        context_dim: int = 0,
        bound: float = 5.0,
        max_log_scale: float = 3.0,
    ):
        super().__init__(mask, conditioner, context_dim=context_dim)
        for name, value in {"bound": bound, "max_log_scale": max_log_scale}.items():
            if not value > 0:
                raise ValueError(f"expected {name} > 0; got {value}")
        self.bound = bound
        self.max_log_scale = max_log_scale

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, bound={self.bound}, max_log_scale={self.max_log_scale}"

    def forward_entries(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic(x, torch.stack(parameters, -1), self.bound, self.max_log_scale)

    def inverse_entries(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic(y, torch.stack(parameters, -1), self.bound, self.max_log_scale, inverse=True)


class Spline(Bijection):
    r""":math:`y_i = g(x_i;\, \theta_i(c)),\quad \log|\det \partial y / \partial x| = \sum_i \log g'`: a monotone
    rational-quadratic spline for each entry by itself (Durkan et al. 2019, eqs. 4-8), at first the identity.

    The parameters are learned, or computed by an :class:`MLP` from a context. A flow of one entry, which has no other
    to be coupled with, consists of such a spline.

    Args:
        input_dim: the size D of an event.
        num_bins: the number K of bins of each spline.
        bound: the end of the splines; outside of [-bound, bound] they are the identity.
        max_log_scale: the bound of the logarithms of the slopes between bins.
        context_dim: the width of the context, 0 for none.
        hidden_dims: the widths of the hidden layers that read the context.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Raises:
        ValueError: ``num_bins`` is less than 2, or ``bound`` or ``max_log_scale`` is not positive.

    Example:
        >>> Spline(1)(torch.tensor([[0.5], [7.0]]))
        tensor([[0.5000],
                [7.0000]], grad_fn=<...>)
    """

    elementwise = True
    sign = 1

    def __init__(
        self,
        input_dim: int,
        *,
        num_bins: int = 16,
        bound: float = 5.0,
        max_log_scale: float = 5.0,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
    ):
        super().__init__((input_dim,), context_dim=context_dim)
        for name, value, least in (("num_bins", num_bins, 1), ("bound", bound, 0), ("max_log_scale", max_log_scale, 0)):
            if not value > least:
                raise ValueError(f"expected {name} > {least}; got {value}")
        self.bound = bound
        self.max_log_scale = max_log_scale
        shape = (input_dim, 3 * num_bins - 1)
        self.raw: nn.Parameter | None = None if context_dim else nn.Parameter(torch.zeros(shape))
        self.conditioner: MLP | None = MLP(context_dim, shape[0] * shape[1], hidden_dims) if context_dim else None

    def extra_repr(self) -> str:
        return f"bound={self.bound}, max_log_scale={self.max_log_scale}"

    def _spline(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        x = broadcast_batch(x, context)
        raw = self.raw if context is None else self.conditioner(context).unflatten(-1, (x.shape[-1], -1)).to(x.dtype)
        raw = raw.expand(x.shape + raw.shape[-1:])
        y, log_slope = rational_quadratic(x, raw, self.bound, self.max_log_scale, inverse=inverse)
        return y, -log_slope.sum(-1) if inverse else log_slope.sum(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._spline(x, context, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._spline(y, context, inverse=True)
