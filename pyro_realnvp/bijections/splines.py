# SPDX-License-Identifier: Apache-2.0
"""Pyro's rational splines of one entry, initialized to the identity."""

import math
from collections.abc import Sequence

import pyro.distributions.transforms as T
import torch
from torch import Tensor, nn

from .bijection import Bijection
from .shapes import broadcast_batch

_BINS, _BOUND = 16, 5.0
# Pyro's slope is 1e-3 + softplus(parameter), so that this parameter gives the slope 1.
_SLOPE_ONE = math.log(math.expm1(1.0 - 1e-3))


def identity_spline() -> T.Spline:
    """Returns a monotonic spline of one entry that is the identity at first."""
    spline = T.Spline(1, count_bins=_BINS, bound=_BOUND)
    with torch.no_grad():
        for p in spline.parameters():
            nn.init.zeros_(p)
        spline.unnormalized_derivatives.fill_(_SLOPE_ONE)
    return spline


class ConditionalSpline(Bijection):
    """A monotonic spline of one entry whose knots a network computes from the context; at first it is the identity."""

    def __init__(self, context_dim: int, hidden_dims: Sequence[int]):
        super().__init__((1,), context_dim=context_dim)
        self.spline = T.conditional_spline(1, context_dim, list(hidden_dims), _BINS, _BOUND, order="quadratic")
        last = self.spline.nn.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[2 * _BINS :] = _SLOPE_ONE

    def _broadcast(self, value: Tensor, context: Tensor) -> tuple[Tensor, T.Spline]:
        """Returns the value and the splines with one batch shape, since Pyro's splines do not broadcast."""
        value = broadcast_batch(value, context)
        return value, self.spline.condition(context.expand(*value.shape[:-1], -1))

    def forward_and_ladj(self, x, context=None):
        x, spline = self._broadcast(x, context)
        y = spline(x)
        return y, spline.log_abs_det_jacobian(x, y).sum(-1)

    def inverse_and_ladj(self, y, context=None):
        y, spline = self._broadcast(y, context)
        x = spline.inv(y)
        return x, -spline.log_abs_det_jacobian(x, y).sum(-1)
