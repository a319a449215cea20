# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import table
from hypothesis import given
from hypothesis import strategies as st

from pyro_realnvp import Mask, masks


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.sampled_from([(), (0,), (3,), (2, 3)]))
def test_split_keeps_the_order_and_join_undoes_it(b, batch_shape):
    b = torch.tensor(b)
    if b.all() or not b.any():
        with pytest.raises(ValueError, match="keeps some entries and changes some"):
            Mask(b)
        return
    mask, x = Mask(b), torch.randn(*batch_shape, len(b))
    kept, changed = mask.split(x)
    assert torch.equal(kept, x[..., b])
    assert torch.equal(changed, x[..., ~b])
    assert torch.equal(mask.join(kept, changed), x)
    assert torch.equal((~mask).split(x)[0], changed)


@pytest.mark.parametrize("make", [masks.half, masks.alternating])
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_parities_are_opposite(make, dim):
    assert torch.equal(make(dim).b, ~make(dim, parity=1).b)
    assert make(dim).b[0]


def test_random_masks_follow_the_generator():
    first, again, other = (masks.random(50, torch.Generator().manual_seed(seed)).b for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.sum() == 25
    assert not torch.equal(first, other)


def test_loading_rederives_the_split():
    saved, x = Mask(torch.tensor([True, False, False, True])), torch.arange(4.0)
    for fresh in (masks.half(4), masks.alternating(4)):
        fresh.load_state_dict(saved.state_dict())
        assert fresh.split(x)[0].tolist() == [0.0, 3.0]
        assert fresh.join(*fresh.split(x)).tolist() == x.tolist()


@table(
    ("make", "message"),
    {
        "keeps all": (lambda: Mask(torch.ones(3, dtype=torch.bool)), "all True"),
        "changes all": (lambda: Mask(torch.zeros(3, dtype=torch.bool)), "all False"),
        "integers": (lambda: Mask(torch.tensor([0, 1])), "expected a mask"),
        "matrix": (lambda: Mask(torch.zeros(2, 2, dtype=torch.bool)), "expected a mask"),
        "half of one": (lambda: masks.half(1), "input_dim >= 2"),
        "alternating of one": (lambda: masks.alternating(1), "input_dim >= 2"),
        "random of none": (lambda: masks.random(0), "input_dim >= 2"),
        "event shape": (lambda: masks.half(4).split(torch.zeros(2, 3)), r"expected event shape \(4,\)"),
        "odd height": (lambda: masks.checkerboard(1).split(torch.zeros(1, 3, 4)), "even height and width; got 3 x 4"),
        "no channels": (lambda: masks.checkerboard(0), "one or more channels"),
        "one channel": (lambda: masks.channelwise(1), "squeeze first, or use checkerboard"),
        "squeeze of vectors": (lambda: Mask(torch.tensor([True, False]), event_dim=1, squeeze=True), "event_dim=3"),
    },
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_checkerboard_keeps_every_other_pixel(channels, parity):
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    kept_pixels = ((row + column) % 2 == parity).expand(channels, 4, 6)
    x = torch.randn(5, channels, 4, 6, dtype=torch.float64)
    mask = masks.checkerboard(channels, parity)
    kept, changed = mask.split(x)
    assert kept.shape == changed.shape == (5, 2 * channels, 2, 3)
    assert torch.equal(mask.join(kept, torch.zeros_like(changed)), x * kept_pixels)
    assert torch.equal((~mask).split(x)[0], changed)
