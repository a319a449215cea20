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


@pytest.mark.parametrize(
    "make",
    [
        lambda: rn.InvertibleLinear(4),
        lambda: rn.TriangularAffine(4),
        lambda: rn.LowRankAffine(4, rank=2),
        lambda: rn.ConditionalAffine(4, context_dim=2).condition(torch.ones(2)),
    ],
)
def test_autocast_does_not_round_the_data(make):
    """It is for the products of networks."""
    f, x = perturb(make()), 1000 + torch.randn(5, 4)
    for evaluate in (f.forward_and_ladj, f.inverse_and_ladj):
        expected = evaluate(x)
        with torch.autocast("cpu", torch.bfloat16):
            for got, want in zip(evaluate(x), expected):
                assert torch.equal(got, want) and got.dtype == torch.float32
            compiled = torch.compile(evaluate, fullgraph=True, backend="eager")(x)
            torch.testing.assert_close(compiled, expected)
    base = perturb(rn.MixtureBase(4, num_components=2))
    expected = base().log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base().log_prob(x), expected)
        with pytest.raises(TypeError, match=r"parameters of torch.float32; got values of torch.float64"):
            f(x.double())


def test_shapes_are_found_without_memory():
    for f in (rn.InvertibleLinear(4), rn.TriangularAffine(4), rn.real_nvp(4)):
        assert f.to("meta")(torch.empty(5, 4, device="meta")).shape == (5, 4)
    assert rn.MixtureBase(4, num_components=2).to("meta")().event_shape == (4,)


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
