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


def test_a_base_within_the_domain():
    flow = rn.Flow(rn.Unbound([0.0], [1.0]), base=uniform(1.0))
    for temperature in (1.0, 0.5):
        y = torch.linspace(-30, 30, 60_001)[:, None]
        with pyro.validation_enabled(False):
            mass = (flow(temperature=temperature).log_prob(y).exp().sum() * 1e-3).item()
        assert mass == pytest.approx(1, abs=1e-3)
    gamma = rn.Base(dist.Gamma, concentration=torch.ones(1), rate=torch.ones(1))  # whose support holds its bound
    assert rn.Flow(rn.Unbound([0.0], [math.inf]), base=gamma)(temperature=0.5).sample((9,)).isfinite().all()
