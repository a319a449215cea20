# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import perturb, table

import pyro_realnvp as rn


def test_linear_is_a_matrix():
    f = perturb(rn.InvertibleLinear(4, permutation=torch.tensor([2, 0, 3, 1])).double(), 0.5)
    matrix = f(torch.eye(4, dtype=torch.float64)).T
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(f(x), x @ matrix.T)
    torch.testing.assert_close(f.log_abs_det_jacobian(x, f(x)), torch.linalg.slogdet(matrix).logabsdet.expand(5))


@table(
    ("make", "error", "message"),
    {
        "short permutation": (
            lambda: rn.InvertibleLinear(3, permutation=torch.tensor([1, 0])),
            ValueError,
            "expected event shape",
        ),
        "start above the diagonal": (
            lambda: rn.TriangularAffine(2).start_at(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])),
            ValueError,
            "lower triangular.*cholesky",
        ),
        "start of another size": (
            lambda: rn.TriangularAffine(2).start_at(torch.zeros(1), torch.ones(1, 1)),
            ValueError,
            r"D = 2; got \(1,\) and \(1, 1\)",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
