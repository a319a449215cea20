# SPDX-License-Identifier: Apache-2.0
"""Probabilities of integer images, from densities of real ones."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..bijections.inputs import check_event_shape, check_tensor
from ..bijections.modes import is_eager
from ..distributions import Flow, FlowDistribution, as_called
from .multi_scale import check_image_shape

_LEAST_NOISE = 0.5  # between two values of noise, in levels


class Dequantized(dist.TorchDistribution):
    r""":math:`P(x) = \int_{[0, 1)^D} p\big(\tfrac{x + u}{L}\big)\, L^{-D}\, du`: the distribution of images x with
    integer levels 0, ..., L - 1, given a density p of real images on [0, 1]
    (Theis et al. 2016, section 3.1; Ho et al. 2019, section 3.1).

    ``log_prob`` returns a stochastic lower bound of log P, in nats:

    .. math:: \log \frac1K \sum_{k=1}^K \frac{p\big(\tfrac{x + u_k}{L}\big)\, L^{-D}}{q(u_k \mid x)},
        \quad u_k \sim q(u \mid x),

    where D is the number of entries of an image. The noise q is uniform (uniform dequantization) or a flow (variational
    dequantization). In expectation the bound rises with K and tends to log P.

    A sample is drawn from p and rounded down to its level. If p has mass outside of [0, 1], as it does behind
    ``Logit(0.05).inv``, samples there get the level 0 or L - 1, so that samples are always valid levels and
    probabilities sum to one. The bound leaves this mass out.

    Args:
        distribution: the density p of real events scaled to [0, 1]. Its batch and event shapes are kept.
        levels: the number of levels L.
        noise: the noise q, a function that takes a context and returns a reparametrized distribution on [0, 1], such as
            a conditional :class:`Flow` that ends in ``Logit(0).inv``. The context is x, scaled to [-1, 1] and
            flattened, of shape ``batch_shape + (D,)``. By default q is uniform.
        num_samples: the number K of noise samples in the bound.

    Raises:
        TypeError: The values are not integers.
        ValueError: The values have another event shape, or lie outside of 0, ..., L - 1 (checked only under validation,
            which is Pyro's default).

    Example:
        >>> pixels = dist.Uniform(torch.zeros(1, 2, 2), 1.0).to_event(3)
        >>> images = Dequantized(pixels, levels=4)
        >>> images.log_prob(torch.tensor([[[0, 1], [2, 3]]])) / math.log(4)
        tensor(-4.)
        >>> images.sample((5,)).shape
        torch.Size([5, 1, 2, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        distribution: dist.Distribution,
        levels: int = 256,
        *,
        noise: Callable[[Tensor], dist.Distribution] | None = None,
        num_samples: int = 1,
        validate_args: bool | None = None,
    ):
        _check_numbers(levels, num_samples)
        self.distribution = distribution
        self.levels = levels
        self.noise = noise
        self.num_samples = num_samples
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), self.event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Dequantized":
        return Dequantized(
            self.distribution.expand(batch_shape),
            self.levels,
            noise=self.noise,
            num_samples=self.num_samples,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """A lower bound of log P(value) in nats, shaped like the batch. Each call draws new noise."""
        value = self._checked(value)
        # The noise has an axis of its own, so that all others must be those of the result.
        batch_shape = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        value = value.expand(batch_shape + self.event_shape)
        u, log_q = self._noise(value)
        bound = self.distribution.log_prob(self._real(value, u)) - log_q
        return bound.logsumexp(0) - math.log(self.num_samples) - self.event_shape.numel() * math.log(self.levels)

    def _real(self, value: Tensor, u: Tensor) -> Tensor:
        """(value + u) / L, which neither rounding nor a noise of 0 takes to a bound of the level."""
        real = (value + u) / self.levels
        low, high = (level.to(real) / self.levels for level in (value, value + 1))
        low = low.clamp(min=torch.finfo(real.dtype).tiny)
        return real.clamp(torch.nextafter(low, high), torch.nextafter(high, low))

    def _noise(self, value: Tensor) -> tuple[Tensor, Tensor | float]:
        """Noise u of shape ``(K,) + value.shape``, and log q(u | value)."""
        like = self._parameter()
        shape = (self.num_samples,)
        if self.noise is None:
            dtype = torch.promote_types(like.dtype, torch.float32)  # 16 bits hold a level, but no noise beside it
            u = torch.rand(shape + value.shape, dtype=dtype, device=like.device)
            return u.clamp(min=torch.finfo(dtype).eps / 4), 0.0  # half of the smallest step, in place of a noise of 0
        centered = (value.to(like.dtype) + 0.5) * (2 / self.levels) - 1
        q = self.noise(centered.flatten(value.dim() - self.event_dim))
        if hasattr(q, "rsample_and_log_prob"):  # a flow of this package: one pass gives both
            u, log_q = q.rsample_and_log_prob(shape)
        else:
            u = q.rsample(shape)
            log_q = q.log_prob(u)
        if u.shape != shape + value.shape:
            raise ValueError(f"expected noise of shape {tuple(shape + value.shape)}; got {tuple(u.shape)}")
        if self._validate_args and is_eager(u) and not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError("expected noise in [0, 1]; got values outside: let its flow end in Logit(0).inv")
        return u, log_q

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples of integer images."""
        self._parameter()
        return quantize(self.distribution.sample(torch.Size(sample_shape)), self.levels)

    def _parameter(self) -> Tensor:
        """A tensor with the dtype and device of the density, which must have digits between levels."""
        like = _parameter(self.distribution)
        if isinstance(self.distribution, FlowDistribution) and torch.finfo(like.dtype).bits < 32:
            raise TypeError(
                f"expected a flow of at least 32 bits, since {like.dtype} has no digits for the noise between levels: "
                "convert it by .float(), and use autocast, as in fit(autocast=torch.bfloat16)"
            )
        own = torch.finfo(torch.promote_types(like.dtype, torch.float32))
        if own.eps * self.levels > _LEAST_NOISE:
            raise TypeError(
                f"expected a density in float64, since {own.dtype} has no digits for the noise between {self.levels} "
                "levels: convert it by .double()"
            )
        return like

    def _checked(self, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            check_tensor("Dequantized", value)
            raise TypeError(
                f"Dequantized expected integer levels 0, ..., {self.levels - 1}; got {value.dtype}: "
                f"pass (x * {self.levels - 1}).round().long() if x is in [0, 1], or score real images with the "
                "distribution inside"
            )
        check_event_shape(self, value.shape, self.event_shape)
        value = value.long()  # 255 + 1 is 0 in uint8, and torch has no arithmetic of uint16
        # Neither compiled code nor code under torch.func can branch on values, so the range is not checked there.
        if self._validate_args and is_eager(value) and value.numel():
            low, high = (int(bound) for bound in value.aminmax())
            if low < 0 or high >= self.levels:
                raise ValueError(
                    f"Dequantized expected levels 0, ..., {self.levels - 1}; got values from {low} to {high}: "
                    "check the images, or pass levels="
                )
        return value


def _check_numbers(levels: int, num_samples: int) -> None:
    are_whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in (levels, num_samples))
    if not are_whole or levels < 2 or num_samples < 1:
        raise ValueError(f"expected whole numbers levels >= 2 and num_samples >= 1; got {levels!r} and {num_samples!r}")


def quantize(x: Tensor, levels: int) -> Tensor:
    """The level of each value. Values below 0 get the first level, values of 1 or more the last."""
    return (x * levels).floor().clamp(0, levels - 1).long()


def _parameter(distribution: dist.Distribution) -> Tensor:
    """A tensor with the dtype and device of the distribution's values.

    A transformed distribution has no parameters of its own, so its innermost base is asked for one.
    """
    base = distribution
    while base is not None:
        for name in base.arg_constraints:
            value = getattr(base, name, None)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        base = getattr(base, "base_dist", None)
    return distribution.sample()


class DequantizedFlow(nn.Module):
    r"""A model of integer images, made from a :class:`Flow` of real ones: calling it returns a :class:`Dequantized`.

    :func:`fit` trains it on integer images of shape ``(N, C, H, W)`` and any integer dtype.

    Args:
        flow: a flow of real images scaled to [0, 1]. Its bijection should end in ``Logit().inv``.
        levels: the number of levels.
        noise: for variational dequantization, a :class:`Flow` conditional on the flattened image, trained together with
            ``flow``. By default the noise is uniform.
        num_samples: the number of noise samples in the bound. One is enough for training.

    Raises:
        TypeError: ``flow`` is not a :class:`Flow`.
        ValueError: ``levels`` or ``num_samples`` is no whole number, or too low.

    Example:
        >>> from pyro_realnvp import Base, Compose, Logit, image_real_nvp
        >>> shape = (1, 8, 8)
        >>> flow = Flow(Compose([image_real_nvp(shape, hidden_channels=8), Logit().inv]))
        >>> images = DequantizedFlow(flow, levels=17)
        >>> bits_per_dim(images().log_prob(torch.randint(17, (5, *shape))), shape).shape
        torch.Size([5])
        >>> noise = Flow(  # starts close to uniform
        ...     Compose([image_real_nvp(shape, hidden_channels=8, context_image=shape), Logit(0).inv]),
        ...     base=Base(dist.Normal, loc=torch.zeros(shape), scale=torch.full(shape, 1.6)),
        ... )
        >>> variational = DequantizedFlow(flow, levels=17, noise=noise)
    """

    is_discrete = True
    """Tells :func:`fit` that the events are integer levels."""

    def __init__(self, flow: Flow, levels: int = 256, *, noise: Flow | None = None, num_samples: int = 1):
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a Flow; got {type(flow).__name__}: pass Flow(Compose([bijection, Logit().inv]))")
        _check_numbers(levels, num_samples)
        self.flow = flow
        self.noise = noise
        self.levels = levels
        self.num_samples = num_samples
        self.event_shape: torch.Size = flow.event_shape

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    @property
    def takes_context(self) -> bool:
        """Whether calling the flow requires a context."""
        return self.flow.takes_context

    def forward(
        self, context: Tensor | None = None, *, temperature: float = 1.0, num_samples: int | None = None
    ) -> Dequantized:
        """Returns the distribution of integer images.

        Args:
            context, temperature: as in :meth:`Flow.forward`.
            num_samples: the number of noise samples in the bound; by default the one of the constructor.
        """
        noise = as_called(self.noise) if isinstance(self.noise, nn.Module) else self.noise
        return Dequantized(
            self.flow(context, temperature=temperature),
            self.levels,
            noise=noise,
            num_samples=self.num_samples if num_samples is None else num_samples,
        )


def bits_per_dim(log_prob: Tensor, image_shape: Sequence[int]) -> Tensor:
    r""":math:`-\log P(x) / (D \ln 2)`: how many bits it takes to store one of the D entries of an image.

    Args:
        log_prob: the log-probability of integer images, in nats.
        image_shape: the shape (C, H, W) of one image.

    Raises:
        ValueError: ``image_shape`` is not (C, H, W).

    Example:
        >>> bits_per_dim(torch.tensor(-8 * math.log(256.0)), (1, 2, 4))
        tensor(8.)
    """
    check_image_shape(image_shape)
    return -log_prob / (torch.Size(image_shape).numel() * math.log(2))


@torch.no_grad()
def interpolate(
    flow: Flow | DequantizedFlow, start: Tensor, end: Tensor, num_steps: int = 8, *, context: Tensor | None = None
) -> Tensor:
    r""":math:`z(t) = \frac{\sin((1 - t)\,\omega)\, z_0 + \sin(t\,\omega)\, z_1}{\sin \omega}`: images between two
    images, along a great circle through latent space. :math:`\omega` is the angle between the latents :math:`z_0` and
    :math:`z_1`.

    The latents on the circle stay at the radius where a standard normal has its mass; those on a straight line would
    not (compare Dinh et al. 2017, appendix D).

    Args:
        flow: a flow of real or of integer images.
        start, end: the images at both ends, of shape ``batch_shape + event_shape``.
        num_steps: the number of images returned, ``start`` and ``end`` included.
        context: the context of a conditional flow, the same for all steps.

    Returns:
        The images, of shape ``(num_steps,) + batch_shape + event_shape``.

    Raises:
        ValueError: ``num_steps`` is less than 2, or an image lies on a bound of the flow.

    Example:
        >>> from pyro_realnvp import real_nvp
        >>> interpolate(Flow(real_nvp(2)), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3)[1]
        tensor([0.7071, 0.7071])
    """
    if num_steps < 2:
        raise ValueError(f"expected num_steps >= 2; got {num_steps}")
    if isinstance(flow, DequantizedFlow):
        own, checked = next(flow.parameters()).dtype, flow(context)._checked
        ends = [(checked(image).to(own) + 0.5) / flow.levels for image in (start, end)]
        return quantize(interpolate(flow.flow, *ends, num_steps, context=context), flow.levels)
    (bijection,) = flow(context).transforms
    event_axes = tuple(range(-len(flow.event_shape), 0))
    z0, z1 = (bijection.inv(image) for image in (start, end))
    if not (z0.isfinite().all() and z1.isfinite().all()):
        raise ValueError(
            "expected images at which the flow has a density; got pixels on its bounds, or nan: move them inside, or "
            "train a flow that ends in Logit() with alpha > 0"
        )
    norms = [torch.linalg.vector_norm(z, dim=event_axes, keepdim=True) for z in (z0, z1)]
    product = norms[0] * norms[1]
    cosine = (z0 * z1).sum(event_axes, keepdim=True) / torch.where(product > 0, product, 1.0)
    angle = torch.acos(cosine.clamp(-1, 1))
    t = torch.linspace(0, 1, num_steps, dtype=z0.dtype, device=z0.device).reshape(-1, *(1,) * z0.dim())
    # Where the angle is small, the arc is close to a straight line; between opposite ends and from the origin there is
    # no arc. So the weights are the linear ones. The inner where keeps the division finite in the branch that the outer
    # one discards.
    straight = (torch.sin(angle) < 1e-3) | (product == 0)
    sine = torch.sin(torch.where(straight, 1.0, angle))
    weights = [torch.where(straight, s, torch.sin(s * angle) / sine) for s in (1 - t, t)]
    return bijection(weights[0] * z0 + weights[1] * z1)
