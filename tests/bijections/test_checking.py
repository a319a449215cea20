# SPDX-License-Identifier: Apache-2.0
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import few, table
from hypothesis import given
from hypothesis import strategies as st
from registry import CASES, bijections, values

import pyro_realnvp as rn


@pytest.mark.parametrize("case", CASES, ids=repr)
@few(3)
@given(data=st.data())
def test_our_own_pass(case, data):
    f = data.draw(bijections(case))
    x = data.draw(values(f, batch_shapes=((3,), (2, 3))))
    assert rn.check_bijection(f, x, tolerance=1e-6).passed


def test_pyros_own_pass():
    for f in (T.Householder(3), T.AffineTransform(1.0, 2.0), T.affine_coupling(3)):
        assert rn.check_bijection(f, torch.randn(5, 3), tolerance=1e-2).passed


class Wrong(rn.Bijection):
    """A shift with the fault that its argument names."""

    def __init__(self, fault):
        super().__init__((2,))
        self.fault = fault

    def forward_and_ladj(self, x, context=None):
        y = x * 2 if self.fault == "log-det" else x + 1
        if self.fault == "gradient":
            y = y + (x - x.detach()).abs().sqrt()
        ladj = x.new_zeros(x.shape if self.fault == "ladj shape" else x.shape[:-1])
        return y.detach() if self.fault == "detached" else y, ladj

    def inverse_and_ladj(self, y, context=None):
        if self.fault == "not finite":
            return y / 0, y.new_zeros(y.shape[:-1])
        x = y / 2 if self.fault == "log-det" else y - (2 if self.fault == "inverse" else 1)
        return x, y.new_ones(y.shape[:-1]) if self.fault == "inverse ladj" else y.new_zeros(y.shape[:-1])


@table(
    ("fault", "line"),
    {
        "inverse": ("inverse", r"FAIL  f.inv\(f\(x\)\) = x .* relative error"),
        "log-det": ("log-det", r"FAIL  log\|det J\| = autograd's"),
        "ladj shape": ("ladj shape", r"FAIL  shape of log\|det J\|"),
        "inverse ladj": ("inverse ladj", r"FAIL  log\|det J\| of f.inv"),
        "not finite": ("not finite", r"FAIL  f.inv\(f\(x\)\) = x"),
        "gradient": ("gradient", "FAIL  gradients are finite"),
        "detached": ("detached", r"FAIL  f\(x\) has a gradient"),
    },
)
def test_faults_are_found_and_named(fault, line):
    with pytest.raises(ValueError, match=line):
        rn.check_bijection(Wrong(fault), torch.randn(4, 2, dtype=torch.float64))
