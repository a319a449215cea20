# SPDX-License-Identifier: Apache-2.0
"""Compose: its behavior beyond the laws that all bijections obey."""

import copy
import math

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import perturb, table
from torch import nn
from torch.autograd import forward_ad

import pyro_realnvp as rn
from pyro_realnvp import masks


def test_compose_takes_everything_apart():
    spline = T.Spline(3)
    f = rn.Compose(
        [
            T.ComposeTransform([T.AffineTransform(1.0, 2.0), T.permute(3)]),
            spline.inv,
            T.ComposeTransformModule([rn.real_nvp(3, num_couplings=2), T.Householder(3)]),
            T.SigmoidTransform(),
        ]
    )
    assert {id(p) for p in spline.parameters()} <= {id(p) for p in f.parameters()}
    assert sum(isinstance(module, rn.Permute) for module in f.modules()) == 1
    assert f.event_shape == (3,)
    assert f.codomain.check(f(torch.randn(5, 3))).all()
    x = torch.randn(5, 3)
    torch.testing.assert_close(f.inv(f(x).clone()), x, atol=1e-3, rtol=1e-3)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [f])
    assert not d.support.check(torch.full((3,), 2.0))
    assert d.log_prob(d.sample((4,))).shape == (4,)


def test_the_constants_of_transforms_move_with_the_module():
    scale, loc = torch.full((3,), 2.0).double(), torch.arange(3.0).double()
    cdf = T.CumulativeDistributionTransform(dist.Normal(loc, scale))
    f = rn.Compose([rn.real_nvp(3, num_couplings=2), T.AffineTransform(loc, scale), cdf, T.Permute(torch.arange(3))])
    x = torch.randn(5, 3)
    y = f.float()(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, cdf(x * 2 + torch.arange(3.0)))
    torch.testing.assert_close(f.inv(y.clone()), x, atol=1e-3, rtol=1e-3)
    assert f.double()(x.double()).dtype == torch.float64
    affine = rn.Compose([T.AffineTransform(loc, scale)])
    assert copy.deepcopy(affine).to("meta")(x.to("meta")).device.type == "meta"
    assert affine(x).device.type == "cpu"


def test_compose_of_nothing_is_the_identity():
    f, x = rn.Compose([]), torch.randn(3)
    assert f(x) is x
    assert torch.equal(f.log_abs_det_jacobian(x, x), torch.zeros(3))


def test_a_part_may_return_one_log_determinant_for_all_rows():
    class Shift(rn.Bijection):
        def forward_and_ladj(self, x, context=None):
            return x + 1, x.new_zeros(())

        def inverse_and_ladj(self, y, context=None):
            return y - 1, y.new_zeros(())

    f, x = rn.Compose([Shift((2,)), Shift((2,))]), torch.randn(5, 2)
    for direction in (f.forward_and_ladj, f.inverse_and_ladj):
        assert direction(x)[1].shape == (5,)

    class Double(rn.Bijection):
        def forward_and_ladj(self, x, context=None):
            return 2 * x, x.new_tensor(2 * math.log(2))

    assert math.isclose(
        rn.Compose([Double((2,))], event_shape=(4, 2)).forward_and_ladj(torch.zeros(3, 4, 2))[1][0].item(),
        8 * math.log(2),
        rel_tol=1e-6,
    )


def test_a_transform_with_a_log_determinant_for_each_entry_of_its_events():
    """Torch's StackTransform says that its events have one axis, and sums over none."""
    stack = T.StackTransform([T.ExpTransform(), T.identity_transform, T.SigmoidTransform()], dim=-1)
    f, x = rn.Compose([rn.Permute(torch.tensor([2, 0, 1])), stack]).double(), torch.randn(5, 3).double()
    truth = torch.stack([torch.autograd.functional.jacobian(f, row).slogdet()[1] for row in x])
    torch.testing.assert_close(f.forward_and_ladj(x)[1], truth)
    torch.testing.assert_close(f.inverse_and_ladj(f(x))[1], -truth)


def log_dets(f, x):
    return torch.stack([torch.autograd.functional.jacobian(f, row).flatten(0, -2).slogdet()[1] for row in x])


def _cdf(loc, scale):
    return T.CumulativeDistributionTransform(torch.distributions.Normal(loc, scale))


SHEAR = torch.tensor([[2.0, 0.0], [1.0, 0.5]])


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (lambda: T.IndependentTransform(T.AffineTransform(torch.zeros(4), torch.tensor(2.0), event_dim=1), 0), 0),
        (lambda: T.IndependentTransform(T.ELUTransform(), 1), 0),
        (lambda: T.IndependentTransform(T.AffineTransform(nn.Parameter(torch.zeros(4)), torch.tensor(2.0)), 1), 1),
        (lambda: T.AffineTransform(0.0, nn.Parameter(torch.tensor(2.0)), event_dim=1), 1),
        (lambda: T.CatTransform([T.Spline(2), T.LowerCholeskyAffine(torch.zeros(2), SHEAR.double())], -1, [2, 2]), 4),
        (
            lambda: T.CatTransform(
                [rn.real_nvp(3, num_couplings=2), T.AffineTransform(0.0, torch.tensor(2.0))], -1, [3, 1]
            ),
            12,
        ),
        (
            lambda: T.CatTransform(
                [T.AffineTransform(0.0, torch.tensor(2.0), event_dim=1), T.ELUTransform()], -1, [3, 1]
            ),
            0,
        ),
        (
            lambda: T.StackTransform(
                [T.ELUTransform(), *(T.AffineTransform(nn.Parameter(torch.ones(())), 2.0) for _ in range(3))], -1
            ),
            3,
        ),
        (lambda: T.LowerCholeskyAffine(nn.Parameter(torch.zeros(4)), torch.eye(4).double()), 1),
        (lambda: T.ComposeTransform([T.ExpTransform(), T.PowerTransform(nn.Parameter(torch.tensor(2.0)))]), 1),
        (lambda: _cdf(nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))), 2),
    ],
)
@pytest.mark.parametrize("inverted", [False, True])
def test_what_torchs_wrappers_hold(make, trained, inverted):
    """Torch counts one scale for all entries once; what its wrappers hold is trained, saved and called functionally."""
    f = rn.Compose([make().inv if inverted else make()], event_shape=(4,)).double()
    parameters = list(f.parameters())
    assert len(parameters) == trained
    perturb(f)
    x = torch.randn(5, 4).double()
    x = f.inv(x.abs()) if inverted else x
    y, ladj = f.forward_and_ladj(x)
    torch.testing.assert_close(f.inv(y), x)
    assert f.codomain.check(y).all()
    assert f.domain.check(x).all()
    torch.testing.assert_close(ladj, log_dets(f, x))
    other = perturb(copy.deepcopy(f)) if trained else f
    assert torch.equal(other(x), y) is not bool(trained)
    torch.testing.assert_close(torch.func.functional_call(f, dict(other.named_parameters()), x), other(x))
    f.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(f(x), other(x))


def test_an_affine_transform_with_more_batch_axes_than_its_input():
    f = rn.Compose([T.AffineTransform(torch.zeros(5, 3), torch.full((5, 3), 2.0), event_dim=1)])
    y, ladj = f.forward_and_ladj(torch.ones(3))
    torch.testing.assert_close((y, ladj), (torch.full((5, 3), 2.0), torch.full((5,), 3 * math.log(2))))
    torch.testing.assert_close(f.inverse_and_ladj(torch.ones(3))[1], torch.full((5,), -3 * math.log(2)))


def test_a_stack_of_transforms_with_events_is_refused():
    with pytest.raises(ValueError, match="expected a StackTransform of elementwise transforms"):
        rn.Compose([T.StackTransform([rn.real_nvp(2), rn.real_nvp(2)], dim=-2)])


def test_compose_sums_elementwise_parts_over_the_event():
    x = torch.rand(5, 2) + 0.5
    f = rn.Compose([T.ExpTransform().inv, rn.Permute(torch.tensor([1, 0]))])
    torch.testing.assert_close(f.forward_and_ladj(x)[1], -x.log().sum(-1))
    torch.testing.assert_close(f.inverse_and_ladj(f(x))[1], x.log().sum(-1))


@pytest.mark.parametrize(
    ("part", "event_shape"),
    [(rn.Logit, (2,)), (lambda: T.Spline(1), (1,)), (lambda: T.Spline(2), (3, 2)), (lambda: rn.real_nvp(2), (3, 2))],
    ids=["logit", "spline", "spline with another axis", "couplings with another axis"],
)
def test_log_determinants_are_summed_over_the_declared_events(part, event_shape):
    f = perturb(rn.Compose([part()], event_shape=event_shape)).double()
    x = torch.rand(5, *event_shape, dtype=torch.float64)
    assert f.domain.event_dim == f.codomain.event_dim == len(event_shape)
    assert rn.check_bijection(f, x).passed
    flow = rn.Flow(f.inv)
    jacobians = torch.stack([torch.func.jacrev(f)(one).reshape(one.numel(), -1) for one in x])
    normal = dist.Normal(0.0, 1.0).expand(event_shape).to_event(len(event_shape))
    torch.testing.assert_close(flow().log_prob(x), normal.log_prob(f(x)) + jacobians.det().abs().log())
    assert flow().event_shape == event_shape


def test_all_vectors_of_an_event_get_the_context_of_the_event():
    f = perturb(rn.real_nvp(2, num_couplings=2, context_dim=3))
    x, context = torch.randn(4, 4, 2), torch.randn(4, 3)
    y, ladj = f.forward_and_ladj(x, context[:, None])
    for inverse in (False, True):
        stack = rn.Compose([f.inv if inverse else f], event_shape=(4, 2)).condition(context)
        stack = stack.inv if inverse else stack
        torch.testing.assert_close(stack(x), y)
        torch.testing.assert_close(stack.log_abs_det_jacobian(x, y), ladj.sum(-1))
    log_p = dist.Normal(0.0, 1.0).expand((4, 2)).to_event(2).log_prob(x) - ladj.sum(-1)
    torch.testing.assert_close(rn.Flow(f, event_shape=(4, 2))(context).log_prob(y), log_p)


@pytest.mark.parametrize("batch_shape", [(), (3,)])
def test_tangents_have_the_dtype_of_the_flow(batch_shape):
    """Torch makes float64 of the tangent of a number plus a tensor without axes, as a single log-determinant is."""
    flow, x = rn.Flow(perturb(rn.real_nvp(2, num_couplings=2))), torch.randn(*batch_shape, 2)
    direction = torch.randn_like(x)
    score, slope = torch.func.jvp(lambda x: flow().log_prob(x), (x,), (direction,))
    assert score.dtype == slope.dtype == torch.float32
    gradient = torch.func.grad(lambda x: flow().log_prob(x).sum())(x)
    torch.testing.assert_close(slope, (gradient * direction).sum(-1))
    with forward_ad.dual_level():
        dual = flow().log_prob(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)


def test_a_part_with_a_context_gets_it():
    f = rn.Compose([rn.real_nvp(2, context_dim=3), rn.ActNorm(2), rn.real_nvp(2, context_dim=3)])
    assert f.context_dim == 3
    assert f.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)
    assert f.inv.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)


def test_a_stack_prints_its_parts_by_kind():
    f = rn.Compose([rn.real_nvp(2, between=rn.InvertibleLinear), T.Spline(2), rn.Standardize(2).inv])
    assert repr(f) == "Compose(16 x AffineCoupling, 15 x InvertibleLinear, Spline, Standardize.inv)"
    assert repr(f.inv) == repr(f) + ".inv"
    assert repr(rn.Compose([f.inv])).startswith("Compose(16 x AffineCoupling.inv, ")
    assert repr(rn.Compose([])) == "Compose()"
    images = rn.image_real_nvp((1, 16, 16), num_scales=2)
    assert repr(images) == "Compose(10 x ActNorm, 10 x AffineCoupling, Squeeze, Squeeze.inv, FactorOut).inv"
    conditional = rn.Compose([rn.real_nvp(2, num_couplings=2, context_dim=1).condition(torch.zeros(1))])
    assert repr(conditional) == "Compose(2 x AffineCoupling)"


def coupling(dim):
    mask = masks.half(dim)
    return rn.AffineCoupling(mask, rn.MLP(mask.num_kept, 2 * mask.num_changed))


def test_a_stack_may_leave_entries_unchanged_if_it_is_said_to():
    f, x = perturb(coupling(4)), torch.randn(5, 4)
    torch.testing.assert_close(rn.Compose([f, f.inv], allow_unchanged=True)(x), x)
    left = rn.Compose([rn.FactorOut(masks.half(4), rn.real_nvp(2))], allow_unchanged=True)
    right = rn.Compose([rn.FactorOut(masks.half(4, 1), rn.real_nvp(2))], allow_unchanged=True)
    with pytest.raises(ValueError, match=r"never changes entries \[0, 1\] .* allow_unchanged=True"):
        rn.Compose([left, left])
    assert rn.Compose([left, right])(x).shape == (5, 4)


@table(
    ("make", "error", "message"),
    {
        "parts do not fit": (
            lambda: rn.Compose([coupling(3), coupling(4)]),
            ValueError,
            r"part 1 does not fit.*expected event shape \(4,\)",
        ),
        "function": (lambda: rn.Compose([torch.exp]), TypeError, "expected transforms"),
        "not bijective": (lambda: rn.Compose([T.AbsTransform()]), ValueError, "bijective"),
        "conditional part of Pyro's": (
            lambda: rn.Compose([T.conditional_spline(2, 3)]),
            TypeError,
            "give it a context first",
        ),
        "two widths of context": (
            lambda: rn.Compose([rn.real_nvp(2, context_dim=c) for c in (2, 3)]),
            ValueError,
            "one width of context",
        ),
        "unchanged entries": (
            lambda: rn.Compose(
                [rn.AffineCoupling(masks.checkerboard(1), rn.ConvResNet(2, 4)) for _ in range(2)], event_shape=(1, 8, 8)
            ),
            ValueError,
            "never changes entries .* and 22 more",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "space"),
    [
        (
            lambda: rn.Compose([T.ReshapeTransform((2, 2), (4,)), rn.real_nvp(4), T.ReshapeTransform((4,), (2, 2))]),
            dist.Normal(0.0, 1.0).expand([2, 2]),
        ),
        (
            lambda: rn.Compose([rn.real_nvp(4), T.ReshapeTransform((4,), (1, 2, 2)), rn.ActNorm(1, event_dim=3)]),
            dist.Normal(0.0, 1.0).expand([4]),
        ),
        (
            lambda: rn.Compose([T.StickBreakingTransform().inv, rn.real_nvp(3), T.StickBreakingTransform()]),
            dist.Dirichlet(torch.ones(4)),
        ),
    ],
)
def test_transforms_that_change_the_shape_before_and_after_couplings(make, space):
    f, x = perturb(make()).double().eval(), space.sample((5,)).double()
    torch.testing.assert_close(f.inv(f(x)), x, atol=1e-5, rtol=1e-5)


def test_unchanged_entries_are_seen_through_a_reshape():
    mask = masks.half(4)
    couplings = [rn.AffineCoupling(mask, rn.MLP(2, 4)), T.ReshapeTransform((4,), (2, 2))]
    couplings += [T.ReshapeTransform((2, 2), (4,)), rn.AffineCoupling(mask, rn.MLP(2, 4))]
    with pytest.raises(ValueError, match="never changes entries"):
        rn.Compose(couplings)
