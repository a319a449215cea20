# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from helpers import (
    perturb,
    table,
)
from pyro.nn import PyroModule
from torch import nn

import pyro_realnvp as rn


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


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
    normalized = rn.ConvResNet(2, 4, batch_norm=True)
    assert any(isinstance(m, nn.BatchNorm2d) for m in normalized.modules())
    assert normalized.eval()(x.float()).shape == (2, 3, 4, 4, 6)


class Sine(nn.Module):
    def __call__(self, x):
        return x.sin()


@pytest.mark.parametrize(
    "activation",
    [nn.SiLU, lambda: nn.ReLU(inplace=True), Sine, nn.PReLU, lambda: torch.jit.script(nn.Tanh()), PyroModule[nn.PReLU]],
    ids=["SiLU", "in place", "a __call__ of its own", "with a parameter", "scripted", "of Pyro"],
)
@pytest.mark.parametrize("residual", [False, True])
def test_mlp_computes_what_its_layers_do(activation, residual):
    net, x = perturb(rn.MLP(3, 4, (5, 5, 5), activation=activation, residual=residual)), torch.randn(7, 3)
    h = net.first(x)
    for layer in net.hidden:
        update = layer(net.activation(h))
        h = h + update if residual else update
    assert torch.equal(net(x), net.last(net.activation(h)))


def test_an_image_as_context_is_seen_where_it_is():
    net = perturb(rn.ConvResNet(1, 2, 4, num_blocks=1, context_image=(1, 16, 16), context_scale=2).double(), 0.3)
    assert net.context_dim == 256
    x, image = randn(1, 8, 8), randn(1, 16, 16)
    edited = image.clone()
    edited[0, 0, 0] += 1
    difference = (net(x, edited.flatten()) - net(x, image.flatten())).abs().sum(0)
    assert difference[0, 0] > 0 and not difference[5:, 5:].any()


@table(
    ("make", "error", "message"),
    {
        "MLP: no width": (lambda: rn.MLP(2, 4, hidden_dims=()), ValueError, "at least one hidden width"),
        "MLP: no input": (lambda: rn.MLP(0, 4), ValueError, "in_features >= 1; got 0"),
        "MLP: negative output": (lambda: rn.MLP(2, -4), ValueError, "out_features >= 1; got -4"),
        "MLP: width zero": (lambda: rn.MLP(2, 4, hidden_dims=(8, 0)), ValueError, "all positive"),
        "MLP: unequal residual widths": (
            lambda: rn.MLP(2, 4, hidden_dims=(8, 9), residual=True),
            ValueError,
            "equal widths",
        ),
        "MLP: unwanted context": (
            lambda: rn.MLP(2, 4)(torch.zeros(2), torch.zeros(3)),
            ValueError,
            "expected no context",
        ),
        "MLP: no context": (
            lambda: rn.MLP(2, 4, context_dim=3)(torch.zeros(2)),
            ValueError,
            r"context of shape \(..., 3\); got none",
        ),
        "MLP: context shape": (
            lambda: rn.MLP(2, 4, context_dim=3)(torch.zeros(2), torch.zeros(5, 2)),
            ValueError,
            r"shape \(5, 2\)",
        ),
        "ConvResNet: no channels": (lambda: rn.ConvResNet(2, 4, 0), ValueError, "hidden_channels >= 1; got 0"),
        "ConvResNet: unwanted context": (
            lambda: rn.ConvResNet(2, 4)(torch.zeros(2, 4, 4), torch.zeros(3)),
            ValueError,
            "expected no context",
        ),
        "ConvResNet: no context": (
            lambda: rn.ConvResNet(2, 4, context_dim=3)(torch.zeros(2, 4, 4)),
            ValueError,
            r"\(..., 3\); got none",
        ),
        "ConvResNet: context image of another size": (
            lambda: rn.ConvResNet(1, 2, context_image=(1, 8, 8))(torch.zeros(1, 4, 4), torch.zeros(64)),
            ValueError,
            "context_scale",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
