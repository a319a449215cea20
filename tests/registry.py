# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for every public bijection. A new bijection needs only a new line in CASES."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro.distributions.transforms as T
import torch
from helpers import perturb
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import pyro_realnvp as rn
from pyro_realnvp import masks


@dataclass(frozen=True)
class Case:
    name: str
    covers: type[rn.Bijection]
    make: Callable  # draw -> Bijection
    plain: bool = True  # whether all parts are our own
    largest: float = 1e4  # larger values saturate

    def __repr__(self):
        return self.name


def draw_dim(draw):
    return draw(st.integers(2, 6), label="D")


def draw_mask(draw, dim):
    kind = draw(st.sampled_from(["half", "alternating", "random", "any"]), label="mask")
    if kind == "any":
        kept = draw(st.integers(1, 2**dim - 2))
        return rn.Mask(torch.tensor([bool(kept >> k & 1) for k in range(dim)]))
    if kind == "random":
        return masks.random(dim)
    return getattr(masks, kind)(dim, draw(st.integers(0, 1)))


def draw_coupling(draw, cls, dim=None):
    mask = draw_mask(draw, dim or draw_dim(draw))
    context_dim = draw(st.sampled_from([0, 0, 3]), label="context_dim")
    hidden_dims = draw(st.sampled_from([(8,), (8, 8)]))
    activation = draw(st.sampled_from([torch.nn.Tanh, torch.nn.ReLU, torch.nn.SiLU]))
    net = rn.MLP(
        mask.num_kept,
        mask.num_changed * cls.outputs_per_entry,
        hidden_dims,
        context_dim=context_dim,
        activation=activation,
        residual=draw(st.booleans()),
    )
    return cls(mask, net, context_dim=context_dim)


def draw_real_nvp(draw):
    between = st.sampled_from([None, rn.InvertibleLinear, lambda d: rn.ActNorm(d).inv, lambda d: rn.BatchNorm(d).inv])
    return rn.real_nvp(
        draw_dim(draw),
        num_couplings=draw(st.integers(2, 5)),
        hidden_dims=(8, 8),
        context_dim=draw(st.sampled_from([0, 3])),
        between=draw(between),
        coupling=draw(st.sampled_from([rn.AffineCoupling, rn.AdditiveCoupling, rn.VolumePreservingCoupling])),
    )


def draw_mixed(draw):
    dim = draw_dim(draw)
    return rn.Compose(
        [
            draw_coupling(draw, rn.AffineCoupling, dim),
            T.permute(dim),
            T.AffineTransform(torch.ones(dim, dtype=torch.float64), 2.0),
            T.Householder(dim),
            rn.ActNorm(dim).inv,
        ]
    )


def draw_spline(draw):
    context_dim = draw(st.sampled_from([0, 2]), label="context_dim")
    return rn.Spline(draw(st.integers(1, 3), label="D"), num_bins=4, context_dim=context_dim, hidden_dims=(8,))


def draw_random_linear(draw):
    dim = draw_dim(draw)
    return rn.InvertibleLinear(dim, permutation=torch.randperm(dim))


def draw_triangular(draw):
    dim = draw(st.integers(1, 4), label="D")
    tril = torch.randn(dim, dim).tril(-1) + torch.rand(dim).add(0.5).diag()
    return rn.TriangularAffine(dim, full=draw(st.booleans())).start_at(torch.randn(dim), tril)


def draw_low_rank(draw):
    dim = draw(st.integers(1, 4), label="D")
    rank = draw(st.integers(0, dim), label="rank")
    directions = torch.linalg.qr(torch.randn(dim, dim)).Q[:, :rank]
    start = torch.randn(dim), torch.rand(dim) + 0.5, directions, torch.rand(rank) * 2 + 0.5
    return rn.LowRankAffine(dim, rank=draw(st.integers(rank, dim), label="K")).start_at(*start)


def draw_fitted(draw, cls, fit):
    dim = draw_dim(draw)
    return fit(cls(dim), 3 * torch.randn(50, dim) + 1)


def draw_bounds(draw):
    kinds = draw(st.lists(st.sampled_from(["real", "below", "above", "both"]), min_size=1, max_size=4))
    low = [-2.0 if kind in ("below", "both") else -torch.inf for kind in kinds]
    return rn.Unbound(low, [3.0 if kind in ("above", "both") else torch.inf for kind in kinds])


def event_of(f):
    """The event shape with which f is tested. Where f takes images of any size, they have 4 x 2 pixels."""
    return tuple(n or any_size for n, any_size in zip(f.event_shape, (4, 4, 2)))


def draw_image_coupling(draw, cls):
    channels, parity = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    mask = draw(st.sampled_from([masks.checkerboard(channels, parity), masks.channelwise(channels + 1, parity)]))
    context_dim = draw(st.sampled_from([0, 0, 3]), label="context_dim")
    net = rn.ConvResNet(
        mask.num_kept, mask.num_changed * cls.outputs_per_entry, 4, num_blocks=1, context_dim=context_dim
    )
    return cls(mask, net, context_dim=context_dim)


def draw_image_flow(draw):
    make = draw(st.sampled_from([rn.image_real_nvp, rn.glow]))
    context = draw(st.sampled_from([{}, {"context_dim": 3}, {"context_image": (1, 4, 4)}]))
    return make((1, 4, 4), num_scales=draw(st.integers(1, 2)), num_couplings=2, hidden_channels=4, **context)


def draw_factor_out(draw):
    mask = masks.channelwise(draw(st.integers(2, 4)), draw(st.integers(0, 1)))
    return rn.FactorOut(mask, rn.ActNorm(mask.num_changed, event_dim=3))


def draw_on_images(draw, cls, **options):
    return cls(draw(st.integers(1, 3), label="channels"), event_dim=3, **options)


CASES = [
    Case("affine", rn.AffineCoupling, lambda draw: draw_coupling(draw, rn.AffineCoupling)),
    Case("additive", rn.AdditiveCoupling, lambda draw: draw_coupling(draw, rn.AdditiveCoupling)),
    Case("volume", rn.VolumePreservingCoupling, lambda draw: draw_coupling(draw, rn.VolumePreservingCoupling)),
    Case("permute", rn.Permute, lambda draw: rn.Permute(torch.randperm(draw_dim(draw)))),
    Case("linear", rn.InvertibleLinear, draw_random_linear),
    Case("conditional affine", rn.ConditionalAffine, lambda draw: rn.ConditionalAffine(draw_dim(draw), context_dim=3)),
    Case("triangular", rn.TriangularAffine, draw_triangular),
    Case("low rank", rn.LowRankAffine, draw_low_rank),
    Case("actnorm", rn.ActNorm, lambda draw: draw_fitted(draw, rn.ActNorm, rn.ActNorm.initialize)),
    Case("batchnorm", rn.BatchNorm, lambda draw: rn.BatchNorm(draw_dim(draw))),
    Case("standardize", rn.Standardize, lambda draw: draw_fitted(draw, rn.Standardize, rn.Standardize.fit)),
    Case("inverse", rn.Inverse, lambda draw: draw_coupling(draw, rn.AffineCoupling).inv),
    Case("conditioned", rn.Conditioned, lambda draw: rn.real_nvp(3, num_couplings=2, context_dim=2, hidden_dims=(8,))),
    Case("real_nvp", rn.Compose, draw_real_nvp),
    Case("affine, images", rn.AffineCoupling, lambda draw: draw_image_coupling(draw, rn.AffineCoupling)),
    Case("additive, images", rn.AdditiveCoupling, lambda draw: draw_image_coupling(draw, rn.AdditiveCoupling)),
    Case("volume, images", rn.VolumePreservingCoupling, lambda d: draw_image_coupling(d, rn.VolumePreservingCoupling)),
    Case("linear, images", rn.InvertibleLinear, lambda draw: draw_on_images(draw, rn.InvertibleLinear)),
    Case("actnorm, images", rn.ActNorm, lambda draw: draw_on_images(draw, rn.ActNorm)),
    Case("batchnorm, images", rn.BatchNorm, lambda draw: draw_on_images(draw, rn.BatchNorm)),
    Case("squeeze", rn.Squeeze, lambda draw: rn.Squeeze()),
    Case("unsqueeze", rn.Inverse, lambda draw: rn.Compose([rn.Squeeze()], event_shape=(1, 4, 2)).inv),
    Case("logit", rn.Logit, lambda draw: rn.Logit(draw(st.sampled_from([0.05, 0.01, 0.0]))), largest=10.0),
    Case("unbound", rn.Unbound, draw_bounds, largest=10.0),
    Case("factor_out", rn.FactorOut, draw_factor_out),
    Case("image flow", rn.Inverse, draw_image_flow),
    Case("pixels", rn.Compose, lambda draw: rn.Compose([draw_image_flow(draw), rn.Logit().inv]), largest=10.0),
    Case("mixed", rn.Compose, draw_mixed, plain=False),
    Case("spline", rn.Spline, draw_spline),
    Case("spline coupling", rn.SplineCoupling, lambda draw: draw_coupling(draw, rn.SplineCoupling)),
    Case("spline coupling, images", rn.SplineCoupling, lambda draw: draw_image_coupling(draw, rn.SplineCoupling)),
]


@st.composite
def bijections(draw, case: Case):
    """A bijection of the case, perturbed, in float64 and eval mode, with a context if it takes one."""
    torch.manual_seed(draw(st.integers(0, 2**16), label="seed"))
    f = perturb(case.make(draw).double()).eval()
    if f.context_dim:
        batch_shape = draw(st.sampled_from([(), (1,), (3,), (2, 1)]), label="context batch shape")
        f = f.condition(torch.randn(*batch_shape, f.context_dim, dtype=torch.float64))
    return f


def bounds_of(f: rn.Bijection) -> tuple[float, float]:
    """The interval in which the inputs of f lie."""
    domain = getattr(f.domain, "base_constraint", f.domain)
    if not hasattr(domain, "lower_bound"):
        return -1e9, 1e9
    low, high = torch.as_tensor(domain.lower_bound).max(), torch.as_tensor(domain.upper_bound).min()
    return max(low.item(), -1e9), min(high.item(), 1e9)


def fits(f: rn.Bijection, batch_shape) -> bool:
    try:
        return f.forward_shape(batch_shape + event_of(f)) is not None
    except ValueError:
        return False


@torch.no_grad()
def saturates(f: rn.Bijection, x: torch.Tensor) -> bool:
    """Whether an output is so close to a bound that rounding has lost what the inverse needs."""
    low, high = bounds_of(f.inv)
    if high >= 1e9 or not x.numel():
        return False
    y = f.forward_and_ladj(x)[0]
    return bool((torch.minimum(y - low, high - y) < 1e-6 * (high - low)).any())


@st.composite
def values(draw, f: rn.Bijection, magnitude: float = 10.0, batch_shapes=((), (0,), (1,), (3,), (2, 3))):
    """An input of f, of any batch shape that broadcasts with the context's."""
    batch_shapes = [shape for shape in batch_shapes if fits(f, shape)]
    shape = draw(st.sampled_from(batch_shapes), label="batch shape") + event_of(f)
    low, high = bounds_of(f)
    if bounds_of(f.inv)[1] < 1e9:
        magnitude = min(magnitude, 2.0)  # beyond that its outputs would saturate
    inside = 1e-3 * min(high - low, 10.0)
    elements = st.floats(max(low + inside, -magnitude), min(high - inside, magnitude), allow_subnormal=False)
    x = torch.from_numpy(draw(arrays(np.float64, shape, elements=elements), label="x")).clone()
    assume(not saturates(f, x))
    return x


def outputs(f: rn.Bijection, batch_shapes=((), (1,), (3,), (2, 3))):
    """An output of f. (Not of an empty batch, which torch cannot validate.)"""
    return values(f, batch_shapes=batch_shapes).map(lambda x: f.forward_and_ladj(x)[0].detach().clone())
