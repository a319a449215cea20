# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import small, table

import pyro_realnvp as rn


def test_standardize():
    x = torch.randn(500, 3, dtype=torch.float64) * 4 + 2
    f = rn.Standardize(3).double().fit(x)
    torch.testing.assert_close(f(x), (x - x.mean(0)) / x.std(0))
    fresh = rn.Standardize(3).double()
    fresh.load_state_dict(f.state_dict())
    torch.testing.assert_close(fresh(x), f(x), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.05, 1e-6, 0.0])
def test_logit_is_the_closed_form(alpha):
    f = rn.Logit(alpha)
    x = torch.tensor([0.0, 1e-7, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-3, 1 - 2**-24, 1.0], dtype=torch.float64)
    u = alpha + (1 - 2 * alpha) * x
    y, ladj = f.forward_and_ladj(x)
    expected = torch.log(u) - torch.log(alpha + (1 - 2 * alpha) * (1 - x))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(y, -f(1 - x), rtol=1e-6, atol=1e-9)  # symmetric
    inner = slice(1, -1)
    exact = torch.log((1 - 2 * alpha) / (u * (1 - u)))
    torch.testing.assert_close(ladj[inner], exact[inner], rtol=1e-6, atol=1e-9)
    in_float32 = f(x.float())
    torch.testing.assert_close(in_float32[inner].double(), f(x.float().double())[inner], rtol=1e-5, atol=1e-6)
    if alpha:
        assert y.isfinite().all() and f.inv.domain.check(y).all()
    else:
        assert y[0] == -torch.inf and y[-1] == torch.inf


def test_logit_reaches_a_little_beyond_and_says_so():
    f = rn.Logit(0.05)
    far = torch.tensor([-1e3, -20.0, 20.0, 1e3])
    x = f.inv(far)
    assert f.domain.check(x).all() and f.domain.check(torch.tensor([0.0, 1.0])).all()
    torch.testing.assert_close(x[[0, -1]], torch.tensor([-0.05 / 0.9, 0.95 / 0.9]))
    low, high = (x.new_tensor(bound) for bound in (f.domain.lower_bound, f.domain.upper_bound))
    assert low < x[0] and x[-1] < high  # but only by rounding
    assert f.log_abs_det_jacobian(x, far).isfinite().all()  # the pair is remembered
    assert not f.domain.check(torch.tensor(1.06))
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [f.inv])
    assert d.support.check(torch.tensor(1.05)) and not d.support.check(torch.tensor(1.06))
    grid = torch.linspace(-0.0555, 1.0555, 20001)
    assert torch.trapezoid(d.log_prob(grid).exp(), grid) == pytest.approx(1.0, abs=1e-3)


def beyond(f, bad, what):
    """A bijection, an input of which one entry lies beyond a bound, and the words of the error."""
    message = f"expected values in {what}; got 1 of 4 beyond it, such as {bad:g}"
    return f, torch.tensor([[0.5, bad], [0.5, 0.5]]), message


bounded = rn.Compose([small(2, context_dim=1), rn.Logit().inv])


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        beyond(rn.Logit(0.25), 2.0, r"Interval\(lower_bound=-0.5, upper_bound=1.5\)"),
        beyond(rn.Logit().inv.inv, -0.1, r"Interval\(.*\)"),
        beyond(rn.Unbound([-torch.inf, 0.0], [1.0, torch.inf]), -2.0, r"Box\(\[-inf, 0.0\], \[1.0, inf\]\)"),
        beyond(bounded.condition(torch.zeros(1)).inv, 2.0, r"Interval\(.*\)"),
        beyond(rn.Compose([dist.transforms.ExpTransform()]).inv, -1.0, r"GreaterThan\(.*\)"),
    ],
    ids=["logit", "view of its inverse", "unbound", "conditioned stack", "pyro's"],
)
def test_a_value_beyond_the_bounds_is_refused(f, x, message):
    with pytest.raises(ValueError, match=message):
        f(x)
    assert f(torch.full_like(x, torch.nan)).isnan().all()  # as in every bijection
    assert torch.vmap(f)(x).isnan().any()  # where values cannot be looked at
    with pyro.validation_enabled(False):
        assert f(x.clone()).isnan().any()


@table(
    ("make", "error", "message"),
    {
        "constant columns": (
            lambda: rn.Standardize(2).fit(torch.ones(5, 2)),
            ValueError,
            r"columns \[0, 1\] are constant",
        ),
        "negative weights": (
            lambda: rn.Standardize(1).fit(torch.randn(3, 1), torch.tensor([1.0, -1.0, 1.0])),
            ValueError,
            "none of them negative, .* got 3, 1 of them bad, and 2 above 0",
        ),
        "infinite weights": (
            lambda: rn.Standardize(1).fit(torch.randn(3, 1), torch.tensor([1.0, torch.inf, 1.0])),
            ValueError,
            "1 of them bad",
        ),
        "no weights": (lambda: rn.Standardize(1).fit(torch.randn(3, 1), torch.zeros(3)), ValueError, "and 0 above 0"),
        "too few weights": (
            lambda: rn.Standardize(1).fit(torch.randn(3, 1), torch.ones(2)),
            ValueError,
            "a weight for each of the 3 rows",
        ),
        "one row": (lambda: rn.Standardize(2).fit(torch.ones(1, 2)), ValueError, "at least two rows"),
        "other columns": (lambda: rn.Standardize(2).fit(torch.ones(5, 3)), ValueError, "of 2 columns"),
        "nan": (
            lambda: rn.Standardize(2).fit(torch.tensor([[1.0, torch.nan], [0, 0]])),
            ValueError,
            "nan or inf in 1 of 2",
        ),
        "alpha one half": (lambda: rn.Logit(0.5), ValueError, "alpha < 1/2"),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("fill", [1e4, 1e19, 3e19, 3e38, torch.nan])
def test_a_row_without_weight_sets_no_scale(fill):
    """Beside it, the squares of all others were 0: the standard deviation was wrong, or the column seemed constant."""
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) * 0.003
    weights = torch.ones(100)
    weights[0] = 0
    expected = rn.Standardize(1).fit(x[1:])
    x[0] = fill
    torch.testing.assert_close(rn.Standardize(1).fit(x, weights).std, expected.std)
    for weight in (1e-50, 1e300):  # which single precision does not hold
        torch.testing.assert_close(rn.Standardize(1).fit(x, weight * weights.double()).std, expected.std)
