# SPDX-License-Identifier: Apache-2.0
"""Flows of images: their behavior beyond the laws that all bijections obey."""

import pytest
import torch
from helpers import perturb, saved_bytes, table
from torch import nn

import pyro_realnvp as rn

ARRANGEMENTS = [
    lambda shape, **options: rn.image_real_nvp(shape, **options),
    lambda shape, **options: rn.image_real_nvp(shape, between=lambda c: rn.BatchNorm(c, event_dim=3), **options),
    lambda shape, **options: rn.glow(shape, num_couplings=2, **options),
]


@pytest.mark.parametrize("make", ARRANGEMENTS, ids=["paper", "with batch normalization", "glow"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (2, 4, 4)], ids=str)
def test_multi_scale_flows(make, shape):
    f = make(shape, hidden_channels=4).eval()
    x = torch.randn(5, *shape)
    assert torch.equal(f(x), x) and torch.equal(f.inv(x), x)  # a new flow is the identity
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
        for p in factor_outs[0].bijection.parameters():  # the parameters of all scales after the first
            p.add_(0.1)
        after = f.inv(x)
    assert torch.equal((after != before), scales > 1)


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


IMAGES = torch.zeros(5, 1, 8, 8)


@table(
    ("make", "error", "message"),
    {
        "odd height": (
            lambda: rn.image_real_nvp((1, 7, 8)),
            ValueError,
            r"multiples of 2, for 1 scales.*pad\(x, \(0, 0, 0, 1\)\)",
        ),
        "too many scales": (
            lambda: rn.image_real_nvp((1, 12, 12), num_scales=3),
            ValueError,
            "multiples of 8.*fewer scales",
        ),
        "a shape with the channels last": (
            lambda: rn.glow((28, 28, 1)),
            ValueError,
            r"if they are last, pass \(1, 28, 28\) and x.movedim",
        ),
        "no channels": (lambda: rn.image_real_nvp((8, 8)), ValueError, r"\(channels, height, width\); got \(8, 8\)"),
        "one coupling": (lambda: rn.image_real_nvp((1, 8, 8), num_couplings=1), ValueError, "num_couplings >= 2"),
        "no scales": (lambda: rn.image_real_nvp((1, 8, 8), num_scales=0), ValueError, "num_scales >= 1"),
        "context image of another size": (
            lambda: rn.image_real_nvp((1, 8, 8), context_image=(1, 4, 4)),
            ValueError,
            "context_image",
        ),
        "glow: one coupling": (lambda: rn.glow((1, 8, 8), num_couplings=1), ValueError, "every channel is changed"),
        "channels last": (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES.movedim(1, -1)),
            ValueError,
            "movedim",
        ),
        "no channel axis": (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES[:, 0]),
            ValueError,
            r"x.unsqueeze\(-3\)",
        ),
        "image size under a flow": (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(torch.zeros(5, 1, 16, 16)),
            ValueError,
            r"expected event shape \(1, 8, 8\); got shape \(5, 1, 16, 16\)",
        ),
        "image size": (
            lambda: rn.image_real_nvp((1, 8, 8))(torch.zeros(5, 1, 16, 16)),
            ValueError,
            r"event shape \(1, 8, 8\)",
        ),
        "integers": (lambda: rn.Flow(rn.image_real_nvp((1, 8, 8)))().log_prob(IMAGES.long()), TypeError, "Dequantized"),
        "integers for pixels": (
            lambda: rn.Flow(rn.Compose([rn.image_real_nvp((1, 8, 8)), rn.Logit().inv]))().log_prob(IMAGES.long()),
            TypeError,
            "Dequantized",
        ),
        "no context": (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8), context_dim=3))(),
            ValueError,
            "context of width 3; got none",
        ),
        "labels as context": (
            lambda: rn.Flow(rn.image_real_nvp((1, 8, 8), context_dim=3))(torch.zeros(5).long()),
            ValueError,
            "one_hot",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
