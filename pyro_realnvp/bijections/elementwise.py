# SPDX-License-Identifier: Apache-2.0
"""Bijections that act on each entry by itself. Their names describe the direction from data to latent."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from .bijection import Bijection
from .constants import Constants
from .inputs import check_tensor


class Standardize(Bijection):
    r""":math:`y = (x - \mu) / \sigma,\quad \log|\det \partial y / \partial x| = -\sum \log \sigma`, where the
    mean and the standard deviation are fitted to data.

    The direction from data to latent is forward, so a flow from base to data ends in ``Standardize(D).fit(x).inv``.
    Training does not change the mean and the standard deviation, and the ``state_dict`` holds them. Before :meth:`fit`,
    the bijection is the identity.

    Args:
        input_dim: the size D of an event.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Example:
        >>> f = Standardize(2).fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> f(torch.tensor([1.0, 20.0]))
        tensor([0., 0.])
    """

    elementwise = True
    sign = 1

    def __init__(self, input_dim: int):
        super().__init__((input_dim,))
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("std", torch.ones(input_dim))

    @torch.no_grad()
    def fit(self, x: Tensor, weights: Tensor | None = None) -> "Standardize":
        """Sets the mean and the standard deviation to those of x and returns the bijection itself.

        Args:
            x: the data, of shape ``(..., D)``.
            weights: the weight of each row of x; by default all rows count alike.

        Raises:
            ValueError: x has fewer than two rows, values that are not finite, or a constant column; or there is not one
                weight for each row, or a negative one.
        """
        mean, std = column_statistics(x, self.event_shape[0], weights)
        constant = (std == 0).nonzero().squeeze(-1).tolist()
        if constant:
            raise ValueError(f"columns {constant} are constant and cannot be standardized: drop them or add noise")
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) / self.std, -self.std.log().sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y * self.std + self.mean, self.std.log().sum().expand(y.shape[:-1])


class Logit(Bijection):
    r""":math:`y = \operatorname{logit}(\alpha + (1 - 2\alpha)\, x),\quad
    \log|\partial y / \partial x| = \log(1 - 2\alpha) + \operatorname{softplus}(y) + \operatorname{softplus}(-y)`, for
    each entry (Dinh et al. 2017, section 4.1).

    It maps pixels in [0, 1] to the real line, and 0 and 1 to finite values. The default :math:`\alpha` gives
    :math:`1 - 2\alpha = 0.9`, the data constraint of the paper's code. Nothing is clamped, so the inverse reaches a
    little beyond [0, 1], from :math:`-\alpha/(1 - 2\alpha)` to :math:`(1 - \alpha)/(1 - 2\alpha)`; ``domain`` is this
    interval.

    The direction from data to latent is forward, so a flow from base to data ends in ``Logit().inv``.

    Args:
        alpha: the smallest distance :math:`\alpha` of the logit's argument from 0 and 1 for pixels in [0, 1]; it is in
            [0, 1/2). With 0 the bijection is the logit itself, which is infinite at 0 and 1.

    Shapes:
        Any shape to the same shape. A logit has no event axes, so its log-determinant, in nats, has one value for each
        entry; a :class:`Compose` sums these over its events.

    Raises:
        ValueError: alpha is not in [0, 1/2). When called: a value lies beyond the interval (unless Pyro's validation is
            off, as it is for all transforms).

    Example:
        >>> Logit()(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-2.9444,  0.0000,  2.9444])
    """

    elementwise = True
    sign = 1

    def __init__(self, alpha: float = 0.05):
        super().__init__(())
        if not 0 <= alpha < 0.5:
            raise ValueError(f"expected 0 <= alpha < 1/2; got {alpha}")
        self.alpha = alpha
        self.domain: constraints.Constraint = constraints.interval(
            -alpha / (1 - 2 * alpha), (1 - alpha) / (1 - 2 * alpha)
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def _ladj(self, y: Tensor) -> Tensor:
        return math.log1p(-2 * self.alpha) + F.softplus(y) + F.softplus(-y)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Each logarithm measures the distance from its own end of the interval, so that neither 0 nor 1 loses digits.
        y = torch.log(self.alpha + (1 - 2 * self.alpha) * x) - torch.log(self.alpha + (1 - 2 * self.alpha) * (1 - x))
        return y, self._ladj(y)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = (y.new_tensor(bound) for bound in (self.domain.lower_bound, self.domain.upper_bound))
        return _between(torch.lerp(low, high, torch.sigmoid(y)), low, high), -self._ladj(y)


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Keeps values of an open interval from being rounded to its bounds, where there is no density."""
    return x.clamp(torch.nextafter(low, high), torch.nextafter(high, low))


class _Box(constraints.Constraint):
    """Vectors with entries between bounds, which may be infinite, unlike those of torch's own constraints.

    The bounds are those of an :class:`Unbound`, so that they move with it to another device.
    """

    event_dim = 1

    def __init__(self, owner: "Unbound"):
        self.owner = owner

    @property
    def lower_bound(self) -> Tensor:
        return self.owner.low.where(self.owner.is_bounded[0], -torch.inf)

    @property
    def upper_bound(self) -> Tensor:
        return self.owner.high.where(self.owner.is_bounded[1], torch.inf)

    def __repr__(self) -> str:
        return f"Box({self.lower_bound.tolist()}, {self.upper_bound.tolist()})"

    def check(self, value: Tensor) -> Tensor:
        return ((self.lower_bound <= value) & (value <= self.upper_bound)).all(-1)


@biject_to.register(_Box)
@transform_to.register(_Box)
def _(constraint: _Box) -> Bijection:
    return Unbound(constraint.lower_bound, constraint.upper_bound).inv


class Unbound(Constants, Bijection):
    r""":math:`y_i = \log(x_i - l_i) - \log(h_i - x_i),\quad
    \log|\det \partial y / \partial x| = \sum_i \log(h_i - l_i) - \log(x_i - l_i) - \log(h_i - x_i)`: entries in
    the intervals :math:`(l_i, h_i)` become real numbers.

    An entry without an upper bound becomes :math:`y_i = \log(x_i - l_i)`, and one without a lower bound
    :math:`y_i = -\log(h_i - x_i)`. An entry without bounds stays as it is, :math:`y_i = x_i`.

    The direction from data to latent is forward, so a flow of bounded entries ends in ``Unbound(low, high).inv``.

    Args:
        low: the lower bounds of the entries, of shape ``(D,)``; ``-inf`` for none.
        high: the upper bounds of the entries, of shape ``(D,)``; ``inf`` for none.

    Shapes:
        ``(..., D)`` to ``(..., D)``; the log-determinant, in nats, is shaped like the batch.

    Raises:
        ValueError: the bounds are not two vectors of the same length, or a lower bound is not below its upper bound.
            When called: a value lies beyond its bounds (unless Pyro's validation is off).

    Example:
        >>> f = Unbound([0.0, 0.0, -torch.inf], [torch.inf, 1.0, torch.inf])  # positive, a proportion, unbounded
        >>> f(torch.tensor([1.0, 0.5, 7.0]))
        tensor([0., 0., 7.])
    """

    elementwise = True
    sign = 1
    constant = "is_bounded"

    def __init__(self, low: Tensor | Sequence[float], high: Tensor | Sequence[float]):
        low, high = (torch.as_tensor(bound) for bound in (low, high))
        if not low.is_floating_point() or low.dtype != high.dtype:
            low, high = (bound.to(torch.get_default_dtype()) for bound in (low, high))
        if low.dim() != 1 or low.shape != high.shape or not (low < high).all():
            raise ValueError(f"expected bounds of shape (D,), low below high; got {low.tolist()} and {high.tolist()}")
        super().__init__(low.shape)
        self.is_bounded: Tensor = torch.stack([low.isfinite(), high.isfinite()])
        # A buffer is finite, since an average of infinite numbers would be nan.
        self.register_buffer("low", low.where(low.isfinite(), 0.0))
        self.register_buffer("high", high.where(high.isfinite(), 0.0))

    @property
    def domain(self) -> constraints.Constraint:
        return _Box(self)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from_below, from_above = self.is_bounded
        above = torch.where(from_below, x - self.low, 1.0)
        below = torch.where(from_above, self.high - x, 1.0)
        y = torch.where(from_below | from_above, above.log() - below.log(), x)
        width = torch.where(from_below & from_above, self.high - self.low, 1.0)
        return y, (width.log() - above.log() - below.log()).sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from_below, from_above = self.is_bounded
        both = from_below & from_above
        low, high = (torch.where(both, bound, 0.0) for bound in (self.low, self.high))
        # torch.where also differentiates the branch that it does not take. This branch gets 0, since an infinite value
        # in it would turn the gradient into nan.
        up, down = (torch.where(bounded & ~both, y, 0.0) for bounded in (from_below, from_above))
        between = torch.where(both, y, 0.0)
        x = torch.where(from_below, self.low + up.exp(), torch.where(from_above, self.high - (-down).exp(), y))
        x = torch.where(both, torch.lerp(low, high, torch.sigmoid(between)), x)
        x = _between(x, self.domain.lower_bound, self.domain.upper_bound)
        ladj = torch.where(both, (high - low).log() - F.softplus(between) - F.softplus(-between), up - down)
        return x, ladj.sum(-1)


def column_statistics(x: Tensor, input_dim: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of each column of x, of shape ``(..., input_dim)``.

    The standard deviation of a constant column is exactly 0. The errors are those of `Standardize.fit`, except that a
    constant column is none.
    """
    check_tensor("fit", x)
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    if weights is not None:
        weights = torch.as_tensor(weights).reshape(-1)
        good = (weights >= 0) & weights.isfinite()
        if len(weights) != len(rows) or not good.all() or (weights > 0).sum() < 2:
            raise ValueError(
                f"expected a weight for each of the {len(rows)} rows, none of them negative, nan or infinite, and two "
                f"above 0; got {len(weights)}, {(~good).sum()} of them bad, and {(weights > 0).sum()} above 0"
            )
        rows, weights = rows[weights > 0], weights[weights > 0]  # of the others it does not matter what they hold
    if rows.shape[-1] != input_dim or len(rows) < 2:
        raise ValueError(f"expected at least two rows of {input_dim} columns; got shape {tuple(x.shape)}")
    bad = (~rows.isfinite()).any(-1).sum()
    if bad:
        raise ValueError(f"expected finite values; got nan or inf in {bad} of {len(rows)} rows")
    # A power of two near the largest value changes no digit, and no square of such a quotient is 0 or infinite.
    unit = torch.exp2(rows.abs().amax(0).frexp().exponent.to(rows) - 1)
    rows = rows / unit
    if weights is None:
        mean, std = rows.mean(0), rows.std(0)
    else:
        weights = (weights / weights.max()).to(rows)  # single precision might not hold the weights themselves
        weights = weights / weights.sum()
        mean = weights @ rows
        std = (weights @ (rows - mean).square() * (len(rows) / (len(rows) - 1))).sqrt()
    return unit * mean, unit * torch.where((rows == rows[0]).all(0), 0.0, std)
