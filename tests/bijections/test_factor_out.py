# SPDX-License-Identifier: Apache-2.0
import pytest
from helpers import table
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp import masks


@table(
    ("make", "error", "message"),
    {
        "bijection does not fit": (
            lambda: rn.FactorOut(masks.half(4), rn.real_nvp(3)),
            ValueError,
            "the 2 entries that go on",
        ),
        "bounded": (
            lambda: rn.FactorOut(masks.half(4), rn.Unbound([0.0, 0.0], [1.0, 1.0]).inv),
            ValueError,
            "expected a bijection of real numbers; got one from .*Real.* to .* use CatTransform",
        ),
        "no bijection": (lambda: rn.FactorOut(masks.half(4), nn.Identity()), TypeError, "a Mask and a Bijection"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
