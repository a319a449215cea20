# SPDX-License-Identifier: Apache-2.0
"""Coupling layers: a network reads one part of an event and determines how the other part is changed."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .masks import Mask
from .shapes import broadcast_batch, sum_events


class Coupling(Bijection):
    r"""The base class of couplings: :math:`y_b = x_b,\quad y_{1-b} = g(x_{1-b};\, \theta(x_b))`, where g acts on each
    entry and a network computes its parameters :math:`\theta` from the kept entries (Dinh et al. 2017, section 3.2).

    A subclass sets :attr:`outputs_per_entry` and writes g, as :meth:`forward_entries` and :meth:`inverse_entries`. You
    can then pass the class to ``real_nvp(coupling=)`` and ``image_real_nvp(coupling=)``. A coupling that mixes the
    changed entries instead writes :meth:`forward_and_ladj` and :meth:`inverse_and_ladj`, with the help of
    :meth:`split`, :meth:`read` and the mask's ``join``.

    Args:
        mask: the :class:`Mask` that says which entries are kept (b = 1) and which are changed (b = 0).
        conditioner: a module that maps the kept entries to the parameters. If there is a context, it is the second
            argument.
        context_dim: the width of the context that the conditioner expects, 0 for none.

    Raises:
        TypeError: the mask is not a :class:`Mask`, the conditioner is not a module, or the subclass does not set
            :attr:`outputs_per_entry`.

    Example:
        >>> from pyro_realnvp import MLP, masks
        >>> class Scaling(Coupling):  # y = x exp(s)
        ...     outputs_per_entry = 1
        ...     def forward_entries(self, x, s):
        ...         return x * s.exp(), s
        ...     def inverse_entries(self, y, s):
        ...         return y / s.exp(), s
        >>> Scaling(masks.half(4), MLP(2, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    is_partial = True
    can_be_recomputed = True

    outputs_per_entry: int
    """The number of parameters of g for each changed entry."""

    def __init__(self, mask: Mask, conditioner: nn.Module, *, context_dim: int = 0):
        self._check_outputs()
        if not isinstance(mask, Mask):
            raise TypeError(f"expected a Mask, e.g. masks.half(4) or Mask(b); got {type(mask).__name__}")
        if not isinstance(conditioner, nn.Module):
            raise TypeError(
                f"expected the conditioner to be an nn.Module, so that its parameters are found; "
                f"got {type(conditioner).__name__}"
            )
        super().__init__(mask.event_shape, context_dim=context_dim)
        self.mask = mask
        self.conditioner = conditioner

    def forward_entries(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        r"""Returns :math:`y = g(x; \theta)` and :math:`\log|g'(x; \theta)|` of each changed entry.

        All tensors have one shape, that of the changed entries. If the coupling preserves volume, it returns None
        instead of the logarithms.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward_entries")

    def inverse_entries(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        r"""Returns :math:`x = g^{-1}(y; \theta)` and :math:`\log|g'(x; \theta)|` of each changed entry, which has the
        same sign as in the forward direction."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse_entries")

    def change(
        self, kept: Tensor, changed: Tensor, context: Tensor | None, forward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the changed entries in the given direction and the logarithms of their slopes."""
        entries = self.forward_entries if forward else self.inverse_entries
        return entries(changed, *self.read(kept, context))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return run_couplings([(self, False, context)], x, forward=True)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return run_couplings([(self, False, context)], y, forward=False)

    def split(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the kept and the changed entries of x, after its batch shape is broadcast with the context's."""
        return self.mask.split(broadcast_batch(x, context, self.mask.event_dim))

    def read(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """Returns the conditioner's output as :attr:`outputs_per_entry` tensors of the shape of the changed entries.

        Raises:
            TypeError: the conditioner returns something else than a tensor.
            ValueError: the conditioner returns an output of another shape.
        """
        mask, conditioner = self._modules["mask"], self._modules["conditioner"]  # a third of the time of `self.mask`
        event_dim = mask.event_dim
        batch_shape, event_shape = kept.shape[:-event_dim], kept.shape[-event_dim:]
        if event_dim > 1:  # Convolutions take exactly one batch axis.
            kept = kept.reshape(batch_shape.numel(), *event_shape)
            context = None if context is None else context.expand(*batch_shape, -1).reshape(-1, context.shape[-1])
        out = conditioner(kept) if context is None else conditioner(kept, context)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(self).__name__} expected one tensor from its conditioner, with the {self.outputs_per_entry} "
                f"parameters along one axis; got {type(out).__name__}: join the outputs with torch.cat"
            )
        expected, got = (mask.num_changed * self.outputs_per_entry, *event_shape[1:]), out.shape[-event_dim:]
        if got != expected:
            raise ValueError(
                f"{type(self).__name__} expected a shape of {_tail(expected)} from its conditioner, "
                f"{self.outputs_per_entry} for each of the {mask.num_changed} that the mask changes; got {_tail(got)}"
            )
        if event_dim > 1:
            out = out.reshape(batch_shape + got)
        if out.dtype != kept.dtype:  # Under autocast the conditioner may return another one.
            out = out.to(kept.dtype)
        return out.chunk(self.outputs_per_entry, -event_dim)

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        kept, others = self.mask.split(changed)
        return self.mask.join(kept, torch.ones_like(others))

    @classmethod
    def _check_outputs(cls) -> None:
        if not hasattr(cls, "outputs_per_entry"):
            raise TypeError(
                f"{cls.__name__} does not set outputs_per_entry, the number of parameters for each changed entry: "
                "set it in the class, e.g. outputs_per_entry = 2"
            )

    @classmethod
    def check_options(cls, **options: Any) -> dict[str, Any]:
        """Returns the options that are not None, after checking that the class takes them.

        The ready-made flows use it for the options that they pass on to a coupling.

        Raises:
            ValueError: the coupling does not have one of the options.
            TypeError: the coupling does not set :attr:`outputs_per_entry`.
        """
        cls._check_outputs()
        given = {name: value for name, value in options.items() if value is not None}
        unknown = given.keys() - inspect.signature(cls).parameters.keys()
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no option {sorted(unknown)}: leave it out, or pass a coupling that has it, "
                "such as AffineCoupling"
            )
        return given


def run_couplings(
    steps: Sequence[tuple[Coupling, bool, Tensor | None]],
    x: Tensor,
    *,
    forward: bool,
    call: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies couplings that split an event alike, which join its halves only after the last.

    Args:
        steps: the couplings in the order in which they are applied in this direction, each with whether it keeps the
            entries that the one before it changed, and with its context.
        x: the input of the first.
        forward: the direction.
        call: what evaluates each coupling's :meth:`Coupling.change`, such as a checkpoint.

    Returns:
        The output of the last coupling, and the log-determinant.
    """
    first, last = steps[0][0].mask, steps[-1][0].mask
    event_dim = first.event_dim
    for _, _, context in steps:
        x = broadcast_batch(x, context, event_dim)
    kept, changed = first.split(x)
    # The logarithms of the slopes are added up entry by entry, and summed over an event only once.
    of_kept = of_changed = None
    for coupling, swap, context in steps:
        if swap:
            kept, changed, of_kept, of_changed = changed, kept, of_changed, of_kept
        args = kept, changed, context, forward
        again = call is not None and coupling.can_be_recomputed
        changed, log_slope = call(coupling.change, *args) if again else coupling.change(*args)
        if log_slope is not None:
            if log_slope.shape != changed.shape:
                raise ValueError(
                    f"{type(coupling).__name__} expected log-slopes of the shape of its changed entries, "
                    f"{tuple(changed.shape)}; got {tuple(log_slope.shape)}: return one for each entry, not their sum"
                )
            of_changed = log_slope if of_changed is None else of_changed + log_slope
    sums = [sum_events(log_slope, event_dim) for log_slope in (of_kept, of_changed) if log_slope is not None]
    ladj = sum(sums[1:], sums[0]) if sums else x.new_zeros(x.shape[: x.dim() - event_dim])
    return last.join(kept, changed), ladj if forward or not sums else -ladj


def _tail(shape: Sequence[int]) -> str:
    return f"(..., {', '.join(map(str, shape))})"


def bounded(raw: Tensor, bound: float) -> Tensor:
    """A smooth function of the raw value from -bound to bound, with the slope 1 at 0."""
    # The gradient of tanh would vanish exponentially, and a value that has reached its bound would stay there.
    slope = math.pi / (2 * bound)
    return torch.atan(raw * slope) / slope


class AffineCoupling(Coupling):
    r""":math:`y_b = x_b,\quad y_{1-b} = x_{1-b} \odot \exp(s(x_b)) + t(x_b), \quad
    \log|\det \partial y / \partial x| = \sum s(x_b)`  (RealNVP; Dinh et al. 2017, eqs. 4-6).

    The log-scale is a smoothly bounded function of the network's raw output r,
    :math:`s = \tfrac{2}{\pi} s_{\max} \arctan(\tfrac{\pi}{2} r / s_{\max})`. Near the identity :math:`s \approx r`,
    and its gradient decays only like :math:`1 / r^2`.

    Args:
        mask: the :class:`Mask` that says which entries are kept (b = 1) and which are changed (b = 0).
        conditioner: a module, such as an :class:`MLP`, that maps the kept entries, ``(..., num_kept)``, to the outputs,
            ``(..., 2 * num_changed)``: all raw log-scales, then all shifts. If there is a context, it is the second
            argument. For images, use a module such as :class:`ConvResNet`: the numbers count channels, and height and
            width follow.
        context_dim: the width of the context that the conditioner expects, 0 for none.
        max_log_scale: the bound :math:`s_{\max}` of the log-scale.

    Shapes:
        ``(..., D)`` to ``(..., D)``; with a mask for images, ``(..., C, H, W)`` to the same. The log-determinant, in
        nats, is shaped like the batch.

    Raises:
        ValueError: the event does not fit the mask, the conditioner returns another number of outputs, the context is
            missing, unexpected or of the wrong width, or ``max_log_scale <= 0``.

    Example:
        >>> from pyro_realnvp import MLP, masks
        >>> mask = masks.half(4)
        >>> f = AffineCoupling(mask, MLP(mask.num_kept, 2 * mask.num_changed))
        >>> x = torch.randn(10, 4)
        >>> y, ladj = f.forward_and_ladj(x)
        >>> y.shape, ladj.shape
        (torch.Size([10, 4]), torch.Size([10]))
    """

    outputs_per_entry = 2

    def __init__(self, mask: Mask, conditioner: nn.Module, *, context_dim: int = 0, max_log_scale: float = 3.0):
        super().__init__(mask, conditioner, context_dim=context_dim)
        if not max_log_scale > 0:
            raise ValueError(f"expected max_log_scale > 0; got {max_log_scale}")
        self.max_log_scale = max_log_scale

    def extra_repr(self) -> str:
        return f"max_log_scale={self.max_log_scale}"

    def log_scale(self, raw: Tensor) -> Tensor:
        """Returns the log-scale s of the changed entries, from the network's raw output r."""
        return bounded(raw, self.max_log_scale)

    def forward_entries(self, x: Tensor, raw: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(raw)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse_entries(self, y: Tensor, raw: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(raw)
        return (y - shift) / log_scale.exp(), log_scale


class VolumePreservingCoupling(AffineCoupling):
    r"""An :class:`AffineCoupling` whose log-scales sum to zero, so that :math:`\log|\det \partial y / \partial x| = 0`
    (GIN; Sorrenson et al. 2020).

    If only one entry changes, its log-scale is 0 and the coupling only shifts it. The arguments, shapes and errors are
    those of :class:`AffineCoupling`.

    Example:
        >>> from pyro_realnvp import MLP, masks
        >>> f = VolumePreservingCoupling(masks.half(4), MLP(2, 4))
        >>> f.forward_and_ladj(torch.randn(3, 4))[1]
        tensor([0., 0., 0.])
    """

    def log_scale(self, raw: Tensor) -> Tensor:
        log_scale = super().log_scale(raw)
        return log_scale - log_scale.mean(tuple(range(-self.mask.event_dim, 0)), keepdim=True)

    def forward_entries(self, x: Tensor, raw: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        return super().forward_entries(x, raw, shift)[0], None

    def inverse_entries(self, y: Tensor, raw: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        return super().inverse_entries(y, raw, shift)[0], None


class AdditiveCoupling(Coupling):
    r""":math:`y_b = x_b,\quad y_{1-b} = x_{1-b} + t(x_b), \quad \log|\det \partial y / \partial x| = 0`
    (NICE; Dinh et al. 2014, section 3.2).

    Args:
        mask: the :class:`Mask` that says which entries are kept (b = 1) and which are changed (b = 0).
        conditioner: a module that maps the kept entries, ``(..., num_kept)``, to the shifts, ``(..., num_changed)``. If
            there is a context, it is the second argument.
        context_dim: the width of the context that the conditioner expects, 0 for none.

    The shapes and errors are those of :class:`AffineCoupling`.

    Example:
        >>> from pyro_realnvp import MLP, masks
        >>> f = AdditiveCoupling(masks.half(4), MLP(2, 2))
        >>> f(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    outputs_per_entry = 1

    def forward_entries(self, x: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        return x + shift, None

    def inverse_entries(self, y: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        return y - shift, None
