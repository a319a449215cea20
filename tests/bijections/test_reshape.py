# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import table

import pyro_realnvp as rn


def test_squeeze_has_the_order_of_the_papers_figure():
    """Figure 3: the squares of the 4 x 4 image are read one after the other, and each becomes one position."""
    x = torch.tensor([[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]])
    y = rn.Squeeze()(x)
    assert y.tolist() == [[[k, k + 4], [k + 8, k + 12]] for k in (1, 2, 3, 4)]
    two_channels = rn.Squeeze()(torch.cat([x, -x]))
    assert torch.equal(two_channels, torch.cat([y, -y]))


@table(
    ("make", "error", "message"),
    {
        "Permute: repeated entry": (
            lambda: rn.Permute(torch.tensor([0, 0, 1])),
            ValueError,
            "each of 0, ..., D - 1 once",
        ),
        "Squeeze: odd height": (
            lambda: rn.Squeeze()(torch.zeros(1, 5, 4)),
            ValueError,
            r"even height and width; got 5 x 4.*\(0, 0, 0, 1\)",
        ),
        "Squeeze: three channels back": (
            lambda: rn.Squeeze().inv(torch.zeros(3, 2, 2)),
            ValueError,
            "multiple of 4 channels",
        ),
        "Squeeze: no channels": (lambda: rn.Squeeze()(torch.zeros(4, 4)), ValueError, "expected event shape"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
