# SPDX-License-Identifier: Apache-2.0
"""Dequantized: its probabilities against an enumeration of all images, its use in Pyro models, and its training."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import perturb, table
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

import pyro_realnvp as rn

SHAPE = (1, 2, 2)


def tiny_flow():
    glow = rn.glow(SHAPE, num_scales=1, num_couplings=2, hidden_channels=4)
    scale = dist.transforms.AffineTransform(0.0, 0.7)  # a little mass lies beyond [0, 1]
    return perturb(rn.Flow(rn.Compose([glow, scale, rn.Logit(0.05).inv])).double(), 0.15).requires_grad_(False).eval()


def tiny_noise():
    noise = rn.image_real_nvp(SHAPE, num_scales=1, num_couplings=2, hidden_channels=4, context_image=SHAPE)
    base = rn.Base(dist.Normal, loc=torch.zeros(SHAPE), scale=torch.full(SHAPE, 1.6))
    return rn.Flow(rn.Compose([noise, rn.Logit(0).inv]), base=base).double()


def all_images(levels):
    return torch.cartesian_prod(*[torch.arange(levels)] * 4).reshape(-1, *SHAPE)


def probabilities(flow, levels, beyond, points=12):
    """P of all images, by Gauss-Legendre quadrature over the cell of each image.

    With `beyond`, the cells of the lowest and the highest level include the mass beyond [0, 1].
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(points))
    edges = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    if beyond:
        edges[0], edges[-1] = -0.05 / 0.9, 0.95 / 0.9
    width = edges.diff()
    x = (edges[:-1, None] + width[:, None] * (nodes + 1) / 2).flatten()
    w = (width[:, None] * weights / 2).flatten()
    grid, mass = torch.cartesian_prod(x, x, x, x), torch.cartesian_prod(w, w, w, w).prod(-1)
    p = torch.cat([flow().log_prob(rows).exp() for rows in grid.reshape(-1, *SHAPE).split(50_000)]) * mass
    return p.reshape([levels, points] * 4).sum((1, 3, 5, 7)).flatten()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    flow = tiny_flow()
    return flow, probabilities(flow, 2, beyond=True), probabilities(flow, 2, beyond=False)


@pytest.mark.slow
def test_the_probabilities_are_those_of_a_distribution(tiny):
    _, exact, inside = tiny
    assert exact.sum() == pytest.approx(1.0, abs=5e-3)
    assert (inside < exact).all() and inside.sum() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("variational", [False, True])
def test_the_bound_lies_below_and_rises_to_the_enumerated_probability(tiny, variational):
    flow, exact, inside = tiny
    noise = perturb(tiny_noise(), 0.03).requires_grad_(False) if variational else None
    images = all_images(2)

    def bound(num_samples, repeats):
        model = rn.DequantizedFlow(flow, levels=2, noise=noise, num_samples=num_samples)
        return model().log_prob(images.expand(repeats, -1, *SHAPE)).mean(0)

    one, ten, many = bound(1, 4000), bound(10, 400), bound(20_000, 1)
    assert (one < inside.log() + 0.05).all() and (one < exact.log()).all()
    assert (ten > one).all()
    torch.testing.assert_close(many, inside.log(), atol=0.2, rtol=0)
    assert (many < exact.log() + 0.02).all()


@pytest.mark.slow
def test_samples_have_the_enumerated_frequencies(tiny):
    flow, exact, _ = tiny
    samples = rn.Dequantized(flow(), levels=2).sample((20_000,))
    assert samples.dtype == torch.int64
    code = (samples.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    frequencies = torch.bincount(code, minlength=16) / len(code)
    torch.testing.assert_close(frequencies.double(), exact, atol=0.015, rtol=0)


@pytest.mark.slow
def test_variational_noise_raises_the_bound(tiny):
    flow, _, _ = tiny
    images = all_images(2)
    model = rn.DequantizedFlow(flow, levels=2, noise=tiny_noise())
    optimizer = torch.optim.Adam(model.noise.parameters(), lr=1e-2)
    for _ in range(150):
        loss = -model().log_prob(images.expand(8, -1, *SHAPE)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        uniform = rn.Dequantized(flow(), levels=2).log_prob(images.expand(500, -1, *SHAPE)).mean()
        learned = model().log_prob(images.expand(500, -1, *SHAPE)).mean()
    assert learned > uniform + 0.02


def test_samples_are_levels():
    wide = dist.Normal(torch.full(SHAPE, 0.5), 2.0).to_event(3)  # most of its mass lies outside
    samples = rn.Dequantized(wide, levels=8).sample((1000,))
    assert samples.min() == 0 and samples.max() == 7
    assert rn.Dequantized(wide, levels=8).support.check(samples).all()


def test_an_average_of_buffers_keeps_the_masks():
    pixels = rn.Compose([rn.image_real_nvp((1, 4, 4), num_couplings=2, hidden_channels=4), rn.Logit().inv])
    flow = perturb(rn.DequantizedFlow(rn.Flow(pixels), levels=4))
    average = torch.optim.swa_utils.AveragedModel(flow, use_buffers=True)
    for _ in range(3):
        average.update_parameters(flow)
    torch.manual_seed(0)
    expected = flow().sample((3,))
    torch.manual_seed(0)
    assert torch.equal(average.module().sample((3,)), expected)


def test_in_a_pyro_model():
    flow = rn.Flow(rn.Compose([rn.image_real_nvp((1, 4, 4), hidden_channels=4, num_couplings=2), rn.Logit().inv]))
    images = rn.DequantizedFlow(flow, levels=16)
    x = torch.randint(16, (6, 1, 4, 4))

    def model(x=None):
        pyro.module("images", images)
        with pyro.plate("data", 6):
            return pyro.sample("image", images(), obs=x)

    assert model().shape == (6, 1, 4, 4)
    trace = pyro.poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["image"]["log_prob"].shape == (6,)
    before = [p.clone() for p in images.parameters()]
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x), svi.step(x)
    assert any((a != b).any() for a, b in zip(before, images.parameters()))
    d = images().expand((6,))
    assert d.sample().shape == (6, 1, 4, 4) and d.log_prob(x).shape == (6,)
    assert d.to_event(1).log_prob(x).shape == ()
    assert images(temperature=0.5).sample().shape == (1, 4, 4)
    assert images(num_samples=3).num_samples == 3


def test_dtypes():
    flow = rn.Flow(rn.Compose([rn.glow(SHAPE, num_scales=1, hidden_channels=4), rn.Logit().inv])).double()
    for dtype in (torch.uint8, torch.int64, torch.int32):
        x = torch.ones(3, *SHAPE, dtype=dtype)
        assert rn.DequantizedFlow(flow, 4)().log_prob(x).dtype == torch.float64
        assert rn.DequantizedFlow(flow, 4, noise=tiny_noise())().log_prob(x).dtype == torch.float64


def test_a_uniform_density_takes_all_bits():
    d = rn.Dequantized(dist.Uniform(torch.zeros(3, 4, 4), 1.0).to_event(3), levels=256, num_samples=5)
    bits = rn.bits_per_dim(d.log_prob(torch.randint(256, (7, 3, 4, 4))), (3, 4, 4))
    torch.testing.assert_close(bits, torch.full((7,), 8.0))


def test_noise_of_any_distribution():
    pixels = dist.Uniform(torch.zeros(SHAPE), 1.0).to_event(3)
    x = torch.randint(4, (5, *SHAPE))
    beta = rn.Dequantized(
        pixels, 4, noise=lambda c: dist.Beta(torch.ones(len(c), *SHAPE), 1.0).to_event(3), num_samples=3
    )
    torch.testing.assert_close(beta.log_prob(x), torch.full((5,), -4 * math.log(4)))


@pytest.mark.filterwarnings("ignore:the training has raised")
def test_fit_takes_integer_images():
    flow = rn.Flow(rn.Compose([rn.image_real_nvp((1, 4, 4), hidden_channels=4, num_couplings=2), rn.Logit().inv]))
    images = rn.DequantizedFlow(flow, levels=16)
    x = torch.full((200, 1, 4, 4), 5)  # constant levels have a probability, though no density
    with torch.no_grad():
        before = -images().log_prob(x).mean()
    for data in (x, x.to(torch.uint8), x.numpy()):
        history = rn.fit(images, data, num_steps=30, lr=1e-2, progress=False, seed=0)
    assert history.best_loss < before - 3
    labels = nn.functional.one_hot(torch.randint(3, (200,)), 3).float()
    flow = rn.Flow(rn.Compose([rn.glow((1, 4, 4), hidden_channels=4, context_dim=3), rn.Logit().inv]))
    rn.fit(rn.DequantizedFlow(flow, levels=16), x, context=labels, num_steps=3, progress=False)


def images_of(**options):
    flow = rn.Flow(rn.Compose([rn.image_real_nvp((1, 4, 4), hidden_channels=4), rn.Logit().inv]))
    return rn.DequantizedFlow(flow, **({"levels": 16} | options))


X = torch.arange(80).reshape(5, 1, 4, 4) % 16


@table(
    ("make", "error", "message"),
    {
        "real values": (
            lambda: images_of()().log_prob(X.float()),
            TypeError,
            r"levels 0, ..., 15; got torch.float32: pass .x . 15.",
        ),
        "level too high": (
            lambda: images_of()().log_prob(X + 1),
            ValueError,
            r"expected levels 0, ..., 15; got values from .* to 16",
        ),
        "level below zero": (lambda: images_of()().log_prob(X - 1), ValueError, "got values from -1"),
        "channels last": (lambda: images_of()().log_prob(X.movedim(1, -1)), ValueError, "movedim"),
        "no channel axis": (lambda: images_of()().log_prob(X[:, 0]), ValueError, "unsqueeze"),
        "image size": (
            lambda: images_of()().log_prob(torch.zeros(5, 1, 8, 8).long()),
            ValueError,
            r"\(1, 4, 4\); got shape",
        ),
        "one level": (lambda: images_of(levels=1)(), ValueError, "levels >= 2"),
        "no samples": (lambda: images_of(num_samples=0)(), ValueError, "num_samples >= 1"),
        "bijection for a flow": (lambda: rn.DequantizedFlow(rn.glow((1, 4, 4))), TypeError, "expected a Flow"),
        "fit: real values": (
            lambda: rn.fit(images_of(), X.float()),
            TypeError,
            r"integer levels 0, ..., 15; got values of torch.float32: .* \(x \* 15\)",
        ),
        "fit: real array": (
            lambda: rn.fit(images_of(), X.numpy().astype(float)),
            TypeError,
            r"integer levels 0, ..., 15; got values of float64",
        ),
        "fit: no channel axis": (lambda: rn.fit(images_of(), X[:, 0]), ValueError, r"shape \(N, 1, 4, 4\)"),
        "fit: levels too high": (
            lambda: rn.fit(images_of(), X + 99, batch_size=2, validation=0),
            ValueError,
            "expected levels",
        ),
        "fit: levels for a density": (lambda: rn.fit(images_of().flow, X), TypeError, "got torch.int64"),
        "noise outside": (
            lambda: images_of(noise=lambda c: dist.Normal(torch.zeros(5, 1, 4, 4), 9.0).to_event(3))().log_prob(X),
            ValueError,
            r"noise in \[0, 1\]; got values outside: let its flow end in Logit\(0\).inv",
        ),
        "noise shape": (
            lambda: images_of(noise=lambda c: dist.Uniform(torch.zeros(5, 16), 1.0).to_event(1))().log_prob(X),
            ValueError,
            "noise of shape",
        ),
        "a flow of 16 bits": (
            lambda: images_of().bfloat16()().log_prob(X),
            TypeError,
            r"at least 32 bits, .* autocast",
        ),
        "samples of a flow of 16 bits": (lambda: images_of().bfloat16()().sample(), TypeError, "at least 32 bits"),
        "too many levels": (lambda: images_of(levels=2**26)().log_prob(X), TypeError, "no digits .* between 67108864"),
        "half a level": (lambda: images_of(levels=2.5), ValueError, "whole numbers levels >= 2 .* got 2.5"),
        "interpolate: real values": (
            lambda: rn.interpolate(images_of(), X[0].float(), X[1].float()),
            TypeError,
            "expected integer levels 0, ..., 15",
        ),
        "fit: channels last": (lambda: rn.fit(images_of(), X.movedim(1, -1)), ValueError, "pass x.movedim"),
        "interpolate: on a bound": (
            lambda: rn.interpolate(rn.Flow(rn.Unbound([0.0], [1.0]).inv), torch.zeros(1), torch.ones(1) / 2, 3),
            ValueError,
            "got pixels on its bounds",
        ),
        "interpolate: one step": (
            lambda: rn.interpolate(rn.Flow(rn.real_nvp(2)), X, X, 1),
            ValueError,
            "num_steps >= 2",
        ),
        "shape of a batch": (
            lambda: rn.bits_per_dim(torch.zeros(5), (5, 1, 8, 8)),
            ValueError,
            r"image_shape to be .*; got \(5, 1, 8, 8\)",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_takes_no_level_into_the_next(dtype):
    pixels = dist.Uniform(torch.zeros(1, 20, 20, dtype=dtype), torch.ones(1, 20, 20, dtype=dtype)).to_event(3)
    for level in (0, 100, 255):
        log_p = rn.Dequantized(pixels).log_prob(torch.full((500, 1, 20, 20), level))
        assert log_p.isfinite().all()
        assert rn.bits_per_dim(log_p.float(), (1, 20, 20)).mean() == pytest.approx(8.0, abs=0.04)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_levels_of_unsigned_types(dtype):
    flow = rn.Flow(rn.Compose([rn.image_real_nvp((1, 8, 8), hidden_channels=4), rn.Logit().inv]))
    x = np.random.default_rng(0).integers(0, 200, (20, 1, 8, 8))
    model = rn.DequantizedFlow(flow, levels=200)
    history = rn.fit(model, torch.as_tensor(x).to(dtype), num_steps=2, progress=False)
    assert len(history.loss) == 2
    torch.manual_seed(0)
    expected = model().log_prob(torch.as_tensor(x))
    torch.manual_seed(0)
    torch.testing.assert_close(model().log_prob(torch.as_tensor(x).to(dtype)), expected)
    with pytest.raises(ValueError, match=r"got values from \d+ to 200"):
        model().log_prob(torch.full((1, 8, 8), 200).to(dtype))


def test_interpolation():
    flow = rn.Flow(rn.Compose([perturb(rn.image_real_nvp((1, 8, 8), hidden_channels=4), 0.1), rn.Logit().inv]))
    start, end = flow().sample((3,)), flow().sample((3,))
    way = rn.interpolate(flow, start, end, 5)
    assert way.shape == (5, 3, 1, 8, 8)
    torch.testing.assert_close(way[0], start, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(way[-1], end, atol=1e-3, rtol=1e-3)
    length = flow.bijection.inv(way).flatten(2).norm(dim=-1)
    low, high = torch.minimum(length[0], length[-1]), torch.maximum(length[0], length[-1])
    assert (length > 0.99 * low).all() and (length < 1.01 * high).all()  # the way never comes close to the center
    same = rn.interpolate(flow, start, start, 3)
    torch.testing.assert_close(same[1], start, atol=1e-3, rtol=1e-3)
    plain = rn.Flow(rn.real_nvp(2))  # still the identity
    for start in (torch.tensor([1.0, 0.3]), torch.zeros(2)):  # of which the end is the opposite, or has no direction
        end = -2 * start if start.any() else torch.tensor([1.0, 0.0])
        way = rn.interpolate(plain, start, end, 3)
        torch.testing.assert_close(way, torch.stack([start, (start + end) / 2, end]))
    images = rn.DequantizedFlow(flow, levels=16)
    start, end = torch.randint(16, (1, 8, 8)), torch.randint(16, (1, 8, 8))
    way = rn.interpolate(images, start, end, 4)
    assert way.dtype == torch.int64 and torch.equal(way[0], start) and torch.equal(way[-1], end)


@table(("dtype", "levels"), {str(d): (d, n) for d, n in ((torch.uint8, 256), (torch.int8, 128), (torch.int64, 256))})
def test_the_highest_level_of_each_dtype(dtype, levels):
    beta = stats.beta(5, 1.2)
    base = dist.Beta(torch.full((1, 1, 1), 5.0), torch.full((1, 1, 1), 1.2)).to_event(3)
    images = rn.Dequantized(base, levels=levels, num_samples=2000)
    for level in (levels - 1, levels - 2, 0):
        truth = np.log(beta.cdf((level + 1) / levels) - beta.cdf(level / levels))
        value = torch.full((1, 1, 1), level, dtype=dtype)
        assert images.log_prob(value).item() == pytest.approx(truth, abs=0.05)


def test_a_value_scored_for_all_contexts_at_once():
    b = perturb(rn.real_nvp(2, context_dim=3))
    images = rn.DequantizedFlow(rn.Flow(rn.Compose([b, rn.Logit().inv])), levels=17)
    x = torch.tensor([3, 12])
    for num_samples in (1, 3, 4):
        p = images(torch.eye(3), num_samples=num_samples)
        torch.manual_seed(1)
        together = p.log_prob(x)
        torch.manual_seed(1)
        torch.testing.assert_close(together, p.log_prob(x.expand(3, 2)))
        assert together.shape == (3,)
    assert images(torch.eye(3)[:, None]).log_prob(torch.randint(17, (5, 2))).shape == (3, 5)


def test_a_noise_of_zero_stays_off_the_bound(monkeypatch):
    """torch.rand is 0 once in 16 million times, and one image in a thousand had no density under Logit(0)."""
    flow = rn.DequantizedFlow(rn.Flow(rn.Compose([rn.Logit(0).inv]), event_shape=(1, 2, 2)), levels=4)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, **options))
    x = torch.arange(4).repeat(2, 1).reshape(2, 1, 2, 2)
    assert flow().log_prob(x).isfinite().all()


def test_arrays_are_named_as_such():
    flow = rn.DequantizedFlow(rn.Flow(rn.Compose([rn.Logit().inv]), event_shape=(1, 2, 2)), levels=4)
    with pytest.raises(TypeError, match="expected a tensor; got ndarray"):
        flow().log_prob(torch.zeros(2, 1, 2, 2).long().numpy())
