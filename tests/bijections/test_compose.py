# SPDX-License-Identifier: Apache-2.0
"""Compose: its behavior beyond the laws that all bijections obey."""

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import table

import pyro_realnvp as rn
from pyro_realnvp import masks


def test_compose_takes_everything_apart():
    spline = T.Spline(3)
    f = rn.Compose(
        [
            T.ComposeTransform([T.AffineTransform(1.0, 2.0), T.permute(3)]),
            spline.inv,
            T.ComposeTransformModule([rn.real_nvp(3, num_couplings=2), T.Householder(3)]),
            T.SigmoidTransform(),
        ]
    )
    assert {id(p) for p in spline.parameters()} <= {id(p) for p in f.parameters()}
    assert sum(isinstance(module, rn.Permute) for module in f.modules()) == 1
    assert f.event_shape == (3,)
    assert f.codomain.check(f(torch.randn(5, 3))).all()
    x = torch.randn(5, 3)
    torch.testing.assert_close(f.inv(f(x).clone()), x, atol=1e-3, rtol=1e-3)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [f])
    assert not d.support.check(torch.full((3,), 2.0))
    assert d.log_prob(d.sample((4,))).shape == (4,)


def test_compose_of_nothing_is_the_identity():
    f, x = rn.Compose([]), torch.randn(3)
    assert f(x) is x
    assert torch.equal(f.log_abs_det_jacobian(x, x), torch.zeros(3))


def test_compose_sums_elementwise_parts_over_the_event():
    x = torch.rand(5, 2) + 0.5
    f = rn.Compose([T.ExpTransform().inv, rn.Permute(torch.tensor([1, 0]))])
    torch.testing.assert_close(f.forward_and_ladj(x)[1], -x.log().sum(-1))
    torch.testing.assert_close(f.inverse_and_ladj(f(x))[1], x.log().sum(-1))


def test_a_part_with_a_context_gets_it():
    f = rn.Compose([rn.real_nvp(2, context_dim=3), rn.ActNorm(2), rn.real_nvp(2, context_dim=3)])
    assert f.context_dim == 3
    assert f.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)
    assert f.inv.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)


def coupling(dim):
    mask = masks.half(dim)
    return rn.AffineCoupling(mask, rn.MLP(mask.num_kept, 2 * mask.num_changed))


@table(
    ("make", "error", "message"),
    {
        "parts do not fit": (
            lambda: rn.Compose([coupling(3), coupling(4)]),
            ValueError,
            r"part 1 does not fit.*expected event shape \(4,\)",
        ),
        "function": (lambda: rn.Compose([torch.exp]), TypeError, "expected transforms"),
        "not bijective": (lambda: rn.Compose([T.AbsTransform()]), ValueError, "bijective"),
        "conditional part of Pyro's": (
            lambda: rn.Compose([T.conditional_spline(2, 3)]),
            TypeError,
            "give it a context first",
        ),
        "two widths of context": (
            lambda: rn.Compose([rn.real_nvp(2, context_dim=c) for c in (2, 3)]),
            ValueError,
            "one width of context",
        ),
        "unchanged entries": (
            lambda: rn.Compose(
                [rn.AffineCoupling(masks.checkerboard(1), rn.ConvResNet(2, 4)) for _ in range(2)], event_shape=(1, 8, 8)
            ),
            ValueError,
            "never changes entries .* and 22 more",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
