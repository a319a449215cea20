# SPDX-License-Identifier: Apache-2.0
"""The contract of bijections beyond the laws: contexts, subclasses, values that do not fit."""

import inspect

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import make_flow, perturb, small, table
from pyro.distributions.conditional import ConditionalComposeTransformModule

import pyro_realnvp as rn
from pyro_realnvp.bijections.shapes import sum_events


def test_a_context_passes_by_what_takes_none():
    standardize, flow, c = rn.Standardize(2), rn.real_nvp(2, context_dim=3), torch.randn(5, 3)
    assert standardize.condition(c) is standardize
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    d = dist.ConditionalTransformedDistribution(base, [flow, standardize.inv]).condition(c)
    assert d.batch_shape == (5,) and d.log_prob(d.sample()).shape == (5,)


def test_the_inverse_of_a_replica_is_its_own():
    """As DataParallel makes them: a shallow copy, whose parameters are those of another device."""
    f = perturb(rn.real_nvp(2))
    x = f.inv(torch.ones(2))
    replica = f._replicate_for_data_parallel()
    replica.parts = perturb(rn.real_nvp(2)).parts
    assert replica.inv.bijection is replica and f.inv.bijection is f
    torch.testing.assert_close(replica.inv(replica(x)), x)


def test_all_of_pyros_ways_to_pass_a_context():
    """An idiom of Pyro's users, and its two classes, with bijections and transforms that do and do not take one."""
    base, c = dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.randn(5, 3)
    affine = rn.Standardize(2).fit(torch.randn(9, 2)).inv
    parts = [T.Spline(2), perturb(small(2, context_dim=3)), affine, small(2), T.conditional_spline(2, 3)]
    given = [part.condition(c) if hasattr(part, "condition") else part for part in parts]
    y = dist.TransformedDistribution(base, given).sample((5,))
    log_p, value = 0.0, y
    for part in reversed(given):
        x = part.inv(value)
        log_p = log_p - sum_events(part.log_abs_det_jacobian(x, value), 1 - part.domain.event_dim)
        value = x
    log_p = log_p + base.log_prob(value)
    whole = ConditionalComposeTransformModule(parts).condition(c)
    for d in (
        dist.TransformedDistribution(base, given),
        dist.ConditionalTransformedDistribution(base, parts).condition(c),
        dist.TransformedDistribution(base, [whole]),
    ):
        torch.testing.assert_close(d.log_prob(y), log_p, atol=1e-3, rtol=1e-3)


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


@pytest.mark.slow
def test_a_layer_of_ones_own_is_initialized_by_the_first_batch():
    class Center(rn.Bijection):
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

    class NoBranch(Center):
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
        (center,) = [m for m in flow.modules() if isinstance(m, Center)]
        assert ((center.mu - 50).abs() < 1).all() and history.loss[0] < 10


@table(
    ("make", "error", "message"),
    {
        "event shape": (
            lambda: rn.real_nvp(3)(torch.zeros(5, 4)),
            ValueError,
            r"expected event shape \(3,\); got shape \(5, 4\)",
        ),
        "integers": (lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.int64)), TypeError, "floating-point"),
        "half precision": (
            lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.float16)),
            TypeError,
            "parameters of torch.float32",
        ),
        "other precision": (
            lambda: rn.real_nvp(3)(torch.zeros(5, 3, dtype=torch.float64)),
            TypeError,
            "parameters of torch.float32",
        ),
        "other device": (lambda: rn.real_nvp(3)(torch.zeros(5, 3, device="meta")), ValueError, "values on meta"),
        "list": (lambda: rn.real_nvp(3)([0.0, 0.0, 0.0]), TypeError, "expected a tensor"),
        "no context": (
            lambda: rn.real_nvp(3, context_dim=2)(torch.zeros(3)),
            ValueError,
            "context of width 2; got none",
        ),
        "context shape": (
            lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(3)),
            ValueError,
            r"\(..., 2\); got shape \(3,\)",
        ),
        "context precision": (
            lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(2).double()),
            TypeError,
            "context of torch.float64",
        ),
        "context does not broadcast": (
            lambda: rn.real_nvp(3, context_dim=2).condition(torch.zeros(4, 2))(torch.zeros(5, 3)),
            ValueError,
            "broadcasts",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_signs_and_cdfs():
    x, normal = torch.tensor([0.2, 0.7]), torch.distributions.Normal(0.0, 1.0)
    logistic_normal = torch.distributions.TransformedDistribution(normal, [rn.Logit(0).inv])
    torch.testing.assert_close(logistic_normal.cdf(x), normal.cdf(x.logit()))
    decreasing = rn.Compose([torch.distributions.transforms.AffineTransform(0.0, -1.0), rn.Logit(0).inv])
    assert decreasing.sign == decreasing.inv.sign == -1
    torch.testing.assert_close(
        torch.distributions.TransformedDistribution(normal, [decreasing]).cdf(x), normal.cdf(x.logit())
    )
    for f in (rn.ActNorm(2), rn.Standardize(2), rn.TriangularAffine(2, full=False), rn.Unbound([0.0], [1.0])):
        assert f.sign == f.inv.sign == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_has_no_sign_can_be_inspected_traced_and_compiled():
    for f in (small(2), rn.TriangularAffine(2), small(2).inv):
        assert not hasattr(f, "sign") and inspect.getmembers(f)

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = make_flow()

        def forward(self, x):
            return self.flow().log_prob(x)

    score, x = Score(), torch.randn(5, 2)
    torch.testing.assert_close(torch.jit.trace(score, (x,))(2 * x), score(2 * x))
    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), score(x))


class Options(rn.Bijection):
    def __init__(self):
        super().__init__((2,))
        self.by, self.mode = [1.0], "plus"

    def forward_and_ladj(self, x, context=None):
        return x + (self.by[0] if self.mode == "plus" else -self.by[0]), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - (self.by[0] if self.mode == "plus" else -self.by[0]), y.new_zeros(y.shape[:-1])


def test_a_changed_layer_hook_or_option_is_noticed():
    x = torch.randn(3, 2)
    f = perturb(rn.real_nvp(2, num_couplings=2, activation=torch.nn.LeakyReLU))
    net = f.parts[0].conditioner
    changes = [
        lambda: setattr(net.activation, "negative_slope", 3.0),
        lambda: net.first.register_forward_hook(lambda layer, args, out: 2 * out),
    ]
    for change in changes:
        y = f(x)
        change()
        torch.testing.assert_close(f.inv(y), f.inverse_and_ladj(y)[0])
    g = Options()
    for change in (
        lambda: setattr(g, "mode", "minus"),
        lambda: setattr(g, "by", [5.0]),
        lambda: g.by.__setitem__(0, 7.0),
    ):
        y = g(x)
        change()
        torch.testing.assert_close(g.inv(y), g.inverse_and_ladj(y)[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x)
    torch.testing.assert_close(f.log_abs_det_jacobian(x, y), f.forward_and_ladj(x)[1])
