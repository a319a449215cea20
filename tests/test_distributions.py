# SPDX-License-Identifier: Apache-2.0
import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import make_flow, perturb, small, table
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp.distributions import FlowDistribution


def moved_flow(**options):
    return perturb(make_flow(**options))


def test_agrees_with_transformed_distribution():
    flow, x = moved_flow(), torch.randn(7, 2)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow.bijection])
    torch.testing.assert_close(flow().log_prob(x), d.log_prob(x))
    y, log_prob = flow().rsample_and_log_prob((5,))
    torch.testing.assert_close(log_prob, d.log_prob(y.detach()))
    log_prob.sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_shapes():
    flow = moved_flow(context_dim=3)
    d = flow(torch.randn(4, 3))
    assert (d.batch_shape, d.event_shape, d.event_dim) == ((4,), (2,), 1)
    assert d.has_rsample
    assert d.support.check(torch.zeros(4, 2)).all()
    assert d.expand((5, 4)).sample((6,)).shape == (6, 5, 4, 2)
    assert d.log_prob(torch.zeros(6, 1, 2)).shape == (6, 4)
    y, log_prob = d.rsample_and_log_prob((6,))
    assert (y.shape, log_prob.shape) == ((6, 4, 2), (6, 4))


def test_an_empty_batch():
    bounded = rn.Flow(rn.Compose([moved_flow().bijection, rn.Logit(0).inv], event_shape=(2,)))
    for d in (moved_flow()(), bounded(), moved_flow()(temperature=0.5)):
        assert d.log_prob(torch.zeros(0, 2)).shape == d.rsample_and_log_prob((0,))[1].shape == (0,)
    assert moved_flow(context_dim=3)(torch.zeros(0, 3)).log_prob(torch.zeros(0, 2)).shape == (0,)
    images = rn.Flow(rn.image_real_nvp((1, 4, 4), num_scales=1, hidden_channels=4, num_blocks=1))
    assert images().log_prob(torch.zeros(0, 1, 4, 4)).shape == (0,)


class Scale(rn.Bijection):
    """y = 2 x, whose log-det is one number for all rows."""

    def forward_and_ladj(self, x, context=None):
        return 2 * x, x.new_tensor(math.log(2) * x.shape[-1])

    def inverse_and_ladj(self, y, context=None):
        return y / 2, -y.new_tensor(math.log(2) * y.shape[-1])


def test_one_log_det_counts_for_each_inner_event():
    base = dist.Normal(torch.zeros(4, 3), 2.0).to_event(2)
    y = torch.randn(5, 4, 3)
    d = rn.Flow(Scale((3,)), event_shape=(4, 3))()
    torch.testing.assert_close(d.log_prob(y), base.log_prob(y))
    y, log_prob = d.rsample_and_log_prob((5,))
    torch.testing.assert_close(log_prob, base.log_prob(y))


def test_a_distribution_completes_its_base():
    f = perturb(rn.real_nvp(2))
    values = torch.randn(4, 3, 2)
    for base in (dist.Normal(torch.zeros(3, 2), 1.0), dist.Normal(torch.zeros(3, 2), 1.0).to_event(2)):
        d, plain = FlowDistribution(base, f), dist.TransformedDistribution(base, [f])
        assert (d.batch_shape, d.event_shape) == (plain.batch_shape, plain.event_shape)
        torch.testing.assert_close(d.log_prob(values), plain.log_prob(values))
    conditioned = perturb(rn.real_nvp(2, context_dim=3)).condition(torch.randn(5, 1, 3))
    d = FlowDistribution(dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), [conditioned])
    assert d.batch_shape == (5, 4)
    assert d.sample().shape == (5, 4, 2)


def test_the_transform_goes_from_data_to_base():
    flow, context = moved_flow(context_dim=3), torch.randn(4, 3)
    for d in (flow(context), flow(context).expand((5, 4))):
        y = d.sample()
        z, ladj = flow.bijection.inverse_and_ladj(y, context)
        torch.testing.assert_close(d.transform(y), z)
        torch.testing.assert_close(d.transform.inv(z), y)
        torch.testing.assert_close(d.log_prob(y), d.base_dist.log_prob(z) + ladj)


def test_in_a_model_with_plates():
    flow = moved_flow()

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", 5):
            return pyro.sample("z", flow())

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    assert trace.nodes["z"]["fn"].batch_shape == (5,)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (5,)
    assert "flow$$$bijection.parts.0.conditioner.first.weight" in dict(pyro.get_param_store().named_parameters())


def test_as_a_prior_under_autonormal_and_nuts():
    flow = moved_flow()

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(2))

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step()).isfinite() for _ in range(3))
    flow.requires_grad_(False)
    mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].shape == (5, 2)


@pytest.mark.parametrize("learnable", [False, True])
def test_base_moves_saves_and_learns(learnable):
    base = rn.Base(dist.Normal, loc=torch.ones(2), scale=torch.full((2,), 2.0), learnable=learnable)
    flow, x = rn.Flow(rn.real_nvp(2), base=base), torch.randn(5, 2)
    torch.testing.assert_close(flow().log_prob(x), dist.Normal(1.0, 2.0).expand([2]).to_event(1).log_prob(x))
    assert flow.double()().sample().dtype == torch.float64
    assert flow.to("meta").base().base_dist.loc.device.type == "meta"
    assert ("base.scale" in dict(flow.named_parameters())) == learnable
    assert "base.scale" in flow.state_dict()


def test_a_flow_prints_as_a_few_lines():
    flow = rn.Flow(rn.real_nvp(2, num_couplings=4, hidden_dims=(8,)), base=rn.MixtureBase(2, num_components=3))
    # Each MLP has 2 x 8 and 9 x 2 numbers, each normal a weight, a location, a diagonal and a matrix.
    assert repr(flow).splitlines() == [
        "Flow(",
        "  event_shape=(2,), num_parameters=163",
        "  (bijection): Compose(4 x AffineCoupling)",
        "  (base): MixtureBase(num_components=3, full=True)",
        ")",
    ]
    assert repr(flow()) == "FlowDistribution(batch_shape=(), event_shape=(2,))"


def test_base_of_any_callable():
    flow = rn.Flow(rn.real_nvp(2), base=lambda: dist.Laplace(torch.zeros(2), 1.0).to_event(1))
    assert flow().log_prob(torch.zeros(2)).item() == pytest.approx(-2 * torch.tensor(2.0).log().item())


def test_saves_loads_and_copies():
    flow, x = moved_flow(), torch.randn(5, 2)
    expected = flow().log_prob(x)
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    fresh = moved_flow()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for clone in (fresh, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(clone().log_prob(x), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_compiles_with_inductor():
    """Other tests compile without code generation. This one generates code, and tries a second batch size."""
    flow, x = moved_flow(), torch.randn(16, 2)
    score = torch.compile(lambda x: flow().log_prob(x), fullgraph=True)
    torch.testing.assert_close(score(x), flow().log_prob(x))
    score(x).sum().backward()
    torch.testing.assert_close(score(x[:7]), flow().log_prob(x[:7]))
    assert torch.compile(lambda: flow().sample((5,)), fullgraph=True)().shape == (5, 2)


def test_an_elementwise_bijection_with_an_event_shape():
    flow = rn.Flow(rn.Compose([dist.transforms.AffineTransform(1.0, 2.0)]), event_shape=(3,))
    y, log_prob = flow().rsample_and_log_prob((5,))
    expected = dist.Normal(1.0, 2.0).expand([3]).to_event(1).log_prob(y)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(flow().log_prob(y), expected)


@table(
    ("make", "error", "message"),
    {
        "Pyro's transform": (lambda: rn.Flow(dist.transforms.Spline(2)), TypeError, "expected a Bijection.*Compose"),
        "no event shape": (
            lambda: rn.Flow(rn.Compose([dist.transforms.Householder(2)])),
            ValueError,
            "pass event_shape=",
        ),
        "other event shape": (
            lambda: rn.Flow(rn.real_nvp(2), event_shape=(3,)),
            ValueError,
            r"expected event shape \(2,\)",
        ),
        "base of scalars": (
            lambda: rn.Flow(rn.real_nvp(2), base=lambda: dist.Normal(torch.zeros(2), 1.0)),
            ValueError,
            "to_event",
        ),
        "unwanted context": (lambda: moved_flow()(torch.zeros(3)), ValueError, "takes no context"),
        "no context": (lambda: moved_flow(context_dim=3)(), ValueError, "width 3; got none"),
        "context shape": (
            lambda: moved_flow(context_dim=3)(torch.zeros(4, 2)),
            ValueError,
            r"\(..., 3\); got shape \(4, 2\)",
        ),
        "value shape": (lambda: moved_flow()().log_prob(torch.zeros(5, 3)), ValueError, "event.shape"),
        "value shape of inner events": (
            lambda: rn.Flow(rn.real_nvp(2), event_shape=(3, 2))().log_prob(torch.zeros(5, 1, 2)),
            ValueError,
            "event_shape",
        ),
        "nan": (lambda: moved_flow()().log_prob(torch.full((5, 2), torch.nan)), ValueError, "support"),
        "nan beside infinities": (
            lambda: moved_flow()().log_prob(torch.tensor([[torch.inf, -torch.inf], [torch.nan, 0.0]])),
            ValueError,
            "support",
        ),
        "other precision": (
            lambda: moved_flow()().log_prob(torch.zeros(5, 2).double()),
            TypeError,
            "parameters of torch.float32",
        ),
        "temperature zero": (lambda: moved_flow()(temperature=0.0), ValueError, "temperature > 0"),
        "base of numbers": (lambda: rn.Base(dist.Normal, loc=0.0, scale=1.0), TypeError, "torch.tensor"),
        "base of negative scale": (
            lambda: rn.Base(dist.Normal, loc=torch.zeros(2), scale=-torch.ones(2)),
            ValueError,
            "scale",
        ),
    },
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


BOUNDED = {
    "logit": lambda: rn.Logit(0).inv,
    "unbound": lambda: rn.Unbound([0.0, 0.0], [1.0, 1.0]).inv,
    "one-sided": lambda: rn.Unbound([0.0, -torch.inf], [torch.inf, 1.0]).inv,
    "sigmoid": dist.transforms.SigmoidTransform,
    "exp": dist.transforms.ExpTransform,
}


@pytest.mark.parametrize("make", BOUNDED.values(), ids=BOUNDED)
def test_a_value_on_a_bound_has_no_density_and_spoils_no_gradient(make):
    flow = rn.Flow(rn.Compose([small(2), make()]), event_shape=(2,))
    inner, bound = torch.tensor([0.3, 0.6]), torch.tensor([0.0, 0.5])
    x = torch.stack([inner, bound])
    with pyro.validation_enabled(False):  # which refuses values beyond an open support, and some on it
        log_p = flow().log_prob(x)
    assert log_p[1] == -torch.inf
    torch.testing.assert_close(log_p[0], flow().log_prob(inner))
    log_p[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
    with pyro.validation_enabled(False):
        assert flow().log_prob(torch.tensor([-1.0, 0.5])) == -torch.inf
    draws = flow().sample((100,))
    assert flow().log_prob(draws).isfinite().all()


def test_bounds_move_with_the_flow():
    stack = rn.Compose([small(2, context_dim=1), rn.Unbound([0.0, 0.0], [1.0, torch.inf]).inv])
    original = rn.Flow(stack.condition(torch.zeros(1)))
    for flow in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), original):
        flow.to("meta")
        for bijection in (flow.bijection, flow.bijection.bijection, flow.bijection.inv.inv):
            assert bijection.codomain.lower_bound.is_meta and bijection.inv.domain.upper_bound.is_meta
        with pyro.validation_enabled(False):  # which would look at the values
            assert flow().log_prob(torch.ones(5, 2, device="meta")).shape == (5,)
        assert stack.codomain.lower_bound.is_meta == (flow is original)


def test_an_image_on_the_bounds_of_the_logit_of_the_paper_has_a_density():
    flow = rn.Flow(rn.Compose([rn.image_real_nvp((1, 4, 4), hidden_channels=4, num_couplings=2), rn.Logit().inv]))
    assert flow().log_prob(torch.zeros(1, 4, 4)).isfinite() and flow().log_prob(torch.ones(1, 4, 4)).isfinite()


@pytest.mark.slow
def test_an_exported_conditional_flow_takes_any_number_of_rows():
    """Also as many as an event has entries, which torch would take for the event."""

    class Score(torch.nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x, context):
            return self.flow(context).log_prob(x)

    flow = moved_flow(context_dim=3).eval()
    rows = torch.export.Dim("rows", min=1, max=1024)
    example = torch.randn(7, 2), torch.randn(7, 3)
    exported = torch.export.export(Score(flow), example, dynamic_shapes=({0: rows}, {0: rows})).module()
    for num in (1, 2, 3, 10):
        x, context = torch.randn(num, 2), torch.randn(num, 3)
        torch.testing.assert_close(exported(x, context), flow(context).log_prob(x))


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoRealNVP"])
def test_a_prior_with_bounds_under_guides(guide):
    """One-sided bounds and none, in one flow; torch's own intervals cannot be mapped to the real line with these."""
    bounds = rn.Unbound([0.0, -torch.inf, 0.0, -torch.inf], [torch.inf, torch.inf, 1.0, 2.0])
    flow = rn.Flow(rn.Compose([perturb(small(4), 0.05), bounds.inv]))
    support = flow().support
    x = torch.distributions.biject_to(support)(10 * torch.randn(1000, 4))
    assert support.check(x).all() and x.isfinite().all()
    y = torch.tensor([1.0, -0.5, 0.4, 1.5])

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=y)

    if guide == "AutoNormal":
        fitted = AutoNormal(model)
        svi = SVI(model, fitted, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(300):
            svi.step()
        median = fitted.median()["z"]
    else:
        fitted = rn.AutoRealNVP(model)
        rn.fit_guide(fitted, num_steps=20, progress=False)
        median = fitted.median()["z"]
    torch.testing.assert_close(median, y, atol=0.15, rtol=0)


@pytest.mark.slow
def test_a_prior_with_bounds_under_nuts():
    """x ~ Exponential(1) through the flow's bound, y ~ N(x, 1/2): the mean of the posterior by quadrature."""
    base = rn.Base(dist.Gumbel, loc=torch.zeros(1), scale=torch.ones(1))
    flow = rn.Flow(rn.Compose([rn.Unbound([0.0], [torch.inf]).inv]), base=base)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([0.7]))

    mcmc = MCMC(NUTS(model), num_samples=1000, warmup_steps=300, disable_progbar=True)
    mcmc.run()
    grid = torch.linspace(1e-3, 10, 10_000)
    log_p = flow().log_prob(grid[:, None]) + dist.Normal(grid, 0.5).log_prob(torch.tensor(0.7))
    p = log_p.exp() / log_p.exp().sum()
    assert mcmc.get_samples()["z"].mean().item() == pytest.approx((p * grid).sum().item(), abs=0.06)


# -- called with other parameters --------------------------------------------------------------------------------------


def integers_model():
    shape = (1, 2, 2)
    return rn.DequantizedFlow(perturb(rn.Flow(rn.image_real_nvp(shape, num_scales=1, hidden_channels=4, num_blocks=1))))


@pytest.mark.parametrize("kind", ["flow", "conditional", "images"])
def test_a_functional_call(kind):
    """It takes its parameters back before the distribution is asked for anything."""
    x, context = torch.randn(5, 2), ()
    if kind == "images":
        x, module = torch.randint(0, 256, (5, 1, 2, 2)), integers_model()
    elif kind == "flow":
        module = moved_flow()
    else:
        module, context = moved_flow(context_dim=3), (torch.randn(5, 3),)

    def score(*args):
        torch.manual_seed(0)
        return args[0].log_prob(x)

    other = perturb(copy.deepcopy(module))
    own, others = (dict(m.named_parameters()) for m in (module, other))
    others = {name: value.detach() for name, value in others.items()}
    before = score(module(*context))
    found = torch.func.functional_call(module, others, context)
    torch.testing.assert_close(score(found), score(other(*context)))
    torch.testing.assert_close(score(module(*context)), before)
    gradient = torch.func.grad(lambda p: score(torch.func.functional_call(module, p, context)).mean())(own)
    expected = torch.autograd.grad(score(module(*context)).mean(), list(own.values()))
    torch.testing.assert_close(tuple(gradient.values()), expected)
    found = torch.func.functional_call(module, dict(other.named_parameters()), context)  # parameters, and no tensors
    torch.testing.assert_close(score(found), score(other(*context)))
    part = {name: value for name, value in own.items() if "parts.1" in name}  # the others stay as they are
    found = torch.func.functional_call(module, {name: 2 * value for name, value in part.items()}, context)
    assert not torch.equal(score(found), before)
    gradient_of_part = torch.func.grad(lambda p: score(torch.func.functional_call(module, p, context)).mean())(part)
    torch.testing.assert_close(gradient_of_part, {name: gradient[name] for name in part})


def test_a_functional_call_with_buffers():
    x = 10 + 2 * torch.randn(5, 2)
    flow, other = (rn.Flow(rn.Standardize(2).fit(rows).inv) for rows in (torch.randn(50, 2), x))
    found = torch.func.functional_call(flow, dict(other.named_buffers()), ())
    torch.testing.assert_close(found.log_prob(x), other().log_prob(x))


def test_an_ensemble():
    flows, x = [moved_flow() for _ in range(3)], torch.randn(5, 2)
    state = torch.func.stack_module_state(flows)
    found = torch.vmap(lambda *state: torch.func.functional_call(flows[0], state, ()).log_prob(x))(*state)
    torch.testing.assert_close(found, torch.stack([flow().log_prob(x) for flow in flows]))


def test_contexts_broadcast_with_a_value_of_several_axes():
    flow = perturb(rn.Flow(small(2, context_dim=3), event_shape=(4, 2)))
    contexts, value = torch.randn(5, 3), torch.randn(4, 2)
    torch.testing.assert_close(flow(contexts).log_prob(value), flow(contexts).log_prob(value.expand(5, 4, 2)))


def test_samples_keep_off_the_bounds_of_a_logit():
    """A sigmoid rounds to 1, where the logit is infinite."""
    far = rn.TriangularAffine(1).start_at(torch.tensor([12.0]), torch.tensor([[3.0]]))
    flow = rn.Flow(rn.Compose([far, rn.Logit(0).inv]))
    samples, log_p = flow().rsample_and_log_prob((1000,))
    assert ((samples > 0) & (samples < 1)).all()
    assert log_p.isfinite().all() and flow().log_prob(samples).isfinite().all()


@pytest.mark.parametrize(
    ("last", "num_real"),
    [
        (lambda: T.CatTransform([T.ExpTransform(), T.SigmoidTransform()], -1, [1, 1]), 0),
        (lambda: T.StackTransform([T.ExpTransform(), T.SigmoidTransform()], -1), 0),
        (lambda: T.CatTransform([small(2), T.ExpTransform(), T.SigmoidTransform()], -1, [2, 1, 1]), 2),
    ],
)
def test_joined_transforms_have_no_density_beyond_their_bounds(last, num_real):
    flow = rn.Flow(rn.Compose([last()]), (2 + num_real,))
    entries = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, 2.5], [0.0, 0.5]])
    value = torch.cat([torch.zeros(4, num_real), entries], -1).requires_grad_()
    with pytest.raises(ValueError, match="within the support"):
        flow().log_prob(value)
    with pyro.validation_enabled(False):
        log_p = flow().log_prob(value)
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(torch.tensor(0.5).log()) + math.log(2) + normal.log_prob(torch.tensor(0.0)) + math.log(4)
    torch.testing.assert_close(log_p[0], expected + num_real * normal.log_prob(torch.tensor(0.0)))
    assert (log_p[1:] == -torch.inf).all()
    log_p[0].backward()
    assert value.grad.isfinite().all()
    torch.testing.assert_close(flow.double()().log_prob(value[:1].double())[0], log_p[0].double())


def test_an_ensemble_of_flows_with_bounds():
    def make():
        return perturb(rn.Flow(rn.Compose([small(2), rn.Unbound([0.0, -torch.inf], [1.0, torch.inf]).inv])))

    class Call(nn.Module):
        def __init__(self, flow, function):
            super().__init__()
            self.flow = flow
            self.function = function

        def forward(self, x):
            return self.function(self.flow, x)

    flows, x = [make() for _ in range(3)], torch.rand(5, 2)
    for function in (lambda flow, x: flow().log_prob(x), lambda flow, x: flow.bijection.inv(x)):
        nets = [Call(flow, function) for flow in flows]
        parameters, buffers = torch.func.stack_module_state(nets)
        call = torch.func.vmap(lambda p, b, first=nets[0]: torch.func.functional_call(first, (p, b), (x,)))
        torch.testing.assert_close(call(parameters, buffers), torch.stack([net(x) for net in nets]))


def test_a_flow_that_has_become_a_pyro_module_is_trained():
    """Pyro saw only the parameters that were read before the density, and trained none of the others."""
    x = torch.randn(50, 2)

    def model(flow):
        with pyro.plate("rows", 50):
            pyro.sample("x", flow(), obs=x)

    flow = perturb(rn.Flow(rn.Compose([small(2), rn.TriangularAffine(2)])))
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    to_pyro_module_(flow)
    svi = SVI(lambda: model(flow), lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step()
    assert all(not torch.equal(p, before[name]) for name, p in flow.named_parameters())
    flow.bijection.parts[1].loc = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"priors of \['loc'\] in 'bijection.parts.1'.*functional_call"):
        flow()
