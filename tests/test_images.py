# SPDX-License-Identifier: Apache-2.0
"""Masks, layers and flows of images: what each does beside the laws."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from registry import perturb
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp import masks


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_squeeze_has_the_order_of_the_papers_figure():
    """Figure 3: the squares of the 4 x 4 image are read one after the other, and each becomes one position."""
    x = torch.tensor([[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]])
    y = rn.Squeeze()(x)
    assert y.tolist() == [[[k, k + 4], [k + 8, k + 12]] for k in (1, 2, 3, 4)]
    two_channels = rn.Squeeze()(torch.cat([x, -x]))
    assert torch.equal(two_channels, torch.cat([y, -y]))


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_checkerboard_keeps_every_other_pixel(channels, parity):
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    kept_pixels = ((row + column) % 2 == parity).expand(channels, 4, 6)
    x = randn(5, channels, 4, 6)
    mask = masks.checkerboard(channels, parity)
    kept, changed = mask.split(x)
    assert kept.shape == changed.shape == (5, 2 * channels, 2, 3)
    assert torch.equal(mask.join(kept, torch.zeros_like(changed)), x * kept_pixels)
    assert torch.equal((~mask).split(x)[0], changed)


def on_squeezed_lattice(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution of the squeezed image that is `conv` of the image itself."""
    out, inp = conv.weight.shape[:2]
    squeezed = nn.Conv2d(4 * inp, 4 * out, 3, padding=1, dtype=conv.weight.dtype)
    weight = torch.zeros(out, 2, 2, inp, 2, 2, 3, 3, dtype=conv.weight.dtype)
    for i in range(2):
        for j in range(2):
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    y, x = i + dy, j + dx  # the neighbour, counted from the square's first pixel
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
    x = randn(5, channels, 4, 6)
    mask = masks.checkerboard(channels, parity)
    b = mask.join(torch.ones_like(mask.split(x)[0]), torch.zeros_like(mask.split(x)[1]))

    raw, t = last(torch.relu(first(b * x))).chunk(2, 1)
    coupling = rn.AffineCoupling(mask, nn.Identity())
    slope = torch.pi / (2 * coupling.max_log_scale)
    s = torch.atan(raw * slope) / slope
    expected = b * x + (1 - b) * (x * s.exp() + t)

    first, last = on_squeezed_lattice(first), on_squeezed_lattice(last)
    with torch.no_grad():  # what is read is kept, what is written is changed
        first.weight = nn.Parameter(first.weight[:, mask.b])
        changed = torch.cat([~mask.b, ~mask.b])
        last.weight, last.bias = nn.Parameter(last.weight[changed]), nn.Parameter(last.bias[changed])
    first.in_channels, last.out_channels = mask.num_kept, 2 * mask.num_changed
    ours = rn.AffineCoupling(mask, nn.Sequential(first, nn.ReLU(), last))
    y, ladj = ours.forward_and_ladj(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, ((1 - b) * s).sum((1, 2, 3)))


@pytest.mark.parametrize("alpha", [0.05, 1e-6, 0.0])
def test_logit_is_the_closed_form(alpha):
    f = rn.Logit(alpha)
    x = torch.tensor([0.0, 1e-7, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-3, 1 - 2**-24, 1.0], dtype=torch.float64)
    u = alpha + (1 - 2 * alpha) * x
    y, ladj = f.forward_and_ladj(x)
    expected = torch.log(u) - torch.log(alpha + (1 - 2 * alpha) * (1 - x))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(y, -f(1 - x), rtol=1e-6, atol=1e-9)  # symmetric
    inner = slice(1, -1)
    exact = torch.log((1 - 2 * alpha) / (u * (1 - u)))
    torch.testing.assert_close(ladj[inner], exact[inner], rtol=1e-6, atol=1e-9)
    in_float32 = f(x.float())
    torch.testing.assert_close(in_float32[inner].double(), f(x.float().double())[inner], rtol=1e-5, atol=1e-6)
    if alpha:
        assert y.isfinite().all() and f.inv.domain.check(y).all()
    else:
        assert y[0] == -torch.inf and y[-1] == torch.inf


def test_logit_reaches_a_little_beyond_and_says_so():
    f = rn.Logit(0.05)
    far = torch.tensor([-1e3, -20.0, 20.0, 1e3])
    x = f.inv(far)
    assert f.domain.check(x).all() and f.domain.check(torch.tensor([0.0, 1.0])).all()
    torch.testing.assert_close(x[[0, -1]], torch.tensor([-0.05 / 0.9, 0.95 / 0.9]))
    assert x[0] == x.new_tensor(f.domain.lower_bound) and x[-1] == x.new_tensor(f.domain.upper_bound)
    assert f.log_abs_det_jacobian(x, far).isfinite().all()  # the pair is remembered
    assert not f.domain.check(torch.tensor(1.06)) and f(torch.tensor(1.06)).isnan()  # not clamped
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [f.inv])
    assert d.support.check(torch.tensor(1.05)) and not d.support.check(torch.tensor(1.06))
    grid = torch.linspace(-0.0555, 1.0555, 20001)
    assert torch.trapezoid(d.log_prob(grid).exp(), grid) == pytest.approx(1.0, abs=1e-3)


def test_conv_resnet():
    x, context = randn(2, 3, 2, 4, 6), randn(3, 5)
    net = perturb(rn.ConvResNet(2, 4, hidden_channels=6, context_dim=5).double(), 0.3)
    out = net(x, context)
    assert out.shape == (2, 3, 4, 4, 6)
    torch.testing.assert_close(out[1, 2], net(x[1, 2], context[2]))
    torch.testing.assert_close(net(x[0, 0], context)[1], net(x[0, 0], context[1]))
    assert torch.equal(copy.deepcopy(net)(x, context), out) and torch.equal(
        pickle.loads(pickle.dumps(net))(x, context), out
    )
    assert not rn.ConvResNet(2, 4)(x.float()).any()
    conv = net.first
    torch.testing.assert_close(
        torch.linalg.vector_norm(conv.weight * conv.gain / conv._norm(), dim=(1, 2, 3)), conv.gain.abs().flatten()
    )
    fresh = rn.ConvResNet(2, 4).first
    torch.testing.assert_close(
        fresh(x.float()[0]), nn.functional.conv2d(x.float()[0], fresh.weight, fresh.bias, padding=1)
    )
    normalised = rn.ConvResNet(2, 4, batch_norm=True)
    assert any(isinstance(m, nn.BatchNorm2d) for m in normalised.modules())
    assert normalised.eval()(x.float()).shape == (2, 3, 4, 4, 6)


def test_an_image_as_context_is_seen_where_it_is():
    net = perturb(rn.ConvResNet(1, 2, 4, num_blocks=1, context_image=(1, 16, 16), context_scale=2).double(), 0.3)
    assert net.context_dim == 256
    x, image = randn(1, 8, 8), randn(1, 16, 16)
    edited = image.clone()
    edited[0, 0, 0] += 1
    difference = (net(x, edited.flatten()) - net(x, image.flatten())).abs().sum(0)
    assert difference[0, 0] > 0 and not difference[5:, 5:].any()


def test_layers_act_on_each_channel():
    x = torch.randn(50, 3, 4, 6) * torch.tensor([1.0, 5.0, 0.1]).reshape(3, 1, 1) + 2
    y = rn.ActNorm(3, event_dim=3).initialize(x)(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    f = rn.ActNorm(3, event_dim=3)
    f(x[:1])
    assert not f.initialized  # one image is one row
    norm = rn.BatchNorm(3, event_dim=3, momentum=0.0)
    torch.testing.assert_close(norm(x).mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    linear = perturb(rn.InvertibleLinear(3, event_dim=3, permutation=torch.tensor([2, 0, 1])), 0.5)
    matrix = rn.InvertibleLinear(3, permutation=torch.tensor([2, 0, 1]))
    matrix.load_state_dict(linear.state_dict())
    kernel = matrix(torch.eye(3)).T[..., None, None]
    torch.testing.assert_close(linear(x), nn.functional.conv2d(x, kernel), atol=1e-4, rtol=1e-4)


ARRANGEMENTS = [
    lambda shape, **options: rn.image_real_nvp(shape, **options),
    lambda shape, **options: rn.image_real_nvp(shape, between=lambda c: rn.BatchNorm(c, event_dim=3), **options),
    lambda shape, **options: rn.glow(shape, num_couplings=2, **options),
]


@pytest.mark.parametrize("make", ARRANGEMENTS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (2, 4, 4)])
def test_multi_scale_flows(make, shape):
    f = make(shape, hidden_channels=4).eval()
    x = torch.randn(5, *shape)
    assert torch.equal(f(x), x) and torch.equal(f.inv(x), x)  # identity at birth
    assert f.event_shape == shape and f.inv.event_shape == shape
    f = perturb(f.double(), 0.3)
    z = f.inv(x.double())
    assert z.shape == x.shape
    assert (z != x).all()  # every pixel is transformed
    torch.testing.assert_close(f(z.clone()), x.double())
    assert f.changed_entries(torch.zeros(shape, dtype=torch.bool)).all()


def test_round_trip_in_single_precision():
    x = torch.randn(4, 3, 32, 32)
    for make in (rn.image_real_nvp, rn.glow):
        f = perturb(make((3, 32, 32)), 0.02)
        with torch.no_grad():
            z = f.inv(x)
            assert (z - x).abs().max() > 0.1
            assert (f(z.clone()) - x).abs().max() < 1e-4


def test_the_paper_has_three_three_and_four_couplings():
    f = rn.image_real_nvp((3, 32, 32), num_scales=2)
    squeezes = [m.mask.squeeze for m in f.modules() if isinstance(m, rn.AffineCoupling)]
    assert squeezes == [True] * 3 + [False] * 3 + [True] * 4


@pytest.mark.parametrize("make", [rn.image_real_nvp, rn.glow])
def test_latent_scales(make):
    shape = (1, 16, 16)
    scales = rn.latent_scales(shape)
    assert [int((scales == k).sum()) for k in (1, 2, 3)] == [128, 64, 64]
    f = perturb(make(shape, num_couplings=2, hidden_channels=4), 0.1)
    factor_outs = [m for m in f.modules() if isinstance(m, rn.FactorOut)]
    x = torch.randn(shape)
    with torch.no_grad():
        before = f.inv(x)
        for p in factor_outs[0].bijection.parameters():  # all that comes after the first scale
            p.add_(0.1)
        after = f.inv(x)
    assert torch.equal((after != before), scales > 1)


def saved_bytes(call):
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = call()
    return loss, sum(held.values())


def test_checkpointing_gives_the_same_gradients_for_less_memory():
    plain = perturb(rn.image_real_nvp((1, 16, 16), hidden_channels=16), 0.1)
    lean = rn.image_real_nvp((1, 16, 16), hidden_channels=16, checkpoint=True)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(8, 1, 16, 16)
    gradients, held = [], []
    for f in (plain, lean):
        loss, size = saved_bytes(lambda f=f: rn.Flow(f)().log_prob(x).sum())
        gradients.append(torch.autograd.grad(loss, list(f.parameters())))
        held.append(size)
    torch.testing.assert_close(*gradients)
    assert held[1] < held[0] / 4


def test_classes_as_context():
    labels = torch.tensor([0, 2, 1])
    context = nn.functional.one_hot(labels, 3).float()
    flow = rn.Flow(perturb(rn.image_real_nvp((1, 8, 8), hidden_channels=4, context_dim=3), 0.3))
    d = flow(context)
    assert d.batch_shape == (3,) and d.sample((2,)).shape == (2, 3, 1, 8, 8)
    x = torch.randn(1, 8, 8)
    assert d.log_prob(x).unique().numel() == 3
    torch.testing.assert_close(d.log_prob(x)[1], flow(context[1]).log_prob(x), atol=1e-4, rtol=1e-4)
    cold = rn.Flow(rn.image_real_nvp((1, 8, 8)))(temperature=0.5)
    assert 0.45 < cold.sample((100,)).std() < 0.55


def test_interpolation():
    flow = rn.Flow(rn.Compose([perturb(rn.image_real_nvp((1, 8, 8), hidden_channels=4), 0.1), rn.Logit().inv]))
    start, end = flow().sample((3,)), flow().sample((3,))
    way = rn.interpolate(flow, start, end, 5)
    assert way.shape == (5, 3, 1, 8, 8)
    torch.testing.assert_close(way[0], start, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(way[-1], end, atol=1e-3, rtol=1e-3)
    length = flow.bijection.inv(way).flatten(2).norm(dim=-1)
    low, high = torch.minimum(length[0], length[-1]), torch.maximum(length[0], length[-1])
    assert (length > 0.99 * low).all() and (length < 1.01 * high).all()  # never through the middle
    same = rn.interpolate(flow, start, start, 3)
    torch.testing.assert_close(same[1], start, atol=1e-3, rtol=1e-3)
    images = rn.DequantizedFlow(flow, levels=16)
    start, end = torch.randint(16, (1, 8, 8)), torch.randint(16, (1, 8, 8))
    way = rn.interpolate(images, start, end, 4)
    assert way.dtype == torch.int64 and torch.equal(way[0], start) and torch.equal(way[-1], end)


IMAGES = torch.zeros(5, 1, 8, 8)


def net():
    return rn.ConvResNet(2, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rn.Squeeze()(torch.zeros(1, 5, 4)), ValueError, r"even height and width; got 5 x 4.*\(0, 0, 0, 1\)"),
        (lambda: rn.Squeeze().inv(torch.zeros(3, 2, 2)), ValueError, "multiple of 4 channels"),
        (lambda: rn.Squeeze()(torch.zeros(4, 4)), ValueError, "expected event shape"),
        (lambda: masks.checkerboard(1).split(torch.zeros(1, 3, 4)), ValueError, "even height and width; got 3 x 4"),
        (lambda: masks.checkerboard(0), ValueError, "one or more channels"),
        (lambda: masks.channelwise(1), ValueError, "squeeze first, or use checkerboard"),
        (lambda: rn.Mask(torch.tensor([True, False]), event_dim=1, squeeze=True), ValueError, "event_dim=3"),
        (lambda: rn.Logit(0.5), ValueError, "alpha < 1/2"),
        (lambda: rn.ConvResNet(2, 4, 0), ValueError, "hidden_channels >= 1; got 0"),
        (lambda: rn.ConvResNet(2, 4)(torch.zeros(2, 4, 4), torch.zeros(3)), ValueError, "expected no context"),
        (lambda: rn.ConvResNet(2, 4, context_dim=3)(torch.zeros(2, 4, 4)), ValueError, r"\(..., 3\); got none"),
        (
            lambda: rn.ConvResNet(1, 2, context_image=(1, 8, 8))(torch.zeros(1, 4, 4), torch.zeros(64)),
            ValueError,
            "context_scale",
        ),
        (
            lambda: rn.AffineCoupling(masks.checkerboard(1), rn.ConvResNet(2, 2))(IMAGES),
            ValueError,
            r"\(..., 4, 4, 4\) from its conditioner.*got \(..., 2, 4, 4\)",
        ),
        (lambda: rn.ActNorm(1, event_dim=0), ValueError, "event_dim >= 1"),
        (lambda: rn.FactorOut(masks.half(4), rn.real_nvp(3)), ValueError, "the 2 entries that go on"),
        (lambda: rn.FactorOut(masks.half(4), nn.Identity()), TypeError, "a Mask and a Bijection"),
        (lambda: rn.image_real_nvp((1, 7, 8)), ValueError, r"multiples of 2, for 1 scales.*pad\(x, \(0, 0, 0, 1\)\)"),
        (lambda: rn.image_real_nvp((1, 12, 12), num_scales=3), ValueError, "multiples of 8.*fewer scales"),
        (lambda: rn.image_real_nvp((8, 8)), ValueError, r"\(channels, height, width\); got \(8, 8\)"),
        (lambda: rn.image_real_nvp((1, 8, 8), num_couplings=1), ValueError, "num_couplings >= 2"),
        (lambda: rn.image_real_nvp((1, 8, 8), num_scales=0), ValueError, "num_scales >= 1"),
        (lambda: rn.image_real_nvp((1, 8, 8), context_image=(1, 4, 4)), ValueError, "context_image"),
        (lambda: rn.glow((1, 8, 8), num_couplings=1), ValueError, "every channel is changed"),
        (lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES.movedim(1, -1)), ValueError, "movedim"),
        (lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES[:, 0]), ValueError, r"x.unsqueeze\(-3\)"),
        (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(torch.zeros(5, 1, 16, 16)),
            ValueError,
            r"expected event shape \(1, 8, 8\); got shape \(5, 1, 16, 16\)",
        ),
        (lambda: rn.image_real_nvp((1, 8, 8))(torch.zeros(5, 1, 16, 16)), ValueError, r"event shape \(1, 8, 8\)"),
        (lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES.long()), TypeError, "Dequantized"),
        (
            lambda: rn.Flow(rn.Compose([rn.image_real_nvp((1, 8, 8)), rn.Logit().inv]))().log_prob(IMAGES.long()),
            TypeError,
            "Dequantized",
        ),
        (lambda: rn.Flow(rn.image_real_nvp((1, 8, 8), context_dim=3))(), ValueError, "context of width 3; got none"),
        (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8), context_dim=3))(torch.zeros(5).long()),
            ValueError,
            "one_hot",
        ),
        (
            lambda: rn.Compose(
                [rn.AffineCoupling(masks.checkerboard(1), net()) for _ in range(2)], event_shape=(1, 8, 8)
            ),
            ValueError,
            "never changes entries .* and 22 more",
        ),
        (lambda: rn.interpolate(rn.Flow(rn.real_nvp(2)), IMAGES, IMAGES, 1), ValueError, "num_steps >= 2"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
