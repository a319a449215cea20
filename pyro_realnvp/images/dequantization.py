# SPDX-License-Identifier: Apache-2.0
"""Densities of real images as probabilities of integer ones."""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..bijections.inputs import check_event_shape
from ..distributions import Flow


class Dequantized(dist.TorchDistribution):
    r""":math:`P(x) = \int_{[0, 1)^D} p\big(\tfrac{x + u}{L}\big)\, L^{-D}\, du`: the distribution of the levels
    0, ..., L - 1 of images whose density p lies on [0, 1]
    (Theis et al. 2016, section 3.1; Ho et al. 2019, section 3.1).

    ``log_prob`` is a stochastic lower bound of log P, in nats:

    .. math:: \log \frac1K \sum_{k=1}^K \frac{p\big(\tfrac{x + u_k}{L}\big)\, L^{-D}}{q(u_k \mid x)},
        \quad u_k \sim q(u \mid x),

    with q uniform (then at K = 1 the usual uniform dequantisation) or a flow (variational dequantisation). The bound
    rises with K, to the logarithm of the integral. A sample is the level in which a sample of p lies. Where p has mass
    outside of [0, 1], as behind ``Logit(0.05).inv``, this mass belongs to the levels 0 and L - 1 too, so that samples
    are always levels and probabilities sum to one; the bound leaves it out.

    Args:
        distribution: of real events scaled to [0, 1]; its batch and event shapes are kept.
        levels: L.
        noise: q, as a function of a context that returns a reparametrised distribution on [0, 1], such as a conditional
            :class:`Flow` that ends in ``Logit(0).inv``. The context is x, scaled to [-1, 1] and flattened, of shape
            ``batch_shape + (D,)``. By default q is uniform.
        num_samples: K.

    Raises:
        TypeError: values that are not integers.
        ValueError: values outside of 0, ..., L - 1 (under validation, Pyro's default), or of another event shape.

    Example:
        >>> pixels = dist.Uniform(torch.zeros(1, 2, 2), 1.0).to_event(3)
        >>> images = Dequantized(pixels, levels=4)
        >>> images.log_prob(torch.tensor([[[0, 1], [2, 3]]])) / math.log(4)
        tensor(-4.)
        >>> images.sample((5,)).shape
        torch.Size([5, 1, 2, 2])
    """

    arg_constraints = {}

    def __init__(
        self,
        distribution: dist.Distribution,
        levels: int = 256,
        *,
        noise: Callable[[Tensor], dist.Distribution] | None = None,
        num_samples: int = 1,
        validate_args: bool | None = None,
    ):
        if levels < 2 or num_samples < 1:
            raise ValueError(f"expected levels >= 2 and num_samples >= 1; got {levels} and {num_samples}")
        self.distribution, self.levels, self.noise, self.num_samples = distribution, levels, noise, num_samples
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), self.event_dim)

    def expand(self, batch_shape, _instance=None) -> "Dequantized":
        return Dequantized(
            self.distribution.expand(batch_shape),
            self.levels,
            noise=self.noise,
            num_samples=self.num_samples,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """A lower bound of log P(value) in nats, shaped like the batch; another draw at each call."""
        self._check(value)
        u, log_q = self._noise(value)
        bound = self.distribution.log_prob((value + u) / self.levels) - log_q
        return bound.logsumexp(0) - math.log(self.num_samples) - self.event_shape.numel() * math.log(self.levels)

    def _noise(self, value: Tensor) -> tuple[Tensor, Tensor | float]:
        like = _parameter(self.distribution)
        shape = (self.num_samples,)
        if self.noise is None:
            return torch.rand(shape + value.shape, dtype=like.dtype, device=like.device), 0.0
        centred = (value.to(like.dtype) + 0.5) * (2 / self.levels) - 1
        q = self.noise(centred.flatten(value.dim() - self.event_dim))
        if hasattr(q, "rsample_and_log_prob"):  # of ours, in one pass
            u, log_q = q.rsample_and_log_prob(shape)
        else:
            u = q.rsample(shape)
            log_q = q.log_prob(u)
        if u.shape != shape + value.shape:
            raise ValueError(f"expected noise of shape {tuple(shape + value.shape)}; got {tuple(u.shape)}")
        if self._validate_args and not torch.compiler.is_compiling() and not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError("expected noise in [0, 1]; got values outside: let its flow end in Logit(0).inv")
        return u, log_q

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Integer images."""
        return quantize(self.distribution.sample(torch.Size(sample_shape)), self.levels)

    def _check(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"Dequantized expected integer levels 0, ..., {self.levels - 1}; got {got}: "
                "pass value.long(), or score real images with the distribution inside"
            )
        check_event_shape(self, value.shape, self.event_shape)
        if self._validate_args and not torch.compiler.is_compiling() and value.numel():  # which cannot see values
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= self.levels:
                raise ValueError(
                    f"Dequantized expected levels 0, ..., {self.levels - 1}; got values from {low} to {high}: "
                    "pass levels="
                )


def quantize(x: Tensor, levels: int) -> Tensor:
    """The level of each value; what lies beyond [0, 1] belongs to the first and the last."""
    return (x * levels).floor().clamp(0, levels - 1).long()


def _parameter(distribution: dist.Distribution) -> Tensor:
    """A tensor of the distribution's dtype and device."""
    base = distribution
    while base is not None:
        for name in base.arg_constraints:
            value = getattr(base, name, None)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        base = getattr(base, "base_dist", None)
    return distribution.sample()


class DequantizedFlow(nn.Module):
    r"""A :class:`Flow` of real images as a model of integer ones: calling it gives a :class:`Dequantized`.

    :func:`fit` trains it on integer images, ``(N, C, H, W)`` of any integer dtype.

    Args:
        flow: of real images, scaled to [0, 1]: its bijection should end in ``Logit().inv``.
        levels: the number of levels.
        noise: for variational dequantisation, a :class:`Flow` conditional on the flattened image, which is trained with
            the other. By default the noise is uniform.
        num_samples: of the bound; one for training.

    Example:
        >>> from pyro_realnvp import Base, Compose, Logit, image_real_nvp
        >>> shape = (1, 8, 8)
        >>> flow = Flow(Compose([image_real_nvp(shape, hidden_channels=8), Logit().inv]))
        >>> images = DequantizedFlow(flow, levels=17)
        >>> bits_per_dim(images().log_prob(torch.randint(17, (5, *shape))), shape).shape
        torch.Size([5])
        >>> noise = Flow(  # near to uniform at birth
        ...     Compose([image_real_nvp(shape, hidden_channels=8, context_image=shape), Logit(0).inv]),
        ...     base=Base(dist.Normal, loc=torch.zeros(shape), scale=torch.full(shape, 1.6)),
        ... )
        >>> variational = DequantizedFlow(flow, levels=17, noise=noise)
    """

    is_discrete = True

    def __init__(self, flow: Flow, levels: int = 256, *, noise: Flow | None = None, num_samples: int = 1):
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a Flow; got {type(flow).__name__}: pass Flow(Compose([bijection, Logit().inv]))")
        self.flow, self.noise = flow, noise
        self.levels, self.num_samples = levels, num_samples
        self.event_shape = flow.event_shape

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def forward(
        self, context: Tensor | None = None, *, temperature: float = 1.0, num_samples: int | None = None
    ) -> Dequantized:
        """The distribution of images, at this context and temperature as in :class:`Flow`, and with so many samples."""
        return Dequantized(
            self.flow(context, temperature=temperature),
            self.levels,
            noise=self.noise,
            num_samples=self.num_samples if num_samples is None else num_samples,
        )


def bits_per_dim(log_prob: Tensor, image_shape: Sequence[int]) -> Tensor:
    r""":math:`-\log P(x) / (D \ln 2)`: what it takes to store one of the D entries of an image.

    Args:
        log_prob: in nats, of integer images.
        image_shape: (C, H, W).

    Example:
        >>> bits_per_dim(torch.tensor(-8 * math.log(256.0)), (1, 2, 4))
        tensor(8.)
    """
    return -log_prob / (torch.Size(image_shape).numel() * math.log(2))


@torch.no_grad()
def interpolate(
    flow: Flow | DequantizedFlow, start: Tensor, end: Tensor, num_steps: int = 8, *, context: Tensor | None = None
) -> Tensor:
    r""":math:`z(t) = \frac{\sin((1 - t)\,\omega)\, z_0 + \sin(t\,\omega)\, z_1}{\sin \omega}`: the way from one image
    to another through latent space, along a great circle; :math:`\omega` is the angle between the latents.

    So it stays where a standard normal has its mass (compare Dinh et al. 2017, appendix D).

    Args:
        flow: of real images, or of integer ones.
        start, end: ``batch_shape + event_shape``.
        num_steps: images on the way, with start and end.
        context: for a conditional flow; the same on the whole way.

    Returns:
        ``(num_steps,) + batch_shape + event_shape``.

    Example:
        >>> from pyro_realnvp import real_nvp
        >>> interpolate(Flow(real_nvp(2)), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3)[1]
        tensor([0.7071, 0.7071])
    """
    if num_steps < 2:
        raise ValueError(f"expected num_steps >= 2; got {num_steps}")
    if isinstance(flow, DequantizedFlow):
        ends = [(image.to(next(flow.parameters()).dtype) + 0.5) / flow.levels for image in (start, end)]
        return quantize(interpolate(flow.flow, *ends, num_steps, context=context), flow.levels)
    bijection = flow.bijection if context is None else flow.bijection.condition(context)
    event_axes = tuple(range(-len(flow.event_shape), 0))
    z0, z1 = (bijection.inv(image) for image in (start, end))
    norms = [torch.linalg.vector_norm(z, dim=event_axes, keepdim=True) for z in (z0, z1)]
    angle = torch.acos(((z0 * z1).sum(event_axes, keepdim=True) / (norms[0] * norms[1])).clamp(-1, 1))
    t = torch.linspace(0, 1, num_steps, dtype=z0.dtype, device=z0.device).reshape(-1, *(1,) * z0.dim())
    small = angle < 1e-3  # where the circle is a line
    weights = [
        torch.where(small, s, torch.sin(s * angle) / torch.sin(torch.where(small, 1.0, angle))) for s in (1 - t, t)
    ]
    return bijection(weights[0] * z0 + weights[1] * z1)
