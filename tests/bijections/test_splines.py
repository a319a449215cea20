# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from helpers import perturb
from pyro.distributions.transforms.spline import ConditionedSpline

import pyro_realnvp as rn
from pyro_realnvp import masks
from pyro_realnvp.bijections.splines import rational_quadratic


def raw_of(widths, heights, slopes):
    """The parameters that give bins of these widths and heights, in shares of 2, and slopes between them."""
    least = 0.1 / len(widths)
    shares = [(torch.tensor(one, dtype=torch.float64) / 2 - least) / 0.9 for one in (widths, heights)]
    raw_slopes = [10 / math.pi * math.tan(math.pi / 10 * math.log(slope)) for slope in slopes]
    return torch.cat([*(share.log() for share in shares), torch.tensor(raw_slopes, dtype=torch.float64)])


def spline(x, raw, **options):
    return rational_quadratic(x, raw.expand(*x.shape, -1), 1.0, 5.0, **options)


def test_values_and_slopes_at_the_knots():
    raw = raw_of([0.5, 0.7, 0.8], [1.0, 0.4, 0.6], [3.0, 0.2])
    x = torch.tensor([-1.5, -0.5, 0.2, 0.9999999, 1.0, 2.0], dtype=torch.float64)
    y, log_slope = spline(x, raw)
    expected = torch.tensor([-1.5, 0.0, 0.4, 1.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)
    expected = torch.tensor([1.0, 3.0, 0.2, 1.0, 1.0, 1.0], dtype=torch.float64).log()
    torch.testing.assert_close(log_slope, expected, atol=1e-5, rtol=0)


def test_formula_of_the_paper_between_knots():
    """Eqs. 4 and 5 at xi = 1/2 of the middle bin."""
    y, log_slope = spline(
        torch.tensor([-0.15], dtype=torch.float64), raw_of([0.5, 0.7, 0.8], [1.0, 0.4, 0.6], [3, 0.2])
    )
    s, d0, d1 = 0.4 / 0.7, 3.0, 0.2
    denominator = s + (d0 + d1 - 2 * s) / 4
    assert y.item() == pytest.approx(0.4 * (s / 4 + d0 / 4) / denominator)
    assert log_slope.item() == pytest.approx(math.log(s**2 * (d1 / 4 + s / 2 + d0 / 4) / denominator**2))


def test_is_pyros_spline():
    """In the middle bin, since Pyro's outer slopes are 0.999 and not 1."""
    shares = torch.tensor([[0.25, 0.35, 0.4], [0.5, 0.2, 0.3]], dtype=torch.float64)
    slopes = torch.tensor([3.0, 0.2], dtype=torch.float64)
    theirs = ConditionedSpline((*shares[:, None], slopes[None] - 1e-3, None), bound=1.0, order="quadratic")
    x = torch.linspace(-0.49, 0.19, 50, dtype=torch.float64)[:, None]
    ours, log_slope = spline(x, raw_of(*((2e-3 + (1 - 3e-3) * 2 * shares).tolist()), slopes.tolist()))
    expected = theirs(x)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(log_slope, theirs.log_abs_det_jacobian(x, expected))


@pytest.mark.parametrize("magnitude", [1.0, 1e2, 1e6])
def test_extreme_parameters_leave_it_monotone_and_invertible(magnitude):
    torch.manual_seed(0)
    raw = magnitude * torch.randn(500, 1, 23, dtype=torch.float64)
    x = torch.linspace(-5.5, 5.5, 400, dtype=torch.float64).expand(500, 400)
    y, log_slope = rational_quadratic(x, raw.expand(500, 400, 23), 5.0, 3.0)
    assert (y.diff() > 0).all() and log_slope.isfinite().all()
    assert log_slope.abs().max() < 12.0  # from the least width and height of a bin, and the slopes at its ends
    back, log_slope_back = rational_quadratic(y, raw.expand(500, 400, 23), 5.0, 3.0, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_slope_back, log_slope, atol=1e-5, rtol=1e-5)


def test_rounding_does_not_leave_a_steep_bin():
    """In single precision, a value of the inverse lay a little outside of its bin, where the slope was nan."""
    torch.manual_seed(6)
    spline = rn.Spline(1, num_bins=32)
    with torch.no_grad():
        spline.raw.copy_(6 * torch.randn_like(spline.raw))
    y = torch.linspace(-4.99, 4.99, 40_001)[:, None]
    x, ladj = spline.inverse_and_ladj(y)
    assert ladj.isfinite().all()
    torch.testing.assert_close(x.double(), spline.double().inverse_and_ladj(y.double())[0], atol=3e-3, rtol=0)


def test_a_new_flow_of_splines_is_the_identity():
    x = 3 * torch.randn(20, 5)
    flow = rn.real_nvp(5, coupling=rn.SplineCoupling)
    torch.testing.assert_close(flow(x), x)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(rn.image_real_nvp((1, 8, 8), coupling=rn.SplineCoupling)(images), images)


def test_options():
    class Fine(rn.SplineCoupling):
        num_bins = 32

    flow = rn.real_nvp(4, coupling=Fine, num_couplings=2, max_log_scale=1.0)
    assert flow.parts[0].conditioner.last.out_features == 2 * (3 * 32 - 1)
    assert flow.parts[0].max_log_scale == 1.0 and "num_bins=32" in repr(flow.parts[0])
    with pytest.raises(ValueError, match="expected bound > 0; got 0"):
        rn.SplineCoupling(masks.half(2), rn.MLP(1, 23), bound=0)
    with pytest.raises(ValueError, match="expected num_bins > 1; got 1"):
        rn.Spline(2, num_bins=1)
    with pytest.raises(ValueError, match="from its conditioner, 23 for each of the 1"):
        rn.SplineCoupling(masks.half(2), rn.MLP(1, 2))(torch.zeros(2))


@pytest.mark.slow
def test_one_entry_takes_on_two_modes():
    """The loss comes down to the entropy of 0.3 N(-2, 0.5) + 0.7 N(1, 0.3), which quadrature gives."""
    torch.manual_seed(0)
    which = (torch.rand(4000, 1) < 0.3).float()
    x = which * (-2 + 0.5 * torch.randn(4000, 1)) + (1 - which) * (1 + 0.3 * torch.randn(4000, 1))
    grid = torch.linspace(-6, 4, 4001)
    weights, locs, scales = torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 0.3])
    log_p = (torch.distributions.Normal(locs, scales).log_prob(grid[:, None]) + weights.log()).logsumexp(-1)
    entropy = -torch.trapezoid(log_p.exp() * log_p, grid).item()
    flow = rn.Flow(rn.Compose([rn.Spline(1)]))
    history = rn.fit(flow, x, validation=x, num_steps=500, lr=2e-2, progress=False)
    assert history.best_loss == pytest.approx(entropy, abs=0.04)


def test_a_conditional_spline_under_autocast_has_mass_one():
    f = perturb(rn.Spline(1, context_dim=1))
    x = torch.linspace(-8, 8, 16001)[:, None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        density, given = rn.Flow(f)(torch.ones(1)).log_prob(x).exp(), f.condition(torch.ones(1))
        torch.testing.assert_close(given.inv(given(x)), x, atol=1e-3, rtol=1e-3)
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-3)
