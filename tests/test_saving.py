# SPDX-License-Identifier: Apache-2.0
from functools import partial

import helpers
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import assert_same_state, perturb, table

import pyro_realnvp as rn

make_flow = partial(helpers.make_flow, seed=1, actnorm=True)


@pytest.mark.parametrize(
    "make",
    [make_flow, lambda: make_flow().bijection, lambda: make_flow().double()],
    ids=["flow", "bijection", "float64"],
)
def test_what_is_saved_is_loaded(tmp_path, make):
    path = tmp_path / "flow.pt"
    module, other = make(), make()
    perturb(module, 1.0)
    rn.save(module, path)
    assert rn.load(other, path) is other
    assert_same_state(module, other)


def test_random_masks_are_loaded_and_are_no_other_architecture(tmp_path):
    def make():
        mask = rn.masks.random(6)
        return rn.Flow(rn.real_nvp(6, num_couplings=2, mask_cycle=[mask, ~mask]))

    path, flow = tmp_path / "flow.pt", make()
    perturb(flow, 0.1)
    rn.save(flow, path)
    x = torch.randn(5, 6)
    torch.manual_seed(77)
    assert torch.equal(rn.load(make(), path)().log_prob(x), flow().log_prob(x))


def linear():
    """A bijection of two channels. They fit half of a checkerboard of one channel, and half of four channels."""
    return rn.InvertibleLinear(2, event_dim=3)


@table(
    ("there", "here"),
    {
        "couplings": (make_flow(), rn.Flow(rn.real_nvp(2, num_couplings=4, hidden_dims=(8,)))),
        "number": tuple(rn.Flow(rn.Compose([rn.Logit(a).inv]), (2,)) for a in (0.05, 0.01)),
        "bijection for a flow": (make_flow(), make_flow().bijection),
        "mask": (rn.FactorOut(rn.masks.checkerboard(1), linear()), rn.FactorOut(rn.masks.channelwise(4), linear())),
    },
)
def test_another_architecture_is_refused(tmp_path, there, here):
    rn.save(there, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="another architecture"):
        rn.load(here, tmp_path / "flow.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        rn.load(make_flow(), tmp_path / "flow.pt")
    with pytest.raises(RuntimeError, match="could not be written"):
        rn.save(make_flow(), tmp_path / "nowhere" / "flow.pt")


@table(
    ("saved", "other"),
    {
        "number": (lambda: T.AffineTransform(5.0, 3.0), lambda: T.AffineTransform(0.0, 1.0)),
        "tensor": (lambda: T.AffineTransform(torch.ones(2), 1.0), lambda: T.AffineTransform(torch.zeros(2), 1.0)),
        "inverse": (lambda: T.AffineTransform(5.0, 3.0).inv, lambda: T.AffineTransform(0.0, 1.0).inv),
        "option of a module": (lambda: T.Spline(2, bound=3.0), lambda: T.Spline(2, bound=9.0)),
    },
)
def test_constants_of_foreign_transforms_are_compared(tmp_path, saved, other):
    def flow(transform):
        return rn.Flow(rn.Compose([rn.real_nvp(2, num_couplings=2), transform]))

    path = tmp_path / "flow.pt"
    used = flow(saved())
    used().log_prob(torch.rand(3, 2))
    rn.save(used, path)
    rn.load(flow(saved()), path)
    with pytest.raises(ValueError, match="another architecture"):
        rn.load(flow(other()), path)
