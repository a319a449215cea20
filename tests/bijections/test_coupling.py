# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from helpers import perturb, table
from pyro.nn import DenseNN
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
    raw, shift = f.read(torch.zeros(4, 3), None)
    log_scale = f.log_scale(raw)
    torch.testing.assert_close(log_scale.sum(-1), torch.zeros(4))
    assert log_scale.abs().max() > 0.5
    assert shift[0].tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
def test_a_context_that_the_coupling_does_not_take_is_refused(direction):
    f, context = rn.AffineCoupling(masks.half(4), rn.MLP(2, 4)), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"expected no context; got one of shape \(3, 2\)"):
        getattr(f, direction)(torch.zeros(3, 4), context)


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


class Forgetful(rn.Coupling):
    """A coupling that does not say how many outputs it reads."""


@table(
    ("make", "error", "message"),
    {
        "tensor as mask": (
            lambda: rn.AffineCoupling(torch.tensor([True, False]), rn.MLP(1, 2)),
            TypeError,
            "expected a Mask",
        ),
        "no number of outputs": (
            lambda: Forgetful(masks.half(2), rn.MLP(1, 2)),
            TypeError,
            "Forgetful .* in the class",
        ),
        "no number of outputs, in a flow": (
            lambda: rn.real_nvp(2, coupling=Forgetful),
            TypeError,
            "outputs_per_entry = 2",
        ),
        "function as conditioner": (lambda: rn.AffineCoupling(masks.half(2), lambda x: x), TypeError, "nn.Module"),
        "bound zero": (
            lambda: rn.AffineCoupling(masks.half(2), rn.MLP(1, 2), max_log_scale=0.0),
            ValueError,
            "max_log_scale > 0",
        ),
        "too narrow conditioner": (
            lambda: rn.AffineCoupling(masks.half(4), rn.MLP(2, 3))(torch.zeros(4)),
            ValueError,
            r"expected a shape of \(..., 4\) from",
        ),
        "too wide conditioner": (
            lambda: rn.AdditiveCoupling(masks.half(4), rn.MLP(2, 4))(torch.zeros(4)),
            ValueError,
            r"expected a shape of \(..., 2\) from",
        ),
        "conditioner of two outputs": (
            lambda: rn.AffineCoupling(masks.half(4), DenseNN(2, [8], [2, 2]))(torch.zeros(4)),
            TypeError,
            "expected one tensor from its conditioner.* got tuple: join",
        ),
        "too narrow conditioner of images": (
            lambda: rn.AffineCoupling(masks.checkerboard(1), rn.ConvResNet(2, 2))(torch.zeros(5, 1, 8, 8)),
            ValueError,
            r"\(..., 4, 4, 4\) from its conditioner.*got \(..., 2, 4, 4\)",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def on_squeezed_lattice(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that does to the squeezed image what `conv` does to the image itself."""
    out, inp = conv.weight.shape[:2]
    squeezed = nn.Conv2d(4 * inp, 4 * out, 3, padding=1, dtype=conv.weight.dtype)
    weight = torch.zeros(out, 2, 2, inp, 2, 2, 3, 3, dtype=conv.weight.dtype)
    for i in range(2):
        for j in range(2):
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    y, x = i + dy, j + dx  # the neighbor, counted from the square's first pixel
                    weight[:, i, j, :, y % 2, x % 2, y // 2 + 1, x // 2 + 1] = conv.weight[:, :, dy + 1, dx + 1]
    with torch.no_grad():
        squeezed.weight.copy_(weight.reshape(squeezed.weight.shape))
        squeezed.bias.copy_(conv.bias.repeat_interleave(4))
    return squeezed


@pytest.mark.parametrize("parity", [0, 1])
def test_a_coupling_on_the_split_lattice_contains_the_papers_masked_form(parity):
    """y = b x + (1 - b) (x exp(s(b x)) + t(b x)), convolutions of the whole image (eq. 9), is one of our couplings."""
    channels, hidden = 2, 3
    first = nn.Conv2d(channels, hidden, 3, padding=1, dtype=torch.float64)
    last = nn.Conv2d(hidden, 2 * channels, 3, padding=1, dtype=torch.float64)
    x = torch.randn(5, channels, 4, 6, dtype=torch.float64)
    mask = masks.checkerboard(channels, parity)
    b = mask.join(torch.ones_like(mask.split(x)[0]), torch.zeros_like(mask.split(x)[1]))

    raw, t = last(torch.relu(first(b * x))).chunk(2, 1)
    coupling = rn.AffineCoupling(mask, nn.Identity())
    slope = torch.pi / (2 * coupling.max_log_scale)
    s = torch.atan(raw * slope) / slope
    expected = b * x + (1 - b) * (x * s.exp() + t)

    first, last = on_squeezed_lattice(first), on_squeezed_lattice(last)
    with torch.no_grad():  # the network reads the kept entries and writes those that change
        first.weight = nn.Parameter(first.weight[:, mask.b])
        changed = torch.cat([~mask.b, ~mask.b])
        last.weight, last.bias = nn.Parameter(last.weight[changed]), nn.Parameter(last.bias[changed])
    first.in_channels, last.out_channels = mask.num_kept, 2 * mask.num_changed
    ours = rn.AffineCoupling(mask, nn.Sequential(first, nn.ReLU(), last))
    y, ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, ((1 - b) * s).sum((1, 2, 3)))
