# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import table

import pyro_realnvp as rn
from pyro_realnvp import masks


@pytest.mark.parametrize("num_couplings", [2, 16])
@pytest.mark.parametrize("coupling", [rn.AffineCoupling, rn.AdditiveCoupling, rn.VolumePreservingCoupling])
def test_identity_at_birth(num_couplings, coupling):
    for between in (
        None,
        rn.InvertibleLinear,
        lambda d: rn.ActNorm(d).inv,
        lambda d: rn.BatchNorm(d).inv,
        rn.Standardize,
    ):
        f = rn.real_nvp(5, num_couplings=num_couplings, coupling=coupling, between=between).eval()
        x = 10 * torch.randn(100, 5)
        y, ladj = f.forward_and_ladj(x)
        assert torch.equal(y, x) and torch.equal(ladj, torch.zeros(100))


@table(
    ("make", "error", "message"),
    {
        "one dimension": (lambda: rn.real_nvp(1), ValueError, "Spline"),
        "fraction of a dimension": (lambda: rn.real_nvp(2.5), TypeError, "integer"),
        "no masks": (lambda: rn.real_nvp(3, mask_cycle=[]), ValueError, r"masks of events of shape \(3,\)"),
        "masks of other events": (
            lambda: rn.real_nvp(3, mask_cycle=[masks.half(2), masks.half(2, 1)]),
            ValueError,
            r"got \[\(2,\), \(2,\)\]",
        ),
        "one coupling": (lambda: rn.real_nvp(3, num_couplings=1), ValueError, "num_couplings >= 2"),
        "option of another coupling": (
            lambda: rn.real_nvp(3, coupling=rn.AdditiveCoupling, max_log_scale=1.0),
            ValueError,
            "no option .*max_log_scale",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
