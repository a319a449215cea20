# SPDX-License-Identifier: Apache-2.0
"""Permute, InvertibleLinear, ActNorm, BatchNorm, Standardize, Compose: what each does beside the laws."""

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from registry import perturb

import pyro_realnvp as rn
from pyro_realnvp import masks


def test_linear_is_a_matrix():
    f = perturb(rn.InvertibleLinear(4, permutation=torch.tensor([2, 0, 3, 1])).double(), 0.5)
    matrix = f(torch.eye(4, dtype=torch.float64)).T
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(f(x), x @ matrix.T)
    torch.testing.assert_close(f.log_abs_det_jacobian(x, f(x)), torch.linalg.slogdet(matrix).logabsdet.expand(5))


def test_actnorm_normalises_what_initialises_it():
    x = torch.randn(2000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 10.0, -3.0])
    for f in (rn.ActNorm(3).initialize(x), rn.ActNorm(3)):
        y = f(x)  # the second is initialised by this pass
        torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(y.std(0), torch.ones(3), atol=1e-3, rtol=0)
    x[:, 1] = 7.0
    y = rn.ActNorm(3).initialize(x)(x)
    assert torch.equal(y[:, 1], torch.zeros(2000))  # a constant column is centred, its scale stays


def test_batchnorm_converges_to_the_statistics_and_trains_through_them():
    f, x = rn.BatchNorm(2, momentum=0.5), (torch.randn(500, 2) * 3 + 4).requires_grad_()
    for _ in range(30):
        y = f(x)
    torch.testing.assert_close(f.mean, x.detach().mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(f.variance, x.detach().var(0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(f.inv(y), x, atol=1e-4, rtol=1e-4)  # exact in train mode too
    row = torch.autograd.grad(f(x)[0, 0], x)[0]
    assert row[1, 0] != 0  # through the batch's own mean and variance


def test_standardize():
    x = torch.randn(500, 3, dtype=torch.float64) * 4 + 2
    f = rn.Standardize(3).double().fit(x)
    torch.testing.assert_close(f(x), (x - x.mean(0)) / x.std(0))
    fresh = rn.Standardize(3).double()
    fresh.load_state_dict(f.state_dict())
    torch.testing.assert_close(fresh(x), f(x), rtol=0, atol=0)


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
    assert any("permutation" in key for key in f.state_dict())
    assert f.event_shape == (3,)
    assert f.codomain.check(f(torch.randn(5, 3))).all()
    x = torch.randn(5, 3)
    torch.testing.assert_close(f.inv(f(x).clone()), x, atol=1e-3, rtol=1e-3)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [f])
    assert not d.support.check(torch.full((3,), 2.0))
    assert d.log_prob(d.sample((4,))).shape == (4,)


def test_compose_of_nothing_is_the_identity():
    f, x = rn.Compose([]), torch.randn(3)
    assert f(x) is x
    assert torch.equal(f.log_abs_det_jacobian(x, x), torch.zeros(3))


def test_compose_sums_elementwise_parts_over_the_event():
    x = torch.rand(5, 2) + 0.5
    f = rn.Compose([T.ExpTransform().inv, rn.Permute(torch.tensor([1, 0]))])
    torch.testing.assert_close(f.forward_and_ladj(x)[1], -x.log().sum(-1))
    torch.testing.assert_close(f.inverse_and_ladj(f(x))[1], x.log().sum(-1))


def test_a_part_with_a_context_gets_it():
    f = rn.Compose([rn.real_nvp(2, context_dim=3), rn.ActNorm(2), rn.real_nvp(2, context_dim=3)])
    assert f.context_dim == 3
    assert f.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)
    assert f.inv.condition(torch.randn(4, 3))(torch.zeros(2)).shape == (4, 2)


def coupling(dim):
    mask = masks.half(dim)
    return rn.AffineCoupling(mask, rn.MLP(mask.num_kept, 2 * mask.num_changed))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: rn.Compose([coupling(3), coupling(4)]),
            ValueError,
            r"part 1 does not fit.*expected event shape \(4,\)",
        ),
        (lambda: rn.Compose([torch.exp]), TypeError, "expected transforms"),
        (lambda: rn.Compose([T.AbsTransform()]), ValueError, "bijective"),
        (lambda: rn.Compose([T.conditional_spline(2, 3)]), TypeError, "give it a context first"),
        (lambda: rn.Compose([rn.real_nvp(2, context_dim=c) for c in (2, 3)]), ValueError, "one width of context"),
        (lambda: rn.Permute(torch.tensor([0, 0, 1])), ValueError, "each of 0, ..., D - 1 once"),
        (lambda: rn.InvertibleLinear(3, permutation=torch.tensor([1, 0])), ValueError, "expected event shape"),
        (lambda: rn.Standardize(2).fit(torch.ones(5, 2)), ValueError, r"columns \[0, 1\] are constant"),
        (lambda: rn.Standardize(2).fit(torch.ones(1, 2)), ValueError, "at least two rows"),
        (lambda: rn.Standardize(2).fit(torch.ones(5, 3)), ValueError, "of 2 columns"),
        (lambda: rn.Standardize(2).fit(torch.tensor([[1.0, torch.nan], [0, 0]])), ValueError, "nan or inf in 1 of 2"),
        (lambda: rn.ActNorm(2).initialize(torch.full((3, 2), torch.inf)), ValueError, "nan or inf"),
        (lambda: rn.BatchNorm(2, momentum=1.0), ValueError, "momentum"),
        (lambda: rn.BatchNorm(2, eps=0.0), ValueError, "eps > 0"),
        (lambda: rn.real_nvp(1), ValueError, "Spline"),
        (lambda: rn.real_nvp(2.5), TypeError, "integer"),
        (lambda: rn.real_nvp(3, mask_cycle=[]), ValueError, r"masks of events of shape \(3,\)"),
        (lambda: rn.real_nvp(3, mask_cycle=[masks.half(2), masks.half(2, 1)]), ValueError, r"got \[\(2,\), \(2,\)\]"),
        (lambda: rn.real_nvp(3, num_couplings=1), ValueError, "num_couplings >= 2"),
        (lambda: rn.real_nvp(3)(torch.zeros(5, 4)), ValueError, r"expected event shape \(3,\); got shape \(5, 4\)"),
        (lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.float16)), TypeError, "parameters of torch.float32"),
        (lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.float64)), TypeError, "parameters of torch.float32"),
        (lambda: rn.real_nvp(3)(torch.zeros(5, 3, device="meta")), ValueError, "values on meta"),
        (lambda: rn.real_nvp(3)([0.0, 0.0, 0.0]), TypeError, "expected a tensor"),
        (lambda: rn.real_nvp(3, context_dim=2)(torch.zeros(3)), ValueError, "context of width 2; got none"),
        (lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(3)), ValueError, r"\(..., 2\); got shape \(3,\)"),
        (
            lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(2).double()),
            TypeError,
            "context of torch.float64",
        ),
        (
            lambda: rn.real_nvp(3, coupling=rn.AdditiveCoupling, max_log_scale=1.0),
            ValueError,
            "no option .*max_log_scale",
        ),
        (
            lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(4, 2))(torch.zeros(5, 3)),
            ValueError,
            "broadcasts",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_context_passes_by_what_takes_none():
    standardize, flow, c = rn.Standardize(2), rn.real_nvp(2, context_dim=3), torch.randn(5, 3)
    assert standardize.condition(c) is standardize
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    d = dist.ConditionalTransformedDistribution(base, [flow, standardize.inv]).condition(c)
    assert d.batch_shape == (5,) and d.log_prob(d.sample()).shape == (5,)


def test_a_subclass_may_declare_its_own_domain_and_take_a_context():
    class Exp(rn.Bijection):
        """y = exp(x c), whose codomain is declared in the class and whose context needs no decorator."""

        elementwise = True
        codomain = torch.distributions.constraints.independent(torch.distributions.constraints.positive, 1)

        def forward_and_ladj(self, x, context=None):
            y = (x * context).exp()
            return y, (x * context + context.log()).sum(-1)

        def inverse_and_ladj(self, y, context=None):
            x = y.log() / context
            return x, -(y.log() + context.log()).sum(-1)

    f = Exp((2,), context_dim=2)
    assert f.codomain is Exp.codomain and f.inv.domain is Exp.codomain and f.domain.event_dim == 1
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    d = dist.ConditionalTransformedDistribution(base, [f]).condition(torch.full((3, 2), 2.0))
    expected = dist.LogNormal(torch.zeros(2), 2.0).to_event(1).expand((3,))
    y = d.sample()
    torch.testing.assert_close(d.log_prob(y), expected.log_prob(y))


def test_a_layer_of_ones_own_is_initialized_by_the_first_batch():
    class Centre(rn.Bijection):
        """y = x - mu, where mu comes from the first batch."""

        elementwise = True

        def __init__(self, dim):
            super().__init__((dim,))
            self.register_buffer("mu", torch.full((dim,), torch.nan))

        @property
        def needs_data(self):
            return bool(self.mu.isnan().any())

        def forward_and_ladj(self, x, context=None):
            if self.training and self.needs_data:
                self.mu.copy_(x.detach().mean(0))
            return x - self.mu, x.new_zeros(x.shape[:-1])

        def inverse_and_ladj(self, y, context=None):
            return y + self.mu, y.new_zeros(y.shape[:-1])

    class NoBranch(Centre):
        """Compiled steps come after the initialization, which would branch on values."""

        def forward_and_ladj(self, x, context=None):
            return (
                super().forward_and_ladj(x, context)
                if not torch.compiler.is_compiling()
                else (x - self.mu, x.sum(-1) * 0)
            )

    for compiled in (False, "default"):
        flow = rn.Flow(rn.Compose([rn.real_nvp(2, num_couplings=2, hidden_dims=(8,)), NoBranch(2).inv]))
        history = rn.fit(flow, torch.randn(300, 2) + 50, num_steps=3, compile=compiled, progress=False)
        (centre,) = [m for m in flow.modules() if isinstance(m, Centre)]
        assert ((centre.mu - 50).abs() < 1).all() and history.loss[0] < 10
