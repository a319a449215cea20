# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import perturb, table
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyro_realnvp as rn


def test_actnorm_normalizes_what_initializes_it():
    x = torch.randn(2000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 10.0, -3.0])
    for f in (rn.ActNorm(3).initialize(x), rn.ActNorm(3)):
        y = f(x)  # this pass initializes the second bijection
        torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(y.std(0), torch.ones(3), atol=1e-3, rtol=0)
    x[:, 1] = 7.0
    y = rn.ActNorm(3).initialize(x)(x)
    assert torch.equal(y[:, 1], torch.zeros(2000))  # a constant column is centered, its scale stays


def by_vector(source, target):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(source.parameters()), target.parameters())
    return target


def by_copy(source, target):
    with torch.no_grad():
        for p, q in zip(source.parameters(), target.parameters()):
            q.copy_(p)
    return target


def by_average(source, target):
    average = torch.optim.swa_utils.AveragedModel(target)
    average.update_parameters(source)
    return average.module


def by_state(source, target):
    target.load_state_dict(dict(source.named_parameters()) | {"_extra_state": torch.tensor(False)})
    return target


@pytest.mark.parametrize("bring", [by_vector, by_copy, by_average, by_state])
def test_parameters_that_come_from_elsewhere_are_never_overwritten(bring):
    source = rn.ActNorm(2).initialize(torch.randn(50, 2) * 3 + 5)
    f = bring(source, rn.ActNorm(2))
    other = torch.randn(20, 2)
    torch.testing.assert_close(f.train()(other), source(other))
    assert f.initialized and not f.needs_data
    torch.testing.assert_close(f.loc, source.loc)


def test_batchnorm_converges_to_the_statistics_and_trains_through_them():
    f, x = rn.BatchNorm(2, momentum=0.5), (torch.randn(500, 2) * 3 + 4).requires_grad_()
    for _ in range(30):
        y = f(x)
    torch.testing.assert_close(f.mean, x.detach().mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(f.variance, x.detach().var(0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(f.inv(y), x, atol=1e-4, rtol=1e-4)  # exact in train mode too
    row = torch.autograd.grad(f(x)[0, 0], x)[0]
    assert row[1, 0] != 0  # since the mean and the variance of the batch depend on every row


def test_batchnorm_is_the_same_in_a_checkpoint():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(3)) * 3 + 5
    found = []
    for checkpointed in (False, True):
        flow, value = rn.Flow(rn.Compose([rn.BatchNorm(2).inv])), x.clone().requires_grad_()
        log_prob = flow().log_prob
        loss = (checkpoint(log_prob, value, use_reentrant=False) if checkpointed else log_prob(value)).mean()
        found.append((loss, *torch.autograd.grad(loss, value), *flow.buffers()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_layers_act_on_each_channel():
    x = torch.randn(50, 3, 4, 6) * torch.tensor([1.0, 5.0, 0.1]).reshape(3, 1, 1) + 2
    y = rn.ActNorm(3, event_dim=3).initialize(x)(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    f = rn.ActNorm(3, event_dim=3)
    f(x[:1])
    assert not f.initialized  # one image counts as one row, which is too few
    norm = rn.BatchNorm(3, event_dim=3, momentum=0.0)
    torch.testing.assert_close(norm(x).mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    linear = perturb(rn.InvertibleLinear(3, event_dim=3, permutation=torch.tensor([2, 0, 1])), 0.5)
    matrix = rn.InvertibleLinear(3, permutation=torch.tensor([2, 0, 1]))
    matrix.load_state_dict(linear.state_dict())
    kernel = matrix(torch.eye(3)).T[..., None, None]
    torch.testing.assert_close(linear(x), nn.functional.conv2d(x, kernel), atol=1e-4, rtol=1e-4)


@table(
    ("make", "error", "message"),
    {
        "ActNorm: inf": (lambda: rn.ActNorm(2).initialize(torch.full((3, 2), torch.inf)), ValueError, "nan or inf"),
        "BatchNorm: momentum one": (lambda: rn.BatchNorm(2, momentum=1.0), ValueError, "momentum"),
        "BatchNorm: eps zero": (lambda: rn.BatchNorm(2, eps=0.0), ValueError, "eps > 0"),
        "ActNorm: no event": (lambda: rn.ActNorm(1, event_dim=0), ValueError, "event_dim >= 1"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
