# SPDX-License-Identifier: Apache-2.0
"""Gradients of a stack that keeps only its output."""

import pyro.distributions as dist
import pytest
import torch
from helpers import perturb, saved_bytes
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_realnvp as rn


def both(make, scale=0.1):
    """A flow that keeps everything, and the same one that recomputes."""
    plain, lean = make(False), make("inverse")
    for module in perturb(plain, scale).modules():
        if isinstance(module, rn.ActNorm):
            module.initialize(torch.randn(50, *[n or 4 for n in module.event_shape]))
    lean.load_state_dict(plain.state_dict())
    return plain.double(), lean.double()


def gradients(f, x, context, *, forward):
    torch.manual_seed(1)
    inputs = [t.clone().requires_grad_() for t in (x, context) if t is not None]
    evaluate = f.forward_and_ladj if forward else f.inverse_and_ladj
    y, ladj = evaluate(*inputs)
    inputs += [p for p in f.parameters() if p.requires_grad]
    return torch.autograd.grad(y.square().sum() + ladj.sin().sum(), inputs)


def vectors(checkpoint, **options):
    parts = rn.real_nvp(5, num_couplings=6, between=lambda dim: rn.ActNorm(dim).inv, **options).parts
    return rn.Compose([*parts, rn.TriangularAffine(5), rn.Logit().inv], checkpoint=checkpoint)


def images(checkpoint, **options):
    return rn.image_real_nvp((1, 8, 8), hidden_channels=4, checkpoint=checkpoint, **options)


CASES = {
    "vectors": vectors,
    "splines": lambda checkpoint: vectors(checkpoint, coupling=rn.SplineCoupling),
    "a context": lambda checkpoint: vectors(checkpoint, context_dim=2),
    "images": images,
    "images, a context": lambda checkpoint: images(checkpoint, context_dim=2),
    "volume": lambda checkpoint: images(checkpoint, coupling=rn.VolumePreservingCoupling),
}


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("make", list(CASES.values()), ids=list(CASES))
def test_the_gradients_are_those_of_the_plain_pass(make, forward):
    plain, lean = both(make)
    x = torch.randn(7, *plain.event_shape, dtype=torch.double)
    context = torch.randn(7, 2, dtype=torch.double) if plain.context_dim else None
    if not forward:
        with torch.no_grad():
            x, _ = plain.forward_and_ladj(x, context)
    for got, want in zip(*(gradients(f, x, context, forward=forward) for f in (lean, plain)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_frozen_parameters_and_dropout():
    flows = both(lambda checkpoint: vectors(checkpoint, activation=lambda: nn.Dropout(0.5)))
    for f in flows:
        f.parts[0].conditioner.requires_grad_(False)
    x = torch.randn(7, 5, dtype=torch.double)
    for want, got in zip(*(gradients(f, x, None, forward=True) for f in flows), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_training_with_autocast():
    plain, lean = (f.float() for f in both(vectors))
    x = torch.randn(200, 5).sigmoid()
    losses = []
    for f in (plain, lean):
        flow = rn.Flow(f)
        history = rn.fit(
            flow, x, num_steps=20, seed=0, autocast=torch.bfloat16, standardize=False, progress=False, validation=0
        )
        losses.append(history.loss[-1])
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_memory_does_not_grow_with_the_depth():
    def held(num_couplings, checkpoint):
        f = rn.Compose(rn.real_nvp(8, num_couplings=num_couplings).parts, checkpoint=checkpoint)
        (_, ladj), size = saved_bytes(lambda: f.forward_and_ladj(torch.randn(1000, 8)), without=f.parameters())
        assert ladj.shape == (1000,)
        return size

    assert held(16, "inverse") == held(4, "inverse") < held(4, False) / 20
    assert held(16, False) > 3 * held(4, False)


def test_parameters_that_changed_between_both_passes_are_refused():
    f, x = perturb(vectors("inverse")), torch.randn(7, 5)
    loss = f(x).sum()
    with torch.no_grad():
        f.parts[0].conditioner.last.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = f(x).sum()
    f.parts[0].conditioner.last.bias = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="expected the parameters of the forward pass"):
        loss.backward()


def test_there_are_no_second_derivatives():
    """They were zeros: torch's `once_differentiable` raises an error in `backward()` only."""
    f, x = perturb(vectors("inverse")), torch.randn(5)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.hessian(lambda x: f(x).sum(), x)


def test_networks_with_sampled_weights_are_kept():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))

        def forward(self, x):
            return x @ self.weight.T

    coupling = rn.AffineCoupling(rn.masks.half(4), Network())
    f, x = rn.Compose([coupling], checkpoint="inverse"), torch.randn(7, 4)
    weight = torch.randn(4, 2, requires_grad=True)
    object.__setattr__(coupling.conditioner, "forward", lambda kept: kept @ weight.T)
    assert torch.autograd.grad(f(x).sum(), weight)[0].abs().sum() > 0


@pytest.mark.parametrize("checkpoint", [True, "inverse"])
def test_torch_func_keeps_everything(checkpoint):
    plain, lean = both(vectors)
    lean.checkpoint = checkpoint
    x = torch.randn(5, dtype=torch.double)
    for got, want in zip(*(torch.func.jvp(f, (x,), (torch.ones_like(x),)) for f in (lean, plain))):
        torch.testing.assert_close(got, want)
    hessians = (torch.func.hessian(lambda x, f=f: f(x).sin().sum())(x) for f in (lean, plain))
    torch.testing.assert_close(*hessians)


def test_a_flag_that_is_neither():
    with pytest.raises(ValueError, match="expected checkpoint to be True, False or 'inverse'; got 'yes'"):
        rn.Compose([], checkpoint="yes")
