# SPDX-License-Identifier: Apache-2.0
"""The contract of every bijection: a value comes together with its log-determinant."""

from collections.abc import Sequence

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from .inputs import check_context, check_event_shape, check_value
from .memo import Memo, forget_param_store
from .shapes import real_events

_DIRECTIONS = ("forward_and_ladj", "inverse_and_ladj")


class Bijection(TransformModule):
    r"""An invertible, differentiable map :math:`y = f(x)` with :math:`\log|\det \partial y / \partial x|`.

    A subclass writes :meth:`forward_and_ladj` and :meth:`inverse_and_ladj` and nothing else. All that
    :class:`torch.distributions.Transform` asks for (``f(x)``, ``f.inv``, ``f.log_abs_det_jacobian(x, y)``,
    ``f.forward_shape``, ...) is written here once, so that a bijection goes into
    :class:`~pyro.distributions.TransformedDistribution`, into SVI guides and between Pyro's own transforms.

    ``log_prob`` evaluates a bijection once, and ``log_prob`` of a tensor that it has just made evaluates it not at all:
    the last evaluation is remembered while its output lives, and forgotten as soon as a parameter, a buffer, the grad
    mode or the train mode has changed. Nobody needs to call :meth:`clear_cache`. (One thing cannot be seen: a parameter
    that is written in place through ``.data`` outside of an optimizer. Write under ``torch.no_grad()`` instead.)

    Args:
        event_shape: the shape of one event; ``None`` stands for "any size".
        context_dim: the width of the context that it must be given, 0 for none.

    Example:
        >>> class Shift(Bijection):
        ...     def forward_and_ladj(self, x, context=None):
        ...         return x + 1.0, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_ladj(self, y, context=None):
        ...         return y - 1.0, y.new_zeros(y.shape[:-1])
        >>> f = Shift(event_shape=(2,))
        >>> f.inv(f(torch.zeros(3, 2))).shape
        torch.Size([3, 2])
    """

    bijective = True

    elementwise = False
    """Whether each entry of the output depends on one entry of the input only."""

    is_partial = False
    """Whether some entries are changed and others left alone, so that a stack of such bijections must take turns."""

    can_be_recomputed = False
    """Whether ``Compose(checkpoint=True)`` may evaluate it a second time in the backward pass."""

    needs_data = False
    """Whether the next training pass in the data direction initializes the bijection from the data it sees.
    :func:`fit` then evaluates the first batch once in eager mode, before it takes or compiles a step."""

    def __init__(self, event_shape: Sequence[int | None], *, context_dim: int = 0):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.context_dim = context_dim
        for name in ("domain", "codomain"):
            if not hasattr(type(self), name):  # a subclass may declare its own, as an attribute or a property
                setattr(self, name, real_events(len(self.event_shape)))
        self._memo = Memo()

    # -- what a subclass writes --------------------------------------------------------------------------------------

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = f(x) and log|det dy/dx|, the latter shaped like the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_and_ladj")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = f^{-1}(y) and log|det dx/dy|, the latter shaped like the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse_and_ladj")

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        """Which entries of the output depend on others, given which of the input do (boolean, shaped like the event).

        :class:`Compose` uses it to refuse a stack that leaves an entry alone. By default an :attr:`elementwise`
        bijection changes no more than was changed before, and any other changes all entries.
        """
        return changed if self.elementwise else torch.ones_like(changed)

    # -- what torch and Pyro ask for ---------------------------------------------------------------------------------

    @property
    def inv(self) -> "Bijection":
        """The inverse, a module with the same parameters; ``f.inv.inv is f``."""
        if self._inv is None:
            self.__dict__["_inv"] = Inverse(self)  # past nn.Module's registration, which would make f contain itself
        return self._inv

    def __call__(self, x: Tensor) -> Tensor:
        return self._evaluate(x, forward=True)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._evaluate(y, forward=False)[0]

    def _call(self, x: Tensor) -> Tensor:
        return self(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inv_call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| at x, shaped like the batch, in nats."""
        ladj = self._memo.ladj(self, x, y)
        return self._evaluate(x, forward=True)[1] if ladj is None else ladj

    def _evaluate(self, value: Tensor, *, forward: bool, remember: bool = True) -> tuple[Tensor, Tensor]:
        """:meth:`forward_and_ladj` or :meth:`inverse_and_ladj` of a checked value, once per pair (x, y)."""
        self._check(value, forward=forward)
        remembered = self._memo.back(self, value, forward=forward)
        if remembered is not None:
            return remembered
        output, ladj = self.forward_and_ladj(value) if forward else self.inverse_and_ladj(value)
        if remember:
            output = self._memo.store(self, value, output, ladj, forward=forward)
        return output, ladj

    def _check(self, value: Tensor, *, forward: bool) -> None:
        """Raises an error that says what to do where `value` does not fit (shape, dtype, device, missing context)."""
        check_value(self, value, self.forward_shape if forward else self.inverse_shape)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of f(x), given that of x."""
        return check_event_shape(self, shape, self.event_shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of f^{-1}(y), given that of y."""
        return check_event_shape(self, shape, self.event_shape)

    def with_cache(self, cache_size: int = 1) -> "Bijection":
        """Itself: a bijection always remembers its last evaluation, and never a stale one."""
        return self

    def clear_cache(self) -> None:
        """Forgets the last evaluation. Never needed."""
        self._memo.clear()

    def condition(self, context: Tensor) -> "Bijection":
        """The bijection at a fixed context, of shape ``batch_shape + (context_dim,)``.

        A bijection that takes no context is the same at all contexts, and returns itself.
        """
        return Conditioned(self, context) if self.context_dim else self

    def compile(self, **options) -> None:
        """Compiles both directions, each as one graph (:func:`torch.compile` with ``fullgraph=True`` and the options),
        for whatever evaluates this bijection from now on. Copies and pickles are uncompiled.

        Layers that are initialised by data, as ActNorm, must be so before.
        """
        for name in _DIRECTIONS:
            method = getattr(type(self), name).__get__(self)
            self.__dict__[name] = torch.compile(method, fullgraph=True, **options)

    def __getstate__(self) -> dict:
        forget_param_store(self)
        state = super().__getstate__() | {"_inv": None, "_memo": Memo()}
        return {name: value for name, value in state.items() if name not in _DIRECTIONS}  # which are compiled

    __repr__ = nn.Module.__repr__


# Pyro's ConditionalTransformedDistribution hands its context to whatever is one of these.
ConditionalTransform.register(Bijection)


class Inverse(Bijection):
    r""":math:`y = f^{-1}(x)`: a view of f with the same parameters and the same memory. Made by ``f.inv``."""

    def __init__(self, bijection: Bijection):
        event_shape = bijection.event_shape
        if None not in event_shape:
            shape = bijection.forward_shape(event_shape)
            event_shape = shape[len(shape) - bijection.codomain.event_dim :]
        super().__init__(event_shape, context_dim=bijection.context_dim)
        self.bijection = bijection
        self.domain, self.codomain = bijection.codomain, bijection.domain

    inv = property(lambda self: self.bijection)

    def forward_and_ladj(self, x, context=None):
        return self.bijection.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y, context=None):
        return self.bijection.forward_and_ladj(y, context)

    def _evaluate(self, value, *, forward, remember=True):
        return self.bijection._evaluate(value, forward=not forward, remember=remember)

    def compile(self, **options):
        self.bijection.compile(**options)

    def log_abs_det_jacobian(self, x, y):
        ladj = self.bijection._memo.ladj(self.bijection, y, x)
        return self._evaluate(x, forward=True)[1] if ladj is None else -ladj

    def changed_entries(self, changed, *, forward=True):
        return self.bijection.changed_entries(changed, forward=not forward)

    def forward_shape(self, shape):
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape):
        return self.bijection.forward_shape(shape)


class Conditioned(Bijection):
    """y = f(x; c) at a fixed context c, whose batch shape broadcasts with that of x. Made by ``f.condition(context)``.

    Args:
        bijection: a bijection with ``context_dim > 0``.
        context: shape ``batch_shape + (context_dim,)``.
    """

    def __init__(self, bijection: Bijection, context: Tensor):
        super().__init__(bijection.event_shape)
        check_context(bijection, context)
        self.bijection = bijection
        self.domain, self.codomain = bijection.domain, bijection.codomain
        # It moves with the module, but it is data: it has no place in a state_dict.
        self.register_buffer("context", context, persistent=False)

    def forward_and_ladj(self, x, context=None):
        return self.bijection.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y, context=None):
        return self.bijection.inverse_and_ladj(y, self.context)

    def changed_entries(self, changed, *, forward=True):
        return self.bijection.changed_entries(changed, forward=forward)

    def forward_shape(self, shape):
        return self._broadcast(self.bijection.forward_shape(shape), self.codomain.event_dim)

    def inverse_shape(self, shape):
        return self._broadcast(self.bijection.inverse_shape(shape), self.domain.event_dim)

    def _broadcast(self, shape: torch.Size, event_dim: int) -> torch.Size:
        batch_shape = shape[: len(shape) - event_dim]
        try:
            batch_shape = torch.broadcast_shapes(batch_shape, self.context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"expected a batch shape that broadcasts with the context's {tuple(self.context.shape[:-1])}; "
                f"got {tuple(batch_shape)}: add axes of size 1 to one of them"
            ) from None
        return batch_shape + shape[len(shape) - event_dim :]

    def __getstate__(self) -> dict:
        # A context that an encoder has made belongs to a graph, which can be neither copied nor pickled.
        state = super().__getstate__()
        return state | {"_buffers": state["_buffers"] | {"context": self.context.detach()}}
