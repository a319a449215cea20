# SPDX-License-Identifier: Apache-2.0
"""Distributions that a base and a bijection define."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.utils import stateless

from .bases import Base, MixtureBase, within_support
from .bijections.bijection import Bijection
from .bijections.compose import Compose
from .bijections.inputs import check_context, check_tensor
from .bijections.memo import forget_param_store
from .bijections.modes import is_eager
from .bijections.shapes import for_inner_axes, inner_point, of_entries, strictly_inside, sum_events
from .domains import check_domain


class FlowDistribution(dist.TransformedDistribution):
    r""":math:`\log p(y) = \log p_0(f^{-1}(y)) + \log|\det \partial f^{-1} / \partial y|`, in one pass
    through the bijection (Dinh et al. 2017, eq. 2). Calling a :class:`Flow` returns one.

    All else (``sample``, ``rsample``, ``expand``, ``support``) is as in
    :class:`~pyro.distributions.TransformedDistribution`.
    """

    def __init__(
        self,
        base_distribution: dist.Distribution,
        transforms: Bijection | Sequence[Bijection],
        validate_args: bool | None = None,
    ):
        # Torch's own composes any number of transforms, asks for each shape twice, and takes three times as long.
        (transform,) = [transforms] if isinstance(transforms, Bijection) else transforms
        missing = transform.domain.event_dim - len(base_distribution.event_shape)
        if missing > 0:
            base_distribution = dist.Independent(base_distribution, missing)
        shape = transform.forward_shape(base_distribution.batch_shape + base_distribution.event_shape)
        event_dim = len(base_distribution.event_shape) + transform.codomain.event_dim - transform.domain.event_dim
        batch_shape = shape[: len(shape) - event_dim]
        if batch_shape != base_distribution.batch_shape:
            base_distribution = base_distribution.expand(batch_shape)
        self.base_dist = base_distribution
        self.transforms = [transform]
        Distribution.__init__(self, batch_shape, shape[len(shape) - event_dim :], validate_args)

    @property
    def transform(self) -> Bijection:
        r"""The map :math:`f^{-1}` from data to base. (The maps in ``transforms`` go from base to data.)

        >>> from pyro_realnvp import Flow, Standardize
        >>> flow = Flow(Standardize(1).fit(torch.tensor([[0.0], [2.0]])).inv)
        >>> flow().transform(torch.tensor([1.0]))
        tensor([0.])
        """
        (transform,) = self.transforms
        return transform.inv

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, shaped like the batch; -inf where an entry lies on a bound of the support or beyond."""
        (transform,) = self.transforms
        check_tensor("log_prob", value)
        if self._validate_args and not torch.compiler.is_compiling():  # compiled code cannot branch on values
            fits = value.shape[value.dim() - self.event_dim :] == self.event_shape and value.is_floating_point()
            if not fits:
                transform._check(value, forward=False)  # raises an error that says what to do
            # A sum is nan if a value is, and takes a fifth of the time of torch's own check, which then says more. That
            # check fails for an empty batch.
            is_sum_enough = not self._batch_shape and _is_real(transform) and is_eager(value)
            if not fits or (value.numel() and not (is_sum_enough and not value.sum().isnan())):
                self._validate_sample(value)
        inside = strictly_inside(transform.codomain, value)
        # Neither compiled code nor code under torch.func can branch on values.
        if inside is not None and not (is_eager(value, inside) and inside.all()):
            # On a bound the bijection is infinite, and its gradient nan. Any inner point stands in for the value there.
            value = torch.where(inside, value, inner_point(transform.codomain, value))
        x, ladj = transform._evaluate(value, forward=False, remember=False)
        log_p = within_support(self.base_dist).log_prob(x) + self._sum(ladj, x)
        if inside is None:
            return log_p
        return torch.where(sum_events(~inside, self.event_dim) == 0, log_p, -torch.inf)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """A reparametrized sample y and log p(y), in one pass through the bijection.

        >>> from pyro_realnvp import Flow, real_nvp
        >>> y, log_prob = Flow(real_nvp(2))().rsample_and_log_prob((5,))
        >>> y.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
        """
        (transform,) = self.transforms
        if not self.base_dist.has_rsample:
            raise NotImplementedError(
                f"{type(self.base_dist).__name__} has no rsample, so its draws have no gradients: use sample() and "
                "log_prob(), or a base that has"
            )
        x = self.base_dist.rsample(_shape(sample_shape))
        y, ladj = transform._evaluate(x, forward=True, remember=False)
        return y, self.base_dist.log_prob(x) - self._sum(ladj, x)

    def expand(self, batch_shape: Sequence[int], _instance: dist.Distribution | None = None) -> "FlowDistribution":
        # Without an instance, torch refuses a class that has an __init__ of its own.
        return super().expand(torch.Size(batch_shape), _instance or type(self).__new__(type(self)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        (transform,) = self.transforms
        # A memory that was made without gradients would answer no question that is asked with them.
        with torch.no_grad():
            draw = transform._evaluate(self.base_dist.sample(_shape(sample_shape)), forward=True, remember=False)[0]
        return draw.detach() if torch.jit.is_tracing() else draw  # a traced graph has no no_grad

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().rsample(_shape(sample_shape))

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def _sum(self, ladj: Tensor, x: Tensor) -> Tensor:
        """The log-determinant of whole events, from that of the bijection's and its input."""
        event_dim = self.transforms[0].domain.event_dim
        more = len(self.base_dist.event_shape) - event_dim
        # A bijection may return one number for all of the inner events.
        return sum_events(ladj.expand(x.shape[: x.dim() - event_dim]), more) if more else ladj


def _show_parameters(flow: PyroModule) -> None:
    """Reads all parameters of a flow that `to_pyro_module_` has converted, by which Pyro gets to know them.

    The density reads them only where it is evaluated, after the model has asked for it.
    """
    for name, module in flow.named_modules():
        if getattr(module, "_pyro_samples", None):
            raise ValueError(
                f"the priors of {sorted(module._pyro_samples)} in {name!r} would be drawn anew in each evaluation of a "
                "density, outside of the model: draw the parameters by pyro.sample in the model, and pass them by "
                "torch.func.functional_call(flow, parameters)"
            )
        for own in [*module._parameters, *getattr(module, "_pyro_params", ())]:
            getattr(module, own)


def _is_real(transform: Bijection) -> bool:
    return of_entries(transform.codomain) is constraints.real


def _shape(sample_shape: Sequence[int]) -> torch.Size:
    if isinstance(sample_shape, int):
        raise TypeError(f"expected a sample_shape; got {sample_shape}: pass ({sample_shape},)")
    return torch.Size(sample_shape)


def as_called(module: nn.Module) -> nn.Module:
    """A module that keeps the tensors that it has now, if `torch.func.functional_call` is about to take them back.

    A distribution is asked for numbers only after that call has returned.
    """
    if torch.compiler.is_compiling():
        return module
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _FUNCTIONAL_CALL:
        frame = frame.f_back
    if frame is None:
        return module
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


_FUNCTIONAL_CALL = stateless._functional_call.__code__


class Flow(nn.Module):
    r""":math:`y = f(x),\ x \sim p_0`: a base and a bijection joined in a module, which moves, saves and loads as one.

    Calling it returns a Pyro distribution, which goes into ``pyro.sample`` and plates, and whose ``log_prob`` takes one
    pass through the bijection. To train the flow in a Pyro model, register it there with ``pyro.module("flow", flow)``
    or make it an attribute of a ``PyroModule``.

    Args:
        bijection: the map f from base to data.
        event_shape: the shape of one event; needed only if the bijection does not know it.
        base: a module or function without arguments that returns the base distribution :math:`p_0`, such as a
            :class:`Base`, or a :class:`MixtureBase`; by default a standard normal.
        embedding: a module that the context passes first, such as ``Standardize(K).fit(context)`` or a network that
            summarizes an observation. Its output is the context of the bijection.

    Shapes:
        ``flow()`` has batch shape ``()``; ``flow(context)``, with a context of shape ``batch_shape + (context_dim,)``,
        has batch shape ``batch_shape``.

    Raises:
        TypeError: ``bijection`` is not a :class:`Bijection`.
        ValueError: The event shape does not fit the bijection or the base, or the base draws values that the bijection
            does not take. When called: the context is missing, not expected or of the wrong width; or the temperature
            takes the draws of a bounded base beyond the values that the bijection takes.

    Example:
        >>> from pyro_realnvp import real_nvp
        >>> flow = Flow(real_nvp(2))
        >>> flow().sample((5,)).shape, flow().log_prob(torch.zeros(5, 2)).shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> conditional = Flow(real_nvp(2, context_dim=3))
        >>> conditional(torch.zeros(7, 3)).batch_shape
        torch.Size([7])
    """

    is_discrete = False
    """Whether the events are integer levels. If so, :func:`fit` accepts only integers."""

    def __init__(
        self,
        bijection: Bijection,
        event_shape: Sequence[int] | None = None,
        *,
        base: Callable[[], dist.Distribution] | None = None,
        embedding: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(
                f"expected a Bijection; got {type(bijection).__name__}: wrap other transforms in Compose([...])"
            )
        if event_shape is None:
            event_shape = bijection.inv.event_shape
        if None in event_shape:
            raise ValueError("the bijection does not know the size of its events: pass event_shape=")
        self.bijection = bijection
        self.embedding = embedding
        self.event_shape: torch.Size = torch.Size(event_shape)
        extra_dims = len(self.event_shape) - bijection.codomain.event_dim  # leading axes that f treats as a batch
        if extra_dims < 0:
            raise ValueError(
                f"expected an event shape with at least the bijection's {bijection.event_dim} axes; got {event_shape}"
            )
        base_shape = bijection.inverse_shape(self.event_shape)
        base_shape = base_shape[len(base_shape) - bijection.domain.event_dim - extra_dims :]
        self.base: nn.Module | Callable[[], dist.Distribution] = (
            base if base is not None else Base(dist.Normal, loc=torch.zeros(base_shape), scale=torch.ones(base_shape))
        )
        got = self.base.event_shape if isinstance(self.base, MixtureBase) else self.base().event_shape
        if got != base_shape:
            raise ValueError(
                f"expected a base with event shape {tuple(base_shape)}; got {tuple(got)}: "
                "declare its axes as events with .to_event()"
            )
        check_domain(bijection.domain, self.base if isinstance(self.base, MixtureBase) else self.base())

    def extra_repr(self) -> str:
        num_parameters = sum(p.numel() for p in self.parameters())
        return f"event_shape={tuple(self.event_shape)}, num_parameters={num_parameters}"

    def architecture_repr(self) -> str:
        """Nothing: the state that a file holds has the shapes of all parameters."""
        return ""

    @property
    def takes_context(self) -> bool:
        """Whether calling the flow requires a context."""
        return bool(self.bijection.context_dim or getattr(self.base, "context_dim", 0))

    def compile(self, **options: Any) -> None:
        """Compiles both directions of the bijection: see :meth:`Bijection.compile`."""
        self.bijection.compile(**options)

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self.parameters())
        return vars(self).copy()

    def forward(self, context: Tensor | None = None, *, temperature: float = 1.0) -> FlowDistribution:
        """Returns the distribution, given the context.

        Args:
            context: the context of a conditional flow, ``batch_shape + (context_dim,)``.
            temperature: the factor by which the base is scaled about its mean. Below 1, samples lie closer to the
                modes. Both samples and ``log_prob`` are those of the scaled base.
        """
        if isinstance(self, PyroModule):
            _show_parameters(self)
        temperature = float(temperature)  # torch would count the logarithm of a tensor once, and not for each entry
        if not temperature > 0:
            raise ValueError(f"expected temperature > 0; got {temperature}")
        context = self.embed(context)
        base_context = context if getattr(self.base, "context_dim", 0) else None
        if base_context is None or self.bijection.context_dim:
            check_context(self.bijection, context)
        extra_dims = len(self.event_shape) - self.bijection.codomain.event_dim
        bijection = as_called(self.bijection)
        if context is not None:
            bijection = bijection.condition(for_inner_axes(context, extra_dims))
        if isinstance(self.base, MixtureBase):
            return FlowDistribution(self.base(base_context, temperature=temperature), [bijection])
        base = self.base()
        if temperature != 1.0:
            try:
                mean = base.mean
            except NotImplementedError:  # which torch raises without a message
                mean = torch.tensor(math.nan)
            if not mean.isfinite().all():
                raise ValueError("expected a base with a mean, about which temperature scales it: use temperature=1")
            scale = dist.transforms.AffineTransform((1 - temperature) * mean, temperature)
            check_domain(self.bijection.domain, base, temperature)
            base = FlowDistribution(base, [Compose([scale])], validate_args=False)
        return FlowDistribution(base, [bijection])

    def embed(self, context: Tensor | None) -> Tensor | None:
        """Returns what the embedding makes of a context, or the context itself if there is no embedding."""
        return context if context is None or self.embedding is None else self.embedding(context)
