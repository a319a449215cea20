# SPDX-License-Identifier: Apache-2.0
"""Densities of entries that are bounded."""

import numbers
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from .bijection import Bijection

_NAMED = {"real": (None, None), "positive": (0.0, None)}


class Unbound(Bijection):
    r""":math:`y_i = \log(x_i - l_i) - \log(h_i - x_i),\quad
    \log|\det \partial y / \partial x| = \sum_i \log(h_i - l_i) - \log(x_i - l_i) - \log(h_i - x_i)`: entries in
    intervals :math:`(l_i, h_i)` to real ones.

    Where there is no upper bound, :math:`y_i = \log(x_i - l_i)`; where there is no lower one,
    :math:`y_i = -\log(h_i - x_i)`; where there is none, :math:`y_i = x_i`.

    The way from data to latent is forward; a flow of bounded entries ends in ``Unbound(low, high).inv``.

    Args:
        low: the lower bound of each entry, ``(D,)``; ``-inf`` for none.
        high: the upper bound; ``inf`` for none.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Raises:
        ValueError: bounds of two shapes, or a lower one that is not below the upper one.

    Example:
        >>> f = Unbound([0.0, 0.0, -torch.inf], [torch.inf, 1.0, torch.inf])  # positive, a proportion, real
        >>> f(torch.tensor([1.0, 0.5, 7.0]))
        tensor([0., 0., 7.])
    """

    def __init__(self, low: Tensor | Sequence[float], high: Tensor | Sequence[float]):
        low, high = (torch.as_tensor(bound) for bound in (low, high))
        if not low.is_floating_point() or low.dtype != high.dtype:
            low, high = (bound.to(torch.get_default_dtype()) for bound in (low, high))
        if low.dim() != 1 or low.shape != high.shape or not (low < high).all():
            raise ValueError(f"expected bounds of shape (D,), low below high; got {low.tolist()} and {high.tolist()}")
        super().__init__(low.shape)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    @domain.setter
    def domain(self, _) -> None:
        """It follows from the bounds, wherever these are."""

    def _bounded(self) -> tuple[Tensor, Tensor]:
        return self.low.isfinite(), self.high.isfinite()

    def forward_and_ladj(self, x, context=None):
        from_below, from_above = self._bounded()
        above = torch.where(from_below, x - self.low, 1.0)
        below = torch.where(from_above, self.high - x, 1.0)
        y = torch.where(from_below | from_above, above.log() - below.log(), x)
        width = torch.where(from_below & from_above, self.high - self.low, 1.0)
        return y, (width.log() - above.log() - below.log()).sum(-1)

    def inverse_and_ladj(self, y, context=None):
        from_below, from_above = self._bounded()
        both = from_below & from_above
        low, high = (torch.where(both, bound, 0.0) for bound in (self.low, self.high))
        # A branch that is not taken gets 0, so that it has a gradient.
        up, down = (torch.where(bounded & ~both, y, 0.0) for bounded in (from_below, from_above))
        between = torch.where(both, y, 0.0)
        x = torch.where(from_below, self.low + up.exp(), torch.where(from_above, self.high - (-down).exp(), y))
        x = torch.where(both, torch.lerp(low, high, torch.sigmoid(between)), x)
        # Rounding must not reach the bounds, which are outside.
        x = x.clamp(torch.nextafter(self.low, self.high), torch.nextafter(self.high, self.low))
        ladj = torch.where(both, (high - low).log() - F.softplus(between) - F.softplus(-between), up - down)
        return x, ladj.sum(-1)

    def changed_entries(self, changed, *, forward=True):
        return changed


def bounds_of(support, num_columns: int, names: Sequence[str] = ()) -> tuple[list[float], list[float]]:
    """The lower and the upper bound of each column.

    Args:
        support: ``"real"``, ``"positive"`` or a pair (low, high) with None for no bound; or one of them for each
            column; or a dict of those that are not real, by name or number.
    """
    supports = ["real"] * num_columns
    if isinstance(support, Mapping):
        for key, one in support.items():
            column = list(names).index(key) if key in names else key
            if not isinstance(column, numbers.Integral) or not 0 <= column < num_columns:
                raise ValueError(f"expected support to name columns of {list(names) or num_columns}; got {key!r}")
            supports[column] = one
    elif isinstance(support, str) or _is_pair(support):
        supports = [support] * num_columns
    elif len(support) == num_columns:
        supports = list(support)
    else:
        raise ValueError(f"expected a support for each of the {num_columns} columns; got {len(support)}")
    pairs = [_NAMED.get(one, one) if isinstance(one, str) else one for one in supports]
    for pair in pairs:
        if not _is_pair(pair):
            raise ValueError(f"expected 'real', 'positive' or a pair (low, high), None for no bound; got {pair!r}")
    low = [-torch.inf if low is None else low for low, _ in pairs]
    high = [torch.inf if high is None else high for _, high in pairs]
    return low, high


def _is_pair(support) -> bool:
    is_pair = isinstance(support, (tuple, list)) and len(support) == 2
    return is_pair and all(bound is None or isinstance(bound, numbers.Real) for bound in support)
