# SPDX-License-Identifier: Apache-2.0
"""The values that a composition takes where an inner part has bounds, beyond which there is no density."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import perturb, table
from torch import nn
from torch.distributions import biject_to

import pyro_realnvp as rn
from pyro_realnvp.flows import spline_flow

ONE = {"event_shape": (1,)}


def sloped(slope):
    layer = rn.ConditionalAffine(1, 2)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[slope, 0.0], [0.0, 3.0]]))
    return layer


def unit():
    return rn.Unbound([0.0], [1.0]).inv


def standardize(dim=1):
    return rn.Standardize(dim).fit(torch.randn(50, dim, generator=torch.Generator().manual_seed(0)) * 3 + 2)


def exponential():
    return dist.Exponential(torch.tensor(1.0), validate_args=False)


def initialized():
    return rn.ActNorm(1).initialize(torch.tensor([[1.0], [4.0]]))


STACKS = {
    "affine": (lambda: [T.SigmoidTransform(), T.AffineTransform(-1.0, 10.0)], (-1.0, 9.0)),
    "affine event": (lambda: [unit(), T.AffineTransform(torch.ones(1), 2.0, event_dim=1)], (1.0, 3.0)),
    "squashed": (lambda: [T.TanhTransform(), T.AffineTransform(0.0, nn.Parameter(torch.tensor(-3.0)))], (-3.0, 3.0)),
    "shifted lognormal": (lambda: [T.ExpTransform(), T.AffineTransform(1.0, -2.0)], (-math.inf, 1.0)),
    "logit": (lambda: [rn.Logit(0).inv, T.AffineTransform(0.0, 1 / 255).inv], (0.0, 255.0)),
    "twice": (lambda: [T.SigmoidTransform(), T.SigmoidTransform()], (0.5, 1 / (1 + math.exp(-1)))),
    "there and back": (lambda: [unit(), T.AffineTransform(0.1, 3.0), rn.Unbound([0.1], [3.1]), rn.ActNorm(1)], None),
    "nested, then bounded": (
        lambda: [rn.Compose([unit(), rn.TriangularAffine(1)]), T.SigmoidTransform(), T.AffineTransform(0.0, 4.0)],
        "forward",
    ),
    "back": (lambda: [unit(), rn.Unbound([0.0], [1.0]), rn.TriangularAffine(1)], None),
    "cdf": (
        lambda: [unit(), T.CumulativeDistributionTransform(exponential()).inv, T.AffineTransform(1.0, -2.0)],
        (-math.inf, 1.0),
    ),
    "sigmoids": (lambda: [unit(), T.AffineTransform(0.5, 0.5), T.SigmoidTransform().inv], (0.0, math.inf)),
    "decreasing": (
        lambda: [unit(), T.AffineTransform(1.0, -1.0), rn.Unbound([0.0], [1.0]), T.ExpTransform()],
        (0.0, math.inf),
    ),
    "normalization": (lambda: [unit(), initialized()], "forward"),
    "spline": (lambda: [unit(), spline_flow()], "forward"),
    "nested": (lambda: [rn.Compose([unit(), T.AffineTransform(0.0, 2.0)]), T.AffineTransform(1.0, 2.0)], (1.0, 5.0)),
    "inverse": (lambda: [rn.Compose([T.AffineTransform(0.0, 0.1), rn.Unbound([0.0], [1.0])], **ONE).inv], (0.0, 10.0)),
}


@table(("make", "ends"), STACKS)
def test_a_density_ends_where_an_inner_bound_is_reached(make, ends):
    """Beyond it, log-densities of 40 came, or nan."""
    torch.manual_seed(0)
    flow = rn.Flow(perturb(rn.Compose(make(), event_shape=(1,)), 0.1)).double()
    if ends == "forward":
        with torch.no_grad():
            far = torch.tensor([[-1e6], [1e6]]).double()  # the first part takes them to its bounds
            ends = sorted(flow.bijection(far).flatten().tolist())
    elif ends is None:
        ends = -math.inf, math.inf
    elif any(flow.parameters()):
        ends = flow.bijection.codomain.base_constraint.lower_bound, flow.bijection.codomain.base_constraint.upper_bound
        ends = [end.item() for end in ends]
        assert ends[1] == pytest.approx(-ends[0]) and ends[1] != 3.0  # it moves with the parameter
    low, high = (end if math.isfinite(end) else sign * 60.0 for end, sign in zip(ends, (-1, 1)))
    beyond = torch.tensor([[low - 1e-6], [low - 5], [high + 1e-6], [high + 100]]).double()
    inside = torch.linspace(low, high, 200_002, dtype=torch.float64)[1:-1]
    density = flow()
    with pyro.validation_enabled(False):
        log_p = density.log_prob(inside[:, None])
        mass = (log_p.exp().sum() * (inside[1] - inside[0])).item()
        assert mass == pytest.approx(1, abs=2e-3)
        for k, end in enumerate(ends):
            if math.isfinite(end):
                assert (density.log_prob(beyond[2 * k : 2 * k + 2]) == -math.inf).all()
                assert not density.support.check(beyond[2 * k : 2 * k + 2]).any()
                y = beyond[2 * k].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(density.log_prob(y), y)
                assert gradient.isfinite().all()
    assert density.support.check(density.sample((100,))).all()
    if any(map(math.isfinite, ends)):
        with pyro.validation_enabled(True), pytest.raises(ValueError, match=r"support|beyond"):
            flow().log_prob(beyond)


def test_a_region_that_is_no_box():
    torch.manual_seed(0)
    mixing = perturb(rn.real_nvp(2, num_couplings=2, hidden_dims=(8,)), 0.3)
    flow = rn.Flow(rn.Compose([rn.Unbound([0.0, 0.0], [1.0, 2.0]).inv, mixing])).double()
    line = torch.linspace(-3, 5, 641, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with pyro.validation_enabled(False), torch.no_grad():
        log_p = flow().log_prob(grid)
        inner = mixing.inv(grid)
        is_inside = ((inner > 0) & (inner < torch.tensor([1.0, 2.0]))).all(-1)
        assert torch.equal(log_p > -math.inf, is_inside)
        assert (log_p.exp().sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=0.01)
    for clone in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(clone().support.check(grid[::97]), is_inside[::97])
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="expected values in Reached"):
        flow.bijection.inv(torch.full((1, 2), 9.0).double())
    with pytest.raises(ValueError, match="inside the support of the flow; got 1 of 50 rows"):
        rn.fit(flow, torch.cat([flow().sample((49,)), torch.full((1, 2), 9.0)]), num_steps=1, progress=False)


def test_a_region_inside_of_another_composition():
    """The values beyond the inner region had a density."""
    torch.manual_seed(0)
    first, second = (perturb(rn.real_nvp(2, num_couplings=2, hidden_dims=(8,)), 0.3).double() for _ in range(2))
    unit_square = rn.Unbound([0.0, 0.0], [1.0, 1.0]).inv
    flat = rn.Compose([unit_square, first, second]).double()
    y = torch.cartesian_prod(*[torch.linspace(-3, 3, 61, dtype=torch.float64)] * 2)
    for nested in (
        rn.Compose([rn.Compose([unit_square, first]), second]),
        rn.Compose([rn.Compose([unit_square, first]), rn.Compose([second])]),
        rn.Compose([rn.Compose([unit_square, rn.Permute(torch.tensor([1, 0]))]), rn.Compose([first, second])]),
    ):
        with pyro.validation_enabled(False), torch.no_grad():
            torch.testing.assert_close(rn.Flow(nested)().log_prob(y), rn.Flow(flat)().log_prob(y))
    assert 0 < flat.codomain.check(y).sum() < len(y)


def hidden(part):
    """A part with bounds before it, in a composition of its own."""
    return rn.Compose([T.SigmoidTransform(), part], event_shape=(1,))


@table(
    ("part", "context"),
    {
        "context": (lambda: sloped(0.0), torch.zeros(2)),
        "late statistics": (lambda: rn.ActNorm(1), None),
        "moving statistics": (lambda: rn.BatchNorm(1), None),
    },
)
def test_bounds_inside_of_a_composition_that_show_later(part, context):
    """They counted as none for ever: log-densities of 45 came."""
    torch.manual_seed(0)
    args = () if context is None else (context,)
    for wrap in (
        hidden,
        lambda part: rn.Compose([hidden(part)]),
        lambda part: rn.Compose([rn.Compose([hidden(part)])]),
    ):
        flow = rn.Flow(rn.Compose([wrap(part()), T.AffineTransform(0.0, 2.0)]))
        flow(*args).rsample((200,) if not args else ())
        flow.bijection.condition(context)(torch.randn(200, 1)) if args else flow.bijection(torch.randn(200, 1))
        flow.eval()
        with pyro.validation_enabled(False):
            assert (flow(*args).log_prob(torch.tensor([[1e3], [-1e3]])) == -math.inf).all()
        assert flow(*args).support.check(flow(*args).sample((50,))).all()


def test_values_that_the_next_part_cannot_take():
    """An end beyond the domain of a part was taken through it: the interval from 1/4 to 1/4 was the support."""
    parts = [T.SigmoidTransform(), T.AffineTransform(-0.5, 1.0), T.PowerTransform(torch.tensor(2.0))]
    base = dist.Uniform(torch.tensor(0.0), torch.tensor(1.0))
    flow = rn.Flow(rn.Compose(parts, event_shape=()), base=lambda: base)
    y = flow().sample((20,))
    torch.testing.assert_close(flow().log_prob(y), dist.TransformedDistribution(base, parts).log_prob(y))
    assert flow().support.lower_bound == 0 and flow().support.upper_bound == 0.25
    cdf = T.CumulativeDistributionTransform(dist.Exponential(torch.tensor(1.0)))
    flow = rn.Flow(rn.Compose([T.ELUTransform(), cdf], event_shape=()), base=lambda: dist.HalfNormal(torch.tensor(1.0)))
    y = flow().sample((20,))
    assert flow().log_prob(y).isfinite().all()


@table(
    "make",
    {
        "spline": lambda: T.Spline(2),
        "spline and back": lambda: T.Spline(2).inv,
        "batch normalization": lambda: T.BatchNorm(2).eval(),
        "planar": lambda: T.Planar(2),
        "radial": lambda: T.Radial(2),
        "sylvester": lambda: T.Sylvester(2),
        "neural": lambda: T.neural_autoregressive(2),
    },
)
def test_parts_of_pyro_behind_bounds(make):
    """A part without a sign raised an error without a message, and one without an inverse a KeyError."""
    torch.manual_seed(0)
    flow = rn.Flow(rn.Compose([rn.Unbound([0.0, 0.0], [1.0, 1.0]).inv, make()]))
    trace = pyro.poutine.trace(lambda: pyro.sample("z", flow().expand([3]))).get_trace()
    assert trace.log_prob_sum().isfinite()


def test_a_region_of_numbers():
    inner = rn.Compose([T.SigmoidTransform(), T.AffineTransform(0.0, 3.0)])
    flow = rn.Flow(
        rn.Compose([inner, rn.Compose([T.AffineTransform(1.0, 2.0)])]),
        event_shape=(),
        base=lambda: dist.Normal(torch.tensor(0.0), 1.0),
    )
    with pyro.validation_enabled(False):
        log_p = flow().log_prob(torch.tensor([[2.0], [8.0]]))
    assert log_p.shape == (2, 1) and log_p[0].isfinite() and log_p[1] == -math.inf


@table(
    "make",
    {
        "box": lambda: rn.Compose([rn.real_nvp(2), T.SigmoidTransform(), T.AffineTransform(0.0, 2.0)]),
        "region": lambda: rn.Compose([rn.Unbound([0.0, 0.0], [1.0, 2.0]).inv, rn.TriangularAffine(2)]),
        "normalization": lambda: rn.Compose([rn.Unbound([0.0, 0.0], [1.0, 2.0]).inv, standardize(2)]),
        "back": lambda: rn.Compose([T.SigmoidTransform(), rn.Unbound([0.0, 0.0], [1.0, 1.0]), rn.real_nvp(2)]),
    },
)
def test_bounds_in_one_compiled_graph(make):
    torch.manual_seed(0)
    flow = rn.Flow(perturb(make(), 0.1))
    y = torch.tensor([[0.5, 0.6], [7.0, 0.5], [0.3, -9.0]])
    with pyro.validation_enabled(False):
        score = torch.compile(lambda y: flow().log_prob(y), fullgraph=True, backend="eager")
        torch.testing.assert_close(score(y), flow().log_prob(y))
        draw = torch.compile(lambda: flow().rsample((4,)), fullgraph=True, backend="eager")
        assert flow().log_prob(draw()).isfinite().all()


def test_a_region_as_the_support_of_a_latent():
    torch.manual_seed(0)
    prior = rn.Flow(rn.Compose([rn.Unbound([0.0, 0.0], [1.0, 1.0]).inv, rn.TriangularAffine(2)])).requires_grad_(False)
    prior.bijection.parts[1].start_at(torch.zeros(2), torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    to_region = biject_to(prior().support)
    z = torch.randn(5, 2, dtype=torch.float32, requires_grad=True)
    y = to_region(z)
    assert prior().support.check(y).all()
    torch.testing.assert_close(to_region.inv(y), z)
    exact = torch.autograd.functional.jacobian(to_region, z[0]).det().abs().log()
    torch.testing.assert_close(to_region.log_abs_det_jacobian(z, y)[0], exact)

    def model():
        y = pyro.sample("y", prior())
        pyro.sample("x", dist.Normal(y.sum(), 0.5), obs=torch.tensor(2.0))

    draws = prior().sample((200_000,))
    weights = dist.Normal(draws.sum(-1), 0.5).log_prob(torch.tensor(2.0))
    exact = (weights.logsumexp(0) - math.log(len(draws))).item()
    guide = rn.AutoRealNVP(model, num_couplings=2)
    rn.fit_guide(guide, num_steps=100, progress=False, seed=0)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.02)
    kernel = pyro.infer.NUTS(model)
    chain = pyro.infer.MCMC(kernel, num_samples=300, warmup_steps=100, disable_progbar=True)
    chain.run()
    mean = (weights.softmax(0)[:, None] * draws).sum(0)
    torch.testing.assert_close(chain.get_samples()["y"].mean(0), mean, atol=0.15, rtol=0)


def test_bounds_that_a_context_moves():
    flow = rn.Flow(rn.Compose([unit(), sloped(0.5)]))
    context = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    with pyro.validation_enabled(False):
        inside = flow(context).log_prob(torch.tensor([[0.5], [3.0 + 0.5]]))
        assert inside.isfinite().all()
        assert (flow(context).log_prob(torch.tensor([[1.1], [2.9]])) == -math.inf).all()
        assert (flow(context).log_prob(torch.tensor([[-0.1], [3.0 + 1.7]])) == -math.inf).all()
        image = rn.Flow(rn.Compose([rn.Logit(0).inv, T.AffineTransform(0.0, 255.0)], event_shape=(1, 4, 4)))
        assert image().log_prob(torch.full((2, 1, 4, 4), 100.0)).isfinite().all()
        assert (image().log_prob(torch.full((2, 1, 4, 4), 256.0)) == -math.inf).all()


def test_permuted_bounds():
    flow = rn.Flow(
        rn.Compose([rn.real_nvp(2), rn.Unbound([0.0, 0.0], [1.0, 2.0]).inv, rn.Permute(torch.tensor([1, 0]))])
    )
    assert flow().support.check(torch.tensor([[1.5, 0.5], [0.5, 1.5]])).tolist() == [True, False]
    assert biject_to(flow().support)(torch.randn(5, 2)).shape == (5, 2)


def test_bounds_of_some_entries_only():
    """Torch's interval has no coordinates for an infinite end."""
    unbound = rn.Unbound([0.0, -1.0], [1.0, math.inf])
    prior = rn.Flow(rn.Compose([unbound.inv, rn.Permute(torch.tensor([1, 0]))]))
    z = torch.randn(5, 2)
    torch.testing.assert_close(biject_to(prior().support)(z), unbound.inv(z.flip(1)).flip(1))
    guide = rn.AutoRealNVP(lambda: pyro.sample("z", prior()), num_couplings=2)
    rn.fit_guide(guide, num_steps=5, progress=False)
    assert rn.diagnose(guide).log_evidence == pytest.approx(0.0, abs=0.01)


def test_a_prior_with_an_inner_bound():
    bijection = rn.Compose([T.SigmoidTransform(), T.AffineTransform(-1.0, 2.0)], event_shape=(1,))
    prior = rn.Flow(bijection, base=rn.Base(dist.Normal, loc=torch.zeros(1), scale=torch.ones(1)))

    def model():
        z = pyro.sample("z", prior())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([0.5]))

    z = torch.linspace(-1, 1, 20_001)[1:-1, None]
    log_p = prior().log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(0.5)).squeeze(-1)
    exact = (log_p.double().logsumexp(0) + math.log(1e-4)).item()
    guide = rn.AutoRealNVP(model, num_couplings=2)
    rn.fit_guide(guide, num_steps=200, progress=False, seed=0)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.01)
    assert guide.sample(1000)["z"].abs().max() < 1


@table(
    ("make", "message"),
    {
        "no inverse": (lambda: rn.Flow(rn.Compose([rn.Logit(0)], **ONE)), r"is an \.inv missing"),
        "in a stack": (lambda: rn.Flow(rn.Compose([rn.real_nvp(2), rn.Logit(0)])), r"is an \.inv missing"),
        "exp": (lambda: rn.Flow(rn.Compose([rn.real_nvp(2), T.ExpTransform().inv])), r"is an \.inv missing"),
        "cdf": (
            lambda: rn.Flow(rn.Compose([T.CumulativeDistributionTransform(exponential())], **ONE)),
            "expected a base with values in GreaterThanEq",
        ),
        "region": (
            lambda: rn.Flow(rn.Compose([rn.TriangularAffine(1), rn.Unbound([0.0], [1.0])]), base=uniform(3.0)),
            "expected a base with values in Reached",
        ),
        "transformed": (
            lambda: rn.Flow(rn.Unbound([0.0], [1.0]), base=shifted(0.25, 1.5)),
            "expected a base with values in Box",
        ),
        "mixture": (
            lambda: rn.Flow(rn.Unbound([0.0], [1.0]), base=rn.MixtureBase(1, num_components=2)),
            "expected a base with values in Box",
        ),
        "wide base": (
            lambda: rn.Flow(rn.Unbound([0.0], [1.0]), base=uniform(2.0)),
            "expected a base with values in Box",
        ),
        "temperature": (lambda: rn.Flow(rn.Unbound([0.0], [1.0]), base=uniform(1.0))(temperature=1.5), "a lower one"),
    },
)
def test_a_base_beyond_the_domain_is_refused(make, message):
    """Draws were nan, and the density had a mass of 0.34 or 0.67."""
    with pytest.raises(ValueError, match=message):
        make()


def uniform(high):
    return rn.Base(dist.Uniform, low=torch.zeros(1), high=torch.full((1,), high))


def shifted(loc, scale):
    unit = dist.Uniform(torch.zeros(1), torch.ones(1))
    return lambda: dist.TransformedDistribution(unit, [T.AffineTransform(loc, scale)]).to_event(1)


def test_a_base_within_the_domain_that_is_not_seen_at_once():
    rn.Flow(rn.Unbound([0.0], [1.0]), base=shifted(0.25, 0.5))  # of which torch says that its values are all real
    rn.Flow(rn.Compose([rn.TriangularAffine(1), rn.Unbound([0.0], [1.0])]), base=uniform(0.9))
    for k in range(2, 300):  # a third of which rounding took beyond
        rn.Flow(rn.Compose([T.AffineTransform(0.0, 1 / k), rn.Logit(0.0)], **ONE), base=uniform(float(k)))


def test_a_base_within_the_domain():
    flow = rn.Flow(rn.Unbound([0.0], [1.0]), base=uniform(1.0))
    for temperature in (1.0, 0.5):
        y = torch.linspace(-30, 30, 60_001)[:, None]
        with pyro.validation_enabled(False):
            mass = (flow(temperature=temperature).log_prob(y).exp().sum() * 1e-3).item()
        assert mass == pytest.approx(1, abs=1e-3)
    gamma = rn.Base(dist.Gamma, concentration=torch.ones(1), rate=torch.ones(1))  # whose support holds its bound
    assert rn.Flow(rn.Unbound([0.0], [math.inf]), base=gamma)(temperature=0.5).sample((9,)).isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: [T.SigmoidTransform(), rn.ConditionalAffine(1, 1)],
        lambda: [T.ExpTransform(), rn.ConditionalAffine(1, 1), T.ExpTransform()],
        lambda: [rn.ConditionalAffine(1, 1), T.SigmoidTransform(), rn.ConditionalAffine(1, 1)],
    ],
)
def test_bounds_that_a_context_moves_are_mapped(make):
    flow = rn.Flow(perturb(rn.Compose(make(), **ONE)))
    generator = torch.Generator().manual_seed(0)
    context, y = torch.randn(20, 1, generator=generator), torch.randn(20, 1, generator=generator)
    with pyro.validation_enabled(False):
        expected = flow(context).log_prob(y)
        assert expected.isfinite().any() and expected.isinf().any()
        torch.testing.assert_close(torch.vmap(lambda c, y: flow(c).log_prob(y))(context, y), expected)
