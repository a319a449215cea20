# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from registry import perturb
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp import masks


class Given(nn.Module):
    """A conditioner that returns what it is given, whatever it reads."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", torch.as_tensor(values))

    def forward(self, x):
        return self.values.expand(*x.shape[:-1], -1)


def test_affine_is_the_papers_masked_form():
    """y = b x + (1 - b) (x exp(s(b x)) + t(b x))  (eq. 9), with s and t of the masked input."""
    b = torch.tensor([True, False, True, False, False])
    net = perturb(rn.MLP(2, 6))
    f, x = rn.AffineCoupling(rn.Mask(b), net), torch.randn(7, 5)
    raw, t = net(x[:, b]).chunk(2, -1)
    s = torch.zeros(7, 5).masked_scatter(~b, 6 / math.pi * torch.atan(math.pi / 6 * raw))
    shift = torch.zeros(7, 5).masked_scatter(~b, t)
    y, ladj = f.forward_and_ladj(x)
    torch.testing.assert_close(y, b * x + ~b * (x * s.exp() + shift))
    torch.testing.assert_close(ladj, s.sum(-1))


@pytest.mark.parametrize("raw", [-1e4, -1.0, 0.0, 1.0, 1e4])
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_log_scale_is_bounded_and_smooth(raw, bound):
    f = rn.AffineCoupling(masks.half(2), Given([raw, 0.0]), max_log_scale=bound)
    ladj = f.forward_and_ladj(torch.zeros(1, 2))[1]
    assert abs(ladj.item()) <= bound
    if raw == 1.0:
        assert ladj.item() == pytest.approx(2 * bound / math.pi * math.atan(math.pi / 2 / bound))


def test_volume_preserving_log_scales_sum_to_zero():
    f = rn.VolumePreservingCoupling(masks.half(6), Given([1.0, 2.0, -5.0, 0.1, 0.2, 0.3]))
    log_scale, shift = f.log_scale_and_shift(torch.zeros(4, 3), None)
    torch.testing.assert_close(log_scale.sum(-1), torch.zeros(4))
    assert log_scale.abs().max() > 0.5
    assert shift[0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_additive_shifts():
    f = rn.AdditiveCoupling(masks.half(4), Given([1.0, -2.0]))
    assert f(torch.zeros(4)).tolist() == [0, 0, 1, -2]
    assert f.inv(torch.zeros(4)).tolist() == [0, 0, -1, 2]


def test_the_conditioner_sees_only_the_kept_half():
    f, x = rn.AffineCoupling(masks.half(4), perturb(rn.MLP(2, 4))), torch.randn(4).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, x)
    assert torch.equal(jacobian[:2], torch.eye(4)[:2])
    assert jacobian[2, 3] == 0
    assert jacobian[3, 2] == 0
    assert (jacobian[2:, :2] != 0).all()


def test_context_changes_the_map_and_broadcasts():
    f = rn.AffineCoupling(masks.half(4), perturb(rn.MLP(2, 4, context_dim=3)), context_dim=3)
    x, c = torch.randn(5, 1, 4), torch.randn(6, 3)
    y, ladj = f.forward_and_ladj(x, c)
    assert y.shape == (5, 6, 4)
    assert ladj.shape == (5, 6)
    torch.testing.assert_close(y[2, 3], f.condition(c[3])(x[2, 0]))
    assert not torch.allclose(y[0, 0], y[0, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rn.AffineCoupling(torch.tensor([True, False]), rn.MLP(1, 2)), TypeError, "expected a Mask"),
        (lambda: rn.AffineCoupling(masks.half(2), lambda x: x), TypeError, "nn.Module"),
        (lambda: rn.AffineCoupling(masks.half(2), rn.MLP(1, 2), max_log_scale=0.0), ValueError, "max_log_scale > 0"),
        (
            lambda: rn.AffineCoupling(masks.half(4), rn.MLP(2, 3))(torch.zeros(4)),
            ValueError,
            r"expected a shape of \(..., 4\) from",
        ),
        (
            lambda: rn.AdditiveCoupling(masks.half(4), rn.MLP(2, 4))(torch.zeros(4)),
            ValueError,
            r"expected a shape of \(..., 2\) from",
        ),
        (lambda: rn.MLP(2, 4, hidden_dims=()), ValueError, "at least one hidden width"),
        (lambda: rn.MLP(2, 4, hidden_dims=(8, 0)), ValueError, "all positive"),
        (lambda: rn.MLP(2, 4, hidden_dims=(8, 9), residual=True), ValueError, "equal widths"),
        (lambda: rn.MLP(2, 4)(torch.zeros(2), torch.zeros(3)), ValueError, "expected no context"),
        (lambda: rn.MLP(2, 4, context_dim=3)(torch.zeros(2)), ValueError, r"context of shape \(..., 3\); got none"),
        (lambda: rn.MLP(2, 4, context_dim=3)(torch.zeros(2), torch.zeros(5, 2)), ValueError, r"shape \(5, 2\)"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
