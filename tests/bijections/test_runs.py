# SPDX-License-Identifier: Apache-2.0
"""Neighbouring couplings hand on their halves, which nobody can notice."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from helpers import perturb, table
from hypothesis import given
from pyro.distributions.transforms import ExpTransform
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import pyro_realnvp as rn
from pyro_realnvp import masks
from pyro_realnvp.bijections.runs import runs


def one_by_one(parts, x, context=None, *, forward=True):
    total = 0
    for part in parts if forward else reversed(parts):
        evaluate = part.forward_and_ladj if forward else part.inverse_and_ladj
        x, ladj = evaluate(x, context if part.context_dim else None)
        total = total + ladj
    return x, total


def lengths(f):
    """How many couplings each run has; None where a part is evaluated by itself."""
    return [run and len(run.couplings) for _, run in runs(f.parts)]


@st.composite
def stacks(draw):
    """Couplings in a random order of masks, permutations and other layers, some of them with a context."""
    dim = draw(st.integers(2, 5))
    context_dim = draw(st.sampled_from([0, 2]))
    kinds = [rn.AffineCoupling, rn.AdditiveCoupling, rn.VolumePreservingCoupling, rn.SplineCoupling]
    first = masks.random(dim)
    choices = [first, ~first, masks.half(dim), masks.half(dim, 1), masks.alternating(dim)]
    parts = []
    for _ in range(draw(st.integers(2, 7))):
        what = draw(st.sampled_from(["coupling"] * 4 + ["exchange", "permute", "affine"]))
        if what == "coupling":
            mask, kind, width = draw(st.sampled_from(choices)), draw(st.sampled_from(kinds)), draw(st.integers(0, 1))
            net = rn.MLP(
                mask.num_kept, mask.num_changed * kind.outputs_per_entry, (4,), context_dim=width * context_dim
            )
            parts.append(kind(mask, net, context_dim=width * context_dim))
        elif what == "affine":
            parts.append(rn.TriangularAffine(dim))
        else:
            exchange = torch.arange(dim).roll(dim // 2)
            parts.append(rn.Permute(exchange if what == "exchange" else torch.randperm(dim)))
    return perturb(rn.Compose(parts, event_shape=(dim,), allow_unchanged=True).double())


@given(stacks(), st.sampled_from([(), (3,), (2, 3)]), st.booleans())
def test_a_stack_gives_the_numbers_of_its_parts(f, batch_shape, forward):
    x = torch.randn(*batch_shape, *f.event_shape, dtype=torch.double)
    context = torch.randn(*batch_shape, 2, dtype=torch.double) if f.context_dim else None
    stacked = (f.forward_and_ladj if forward else f.inverse_and_ladj)(x, context)
    for got, want in zip(stacked, one_by_one(list(f.parts), x, context, forward=forward)):
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-10, atol=1e-10)


def board(parity):
    mask = masks.checkerboard(1, parity)
    return rn.AffineCoupling(mask, rn.ConvResNet(2, 4, hidden_channels=4))


def exchanging(dim=4):
    return rn.real_nvp(
        dim,
        num_couplings=4,
        mask_cycle=[masks.half(dim)],
        between=lambda dim: rn.Permute(torch.arange(dim).roll(dim // 2)),
    )


@table(
    "make, expected",
    {
        "halves": (lambda: rn.real_nvp(2, num_couplings=6), [6]),
        "halves, then even and odd": (lambda: rn.real_nvp(4, num_couplings=6), [2, 2, 2]),
        "an exchange of the halves": (exchanging, [4]),
        "halves of another order": (
            lambda: rn.real_nvp(
                4, num_couplings=2, mask_cycle=[masks.half(4)], between=lambda d: rn.Permute(torch.arange(d).flip(0))
            ),
            [1, None, 1],
        ),
        "a layer in between": (
            lambda: rn.real_nvp(4, num_couplings=2, between=lambda dim: rn.ActNorm(dim).inv),
            [1, None, 1],
        ),
        "equal masks": (lambda: rn.Compose([coupling(), coupling()], allow_unchanged=True), [2]),
        "checkerboards": (lambda: rn.Compose([board(0), board(1), board(1)]), [3]),
    },
)
def test_what_a_run_holds(make, expected):
    assert lengths(make()) == expected


def coupling(parity=0, kind=rn.AffineCoupling):
    mask = masks.half(4, parity)
    return kind(mask, rn.MLP(2, 2 * kind.outputs_per_entry, (4,)))


def test_halves_are_joined_once(monkeypatch):
    f, x = rn.Compose([coupling(k % 2) for k in range(8)]), torch.randn(3, 4)
    joined = []
    join = rn.Mask.join
    monkeypatch.setattr(rn.Mask, "join", lambda mask, *halves: joined.append(mask) or join(mask, *halves))
    f(x)
    assert len(joined) == 1


def replace_a_part(f):
    f.parts[1] = perturb(coupling(0))


def replace_a_mask(f):
    f.parts[1].mask = masks.alternating(4)


def load_another_mask(f):
    state = f.state_dict()
    state["parts.1.mask._extra_state"] = masks.alternating(4, 1).b
    f.load_state_dict(state)


def load_another_permutation(f):
    state = f.state_dict()
    state["parts.3._extra_state"] = torch.tensor([1, 0, 2, 3])
    f.load_state_dict(state)


def take_a_part_out(f):
    del f.parts[2]


@pytest.mark.parametrize(
    "change", [replace_a_part, replace_a_mask, load_another_mask, load_another_permutation, take_a_part_out]
)
def test_a_change_of_the_structure_is_noticed(change):
    parts = [coupling(0), coupling(1), coupling(0), rn.Permute(torch.tensor([2, 3, 0, 1])), coupling(0)]
    f, x = perturb(rn.Compose(parts)), torch.randn(5, 4)
    assert lengths(f) == [4]
    f(x)
    change(f)
    assert lengths(f) != [4] or change is replace_a_part
    for got, want in zip(f.forward_and_ladj(x), one_by_one(list(f.parts), x)):
        torch.testing.assert_close(got, want)


class Mixing(rn.Coupling):
    """A coupling that mixes the changed entries: it exchanges them, and shifts them."""

    outputs_per_entry = 1

    def forward_and_ladj(self, x, context=None):
        kept, changed = self.split(x, context)
        (shift,) = self.read(kept, context)
        return self.mask.join(kept, changed.flip(-1) + shift), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        kept, changed = self.split(y, context)
        (shift,) = self.read(kept, context)
        return self.mask.join(kept, (changed - shift).flip(-1)), y.new_zeros(y.shape[:-1])


def test_a_coupling_of_whole_halves_is_evaluated_by_itself():
    f, x = perturb(rn.Compose([coupling(0), coupling(1, Mixing), coupling(0)])), torch.randn(5, 4)
    assert lengths(f) == [1, None, 1]
    torch.testing.assert_close(f(x), one_by_one(list(f.parts), x)[0])
    torch.testing.assert_close(f.inv(f(x)), x, rtol=1e-4, atol=1e-5)


def test_a_part_that_is_compiled_is_called():
    f, x = perturb(rn.Compose([coupling(0), coupling(1)])), torch.randn(5, 4)
    f(x)
    f.parts[1].compile(backend="eager")
    assert lengths(f) == [1, None]
    with torch.no_grad():
        torch.testing.assert_close(f(x), one_by_one(list(f.parts), x)[0])


def test_slopes_of_another_shape_are_refused():
    class Summed(rn.Coupling):
        outputs_per_entry = 1

        def forward_entries(self, x, s):
            return x * s.exp(), s.sum(-1)

    with pytest.raises(ValueError, match=r"log-slopes of the shape .* \(3, 2\); got \(3,\): return one for each entry"):
        coupling(0, Summed)(torch.zeros(3, 4))


def test_hooks_of_the_networks_are_called():
    f, x = rn.Compose([coupling(0), coupling(1)]), torch.randn(3, 4)
    seen = []
    for part in f.parts:
        for layer in part.conditioner.modules():
            layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    f(x)
    assert len(seen) == 2 * 4  # the MLP, its first and last layer, and its activation

    seen.clear()
    handle = register_module_forward_hook(lambda layer, *_: seen.append(type(layer)))
    try:
        rn.MLP(2, 2)(torch.ones(2))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3


def test_layers_that_are_pruned_or_replaced_work():
    net = perturb(rn.MLP(2, 2))
    x = torch.randn(3, 2)
    prune.l1_unstructured(net.first, "weight", amount=0.5)
    before = net(x)
    prune.remove(net.first, "weight")
    assert torch.equal(net(x), before)
    net.last.forward = lambda h: torch.full((3, 2), 7.0)
    assert torch.equal(net(x), torch.full((3, 2), 7.0))


class SignedPermute(rn.Permute):
    def forward_and_ladj(self, x, context=None):
        y, ladj = super().forward_and_ladj(x)
        return -y, ladj

    def inverse_and_ladj(self, y, context=None):
        return super().inverse_and_ladj(-y)


class FlippingMask(rn.Mask):
    def split(self, x):
        kept, changed = super().split(x)
        return kept, -changed

    def join(self, kept, changed):
        return super().join(kept, -changed)


def test_what_overrides_a_permutation_a_mask_or_a_direction_is_evaluated_by_itself():
    x = torch.randn(3, 4)
    flipping = perturb(coupling(0))
    flipping.mask = FlippingMask(masks.half(4).b)
    mirrored = perturb(coupling(0))
    own = mirrored.inverse_and_ladj
    mirrored.inverse_and_ladj = lambda y, context=None: own(-y)
    for part in (SignedPermute(torch.tensor([2, 3, 0, 1])), flipping, mirrored):
        f = rn.Compose([perturb(coupling(0)), part, perturb(coupling(1))], allow_unchanged=True)
        for forward, direction in ((True, f.forward_and_ladj), (False, f.inverse_and_ladj)):
            for got, expected in zip(direction(x), one_by_one(f.parts, x, forward=forward)):
                torch.testing.assert_close(got, expected)


def test_parts_may_be_removed_and_appended():
    x = torch.rand(5, 4) + 0.5
    f = perturb(rn.Compose([ExpTransform().inv, coupling(0), coupling(1)]))
    f(x)
    del f.parts[0]
    torch.testing.assert_close(f.forward_and_ladj(x), one_by_one(f.parts, x))
    f.parts.append(perturb(rn.TriangularAffine(4)))
    torch.testing.assert_close(f.forward_and_ladj(x), one_by_one(f.parts, x))
    f.parts.insert(0, rn.Squeeze())
    with pytest.raises(ValueError, match="build a new Compose"):
        f.forward_and_ladj(x)


def test_threads_agree_on_the_first_evaluation():
    x, before = torch.randn(1, 2), sys.getswitchinterval()
    first = perturb(rn.real_nvp(2, num_couplings=4))
    expected = first(x)
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            f = copy.deepcopy(first)
            with ThreadPoolExecutor(4) as pool:
                assert all(torch.equal(y, expected) for y, _ in pool.map(f.forward_and_ladj, [x] * 4))
    finally:
        sys.setswitchinterval(before)


def test_a_checkpoint_evaluates_once_what_must_not_be_recomputed():
    class Counting(rn.AffineCoupling):
        can_be_recomputed = False
        count = 0

        def change(self, *args):
            Counting.count += 1
            return super().change(*args)

    f = rn.Compose([coupling(0, Counting), coupling(1, Counting)], checkpoint=True)
    y, ladj = f.forward_and_ladj(torch.randn(3, 4))
    (y.sum() + ladj.sum()).backward()
    assert Counting.count == 2


def test_a_layer_that_holds_its_weight_as_an_attribute():
    net = rn.MLP(2, 2)
    weight = net.first.weight.detach()
    del net.first.weight
    net.first.weight = weight
    assert net(torch.ones(2)).shape == (2,)
