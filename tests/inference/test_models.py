# SPDX-License-Identifier: Apache-2.0
"""Models as people write them: what is right for one draw is right, and the rest is an error, never a wrong number."""

import copy
import functools
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import fitted, run_python, table
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_mean
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import pyro_realnvp as rn
from pyro_realnvp.inference.agreement import check
from pyro_realnvp.inference.density import LogDensity
from pyro_realnvp.inference.mapping import map_over
from pyro_realnvp.inference.validity import apply_validity

# -- a regression, written in all ways ---------------------------------------------------------------------------------

N = 50
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
RESPONSE = X @ torch.tensor([1.0, -2.0]) + torch.randn(N, generator=torch.Generator().manual_seed(1))
DEVIATIONS = torch.linalg.inv(torch.eye(2) / 25 + X.T @ X).diagonal().sqrt()
EVIDENCE = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + 25 * X @ X.T).log_prob(RESPONSE).item()


def regression(mean, *, as_plate=False, as_event=False):
    def model():
        if as_plate:
            with pyro.plate("columns", 2):
                b = pyro.sample("b", dist.Normal(0.0, 5.0))
        else:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        if as_event:
            pyro.sample("y", dist.Normal(mean(b), 1.0).to_event(1), obs=RESPONSE)
        else:
            with pyro.plate("rows", N):
                pyro.sample("y", dist.Normal(mean(b), 1.0), obs=RESPONSE)

    return model


def loop(b):
    total = torch.zeros(N)
    for k in range(2):
        total = total + X[:, k] * b[k]
    return total


WRITINGS = {
    "b @ X.T": lambda b: b @ X.T,
    "X @ b": lambda b: X @ b,
    "sum": lambda b: (X * b[..., None, :]).sum(-1),
    "slices": lambda b: b[..., :1] * X[:, 0] + b[..., 1:] * X[:, 1],
    "einsum": lambda b: torch.einsum("ij,j->i", X, b),
    "loop": loop,
}


@pytest.mark.slow
@pytest.mark.parametrize("as_plate", [False, True], ids=["b as event", "b as plate"])
@pytest.mark.parametrize("as_event", [False, True], ids=["rows as plate", "rows as event"])
@pytest.mark.parametrize("mean", WRITINGS.values(), ids=WRITINGS)
def test_a_regression_is_right_however_it_is_written(mean, as_event, as_plate):
    guide = rn.AutoRealNVP(regression(mean, as_event=as_event, as_plate=as_plate))
    history = rn.fit_guide(guide, num_steps=200, progress=False)
    assert -history.best_loss == pytest.approx(EVIDENCE, abs=0.01)
    torch.testing.assert_close(guide.sample(20_000)["b"].std(0), DEVIATIONS, rtol=0.02, atol=0)
    report = rn.diagnose(guide)
    assert report.log_evidence == pytest.approx(EVIDENCE, abs=0.01) and "good" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_pyros_own_guides_see_one_draw_too(make):
    model = regression(WRITINGS["X @ b"])  # which a plate of particles would break
    guide = make(model)
    history = rn.fit_guide(guide, num_steps=400, lr=0.02, progress=False)
    precision = torch.eye(2) / 25 + X.T @ X
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()  # KL of the best diagonal normal
    assert -history.best_loss == pytest.approx(EVIDENCE - gap, abs=0.03)
    losses = [Trace_ELBO().loss(model, guide) for _ in range(400)]
    assert history.best_loss == pytest.approx(sum(losses) / len(losses), abs=0.3)
    assert rn.diagnose(guide).elbo == pytest.approx(EVIDENCE - gap, abs=0.1)


@pytest.mark.slow
def test_a_guide_of_ones_own_without_rsample():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(k.float(), 1.0), obs=torch.tensor(2.0))

    def guide():
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("k", dist.Categorical(logits=logits))

    joint = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(2.0))
    history = rn.fit_guide(guide, model=model, num_steps=400, lr=0.05, progress=False)
    assert -history.best_loss == pytest.approx(joint.logsumexp(0).item(), abs=0.01)
    torch.testing.assert_close(pyro.param("logits").softmax(0), joint.softmax(0), atol=0.03, rtol=0)


def test_a_long_loop_is_sampled_at_once():
    calls = []

    def model():
        calls.append(1)
        x = torch.zeros(())
        for t in range(30):
            x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, 1.0))
        pyro.sample("y", dist.Normal(x, 0.1), obs=torch.tensor(2.0))

    guide = rn.AutoRealNVP(model)
    rn.fit_guide(guide, num_steps=5, progress=False)
    before = len(calls)
    assert guide.sample(1000)["x_29"].mean() == pytest.approx(2.0, abs=0.05)
    assert len(calls) - before <= 3


def test_a_model_that_writes_into_a_new_tensor_is_mapped():
    def model():
        x, z = torch.zeros(4), pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        for t in range(4):
            x[t] = 2 * z[t] + (x[t - 1] if t else 0)
        x[torch.tensor([True, False, False, False])] = 0.0
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(4))

    density = LogDensity(model)
    points = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    check(density, points[:2])
    assert density.is_mapped and density.own_tensors
    torch.testing.assert_close(density(points), torch.stack([density.one(point) for point in points]))
    assert rn.AutoRealNVP(model).build().sample(3)["z"].shape == (3, 4)  # without a warning


def test_a_mask_of_rows():
    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(3, 3), 5.0).to_event(2)).clone()
        m[torch.tensor([True, False, False])] = 0.0
        pyro.sample("y", dist.Normal(m, 1.0).to_event(2), obs=torch.arange(9.0).reshape(3, 3))

    rows = torch.arange(9.0)
    exact = dist.Normal(0.0, 1.0).log_prob(rows[:3]).sum() + dist.Normal(0.0, 26**0.5).log_prob(rows[3:]).sum()
    assert rn.diagnose(rn.AutoRealNVP(model)).log_evidence == pytest.approx(exact.item(), abs=0.01)


# -- supports that depend on latents -----------------------------------------------------------------------------------


def dynamic():
    a = pyro.sample("a", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(a + b, 0.5), obs=torch.tensor(2.5))


def test_a_support_that_depends_on_a_sum():
    @config_enumerate
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Uniform(0.0, 1.0 + k))

    with pytest.raises(ValueError, match="'z' depends on a discrete site that is summed over"):
        rn.AutoRealNVP(model).build()


def test_a_support_with_an_infinite_end():
    """Torch says that it is an interval up to infinity, and maps all points to infinity."""
    with pytest.raises(ValueError, match=r"'z' has the support .* with an infinite end"):
        rn.AutoRealNVP(lambda: pyro.sample("z", dist.GeneralizedPareto(0.0, 1.0, 0.2))).build()


@pytest.mark.parametrize(
    ("choose", "is_dynamic"),
    [(lambda a, c: a > 1.5, True), (lambda a, c: a > c, True), (lambda a, c: a > -1.0, False)],
)
def test_a_support_that_a_comparison_of_latents_chooses(choose, is_dynamic):
    """No gradient shows that the support depends on them."""

    def model():
        a, c = pyro.sample("a", dist.HalfNormal(1.0)), pyro.sample("c", dist.HalfNormal(1.0))
        pyro.sample("b", dist.Uniform(0.0, torch.where(choose(a, c), 5.0, 1.0)))
        assert choose(a, c).shape == ()

    guide = rn.AutoRealNVP(model).build()
    draws = guide.sample(500)
    assert (draws["b"] > 1).any() and ((draws["b"] < 1) | choose(draws["a"], draws["c"])).all()
    assert guide._has_dynamic_supports is is_dynamic


def test_a_model_that_cannot_be_evaluated_far_away():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if abs(a.item()) > 2:
            raise ArithmeticError("underflow in dt")
        pyro.sample("b", dist.Uniform(0.0, 1.0))

    assert not rn.AutoRealNVP(model, warm_start=False).build()._has_dynamic_supports


@pytest.mark.slow
def test_a_support_that_depends_on_a_latent():
    guide = fitted(dynamic, num_steps=300)
    draws = guide.sample(20_000)
    assert draws["b"].mean() == pytest.approx(0.789, abs=0.02) and (draws["b"] < draws["a"]).all()
    report = rn.diagnose(guide)
    assert report.log_evidence == pytest.approx(-1.991, abs=0.02)
    elbos = [-Trace_ELBO().loss(dynamic, guide) for _ in range(300)]  # the guide under Pyro's own loss
    assert sum(elbos) / len(elbos) == pytest.approx(report.elbo, abs=0.05)
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
    assert -elbo.loss(dynamic, guide) == pytest.approx(report.elbo, abs=0.05)
    posterior = rn.neutra(guide, num_samples=600, warmup_steps=200, progress=False)
    assert posterior.samples["b"].mean() == pytest.approx(0.789, abs=0.08)
    assert (posterior.samples["b"] < posterior.samples["a"]).all()


def test_a_support_that_depends_on_a_latent_only_far_away():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(0.0, x.clamp(min=1.0)))

    guide = fitted(model, num_steps=200)
    draws = guide.sample(20_000)
    assert ((draws["y"] > 1).float().mean() - 0.047).abs() < 0.01 and (draws["y"] < draws["x"].clamp(min=1)).all()


def test_a_support_that_depends_on_an_argument():
    def model(upper, y=2.0):
        a = pyro.sample("a", dist.Uniform(0.0, upper))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(y))

    guide = rn.AutoRealNVP(model).build(torch.tensor(1.0))
    rn.fit_guide(guide, torch.tensor(10.0), 7.0, num_steps=300, progress=False)
    assert guide.sample(5000)["a"].mean() == pytest.approx(7.0, abs=0.1)
    draws = [guide(torch.tensor(10.0), 7.0)["a"].item() for _ in range(200)]
    assert sum(draws) / 200 == pytest.approx(7.0, abs=0.3)


def test_an_angle():
    def model():
        a = pyro.sample("a", dist.VonMises(0.5, 2.0))
        pyro.sample("y", dist.Normal(a.cos(), 0.5), obs=torch.tensor(0.7))

    a = torch.linspace(-math.pi, math.pi, 20_001)
    log_p = dist.VonMises(0.5, 2.0).log_prob(a) + dist.Normal(a.cos(), 0.5).log_prob(torch.tensor(0.7))
    exact = (log_p.double().logsumexp(0) + (a[1] - a[0]).log()).item()
    guide = fitted(model, num_steps=100)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.01)
    assert guide.sample(1000)["a"].abs().max() < math.pi


NEAR_PI = torch.tensor([[3.0, -3.0, 2.8, -2.5]])
CUTS = {
    "near its location": (dist.VonMises(torch.tensor(3.0), 4.0), torch.zeros(1, 0), True),
    "near the data": (dist.VonMises(torch.tensor(0.0), 0.5), NEAR_PI, True),
    "in a loop": (dist.VonMises(torch.tensor(0.0), 0.5), NEAR_PI, False),
    "phases": (dist.Uniform(0.0, torch.tensor(2 * math.pi)), torch.cat([NEAR_PI, NEAR_PI + 3.2, NEAR_PI + 1]), True),
}


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.filterwarnings("ignore:the model cannot be mapped")
def test_an_angle_near_the_end_of_its_period(kind):
    """The end cut a mode in two, of which the guide had one half: a log evidence of -0.5 in place of 0."""
    prior, seen, can_be_mapped = CUTS[kind]

    def model():
        a = pyro.sample("a", prior.expand([len(seen)]).to_event(1))
        concentration = 3.0 if can_be_mapped or a.sum().item() else 4.0
        pyro.sample("x", dist.VonMises(a[:, None], concentration).to_event(2), obs=seen)

    a = 2 * math.pi * (torch.arange(720, dtype=torch.float64) + 0.5) / 720
    log_p = prior.log_prob(a) + dist.VonMises(a, 3.0).log_prob(seen.double()[..., None]).sum(1)
    exact = (log_p.logsumexp(-1) + math.log(2 * math.pi / 720)).sum().item()
    guide = fitted(model, num_steps=150 if can_be_mapped else 30)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.02)
    loaded = rn.AutoRealNVP(model, num_couplings=4).build()
    loaded.load_state_dict(guide.state_dict())
    for one in (guide, loaded.double(), copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        draws = one.sample(4000)["a"]
        assert ((draws >= prior.support.lower_bound) if kind == "phases" else draws.abs() <= math.pi).all()
        for f in (torch.sin, torch.cos):
            torch.testing.assert_close(f(draws.double()).mean(0), (log_p.softmax(-1) * f(a)).sum(-1), atol=0.05, rtol=0)


def test_a_start_where_the_circle_is_cut_open():
    """It stayed there, with a log evidence of -97."""

    def model():
        a = pyro.sample("a", dist.Uniform(0.0, 2 * math.pi))
        pyro.sample("x", dist.VonMises(a, 5.0), obs=torch.tensor(0.0))

    guide = fitted(model, num_steps=50, init_loc_fn=init_to_mean)
    assert rn.diagnose(guide).log_evidence == pytest.approx(-math.log(2 * math.pi), abs=0.01)


@pytest.mark.parametrize("scale", [1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("distance", [0, 2, 5])
def test_a_narrow_angle_at_the_end_of_its_period(scale, distance):
    """The density at both ends, some of its widths apart, was not that of a circle: a log evidence -3.8 too low."""
    end = torch.tensor(math.pi, dtype=torch.float64)

    def model():
        a = pyro.sample("a", dist.Uniform(-end, end))
        pyro.factor("x", (torch.cos(a - end + distance * scale) - 1) / scale**2)

    exact = math.log(scale / math.sqrt(2 * math.pi))
    assert rn.diagnose(fitted(model, num_steps=40)).log_evidence == pytest.approx(exact, abs=0.01)


def test_quantiles_of_an_angle_go_round():
    """The median was in a tail or, between two draws, opposite to all of them; and the 90 % were the whole circle."""
    guide = fitted(lambda: pyro.sample("a", dist.VonMises(torch.tensor(math.pi), 100.0)), num_steps=60)
    found = torch.stack([guide.median()["a"], *guide.quantiles([0.05, 0.95])["a"]])
    assert (found.abs() <= math.pi).all()
    torch.testing.assert_close(found % (2 * math.pi), math.pi + torch.tensor([0.0, -0.165, 0.165]), atol=0.03, rtol=0)


def test_an_angle_beside_a_number():
    """The longitude of a site that has a latitude, too, was not seen as an angle."""
    width = torch.tensor([math.pi, math.pi / 2])

    def model():
        place = pyro.sample("place", dist.Uniform(-width, width).to_event(1))
        pyro.sample("x", dist.VonMises(place[0], 10.0), obs=torch.tensor(3.1))
        pyro.sample("y", dist.Normal(place[1], 0.1), obs=torch.tensor(0.3))

    guide = fitted(model, num_steps=100)
    exact = -math.log(2 * math.pi) - math.log(math.pi)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.01)
    assert guide.median()["place"][1] == pytest.approx(0.3, abs=0.03)


def test_an_angle_that_is_folded_does_not_go_round():
    """Both ends of half a circle were taken for one point, and the start put on it, where the density had a jump."""

    def model():
        a = pyro.sample("a", dist.FoldedDistribution(dist.VonMises(0.0, 0.001)))
        pyro.factor("x", 1.5 * torch.cos(2 * a))

    guide = fitted(model, num_steps=150)
    assert rn.diagnose(guide).log_evidence == pytest.approx(0.499, abs=0.01)
    assert not guide.turn.any()


def test_ends_of_a_period_that_only_happen_to_be_alike():
    """The square of a uniform number. A start where the ends are joined, at a kink, would be refused."""

    def model():
        a = pyro.sample("a", dist.Uniform(-math.pi, math.pi))
        pyro.sample("y", dist.Normal(a**2, 0.5), obs=torch.tensor(9.6))

    a = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    log_p = dist.Normal(a**2, 0.5).log_prob(torch.tensor(9.6)) - math.log(2 * math.pi)
    exact = torch.trapezoid(log_p.exp(), a).log().item()
    assert rn.diagnose(fitted(model, num_steps=300)).log_evidence == pytest.approx(exact, abs=0.03)


def test_a_turn_is_no_dynamic_support():
    """The model was run again at each draw, and a guide from a file could not draw without its model."""
    guide = fitted(lambda: pyro.sample("a", dist.VonMises(3.0, 4.0)), num_steps=10)
    assert guide.turn.any() and not guide._has_dynamic_supports


@pytest.mark.filterwarnings("ignore:draws of the latent 'p' gather")
def test_a_number_between_bounds_is_no_angle():
    """Both ends of a beta distribution have a high density, and lie far from each other all the same."""

    def model():
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.factor("beta", -0.8 * p.log() - 0.8 * (-p).log1p())

    guide = fitted(model, num_steps=150)
    exact = 2 * math.lgamma(0.2) - math.lgamma(0.4)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.05)


HOURS = torch.distributions.AffineTransform(0.0, 12 / math.pi)

ANGLES = {
    "skewed": (lambda: dist.SineSkewed(dist.VonMises(P2, 1 + P2).to_event(1), torch.tensor([0.2, 0.5])), math.pi),
    "two": (lambda: dist.SineBivariateVonMises(0.3, -0.5, 1.0, 2.0, correlation=torch.tensor(0.5)), math.pi),
    "masked": (lambda: dist.VonMises(P2, 1 + P2).mask(torch.tensor(True)).expand([2]).to_event(1), math.pi),
    "mixture": (
        lambda: dist.MixtureSameFamily(dist.Categorical(P2), dist.VonMises(P2, 1 + P2)).expand([2]).to_event(1),
        math.pi,
    ),
    "folded": (lambda: dist.FoldedDistribution(dist.VonMises(P2, 1 + P2)).to_event(1), math.pi),
    "hours": (lambda: dist.TransformedDistribution(dist.VonMises(P2, 1 + P2), [HOURS]).to_event(1), 12.0),
}
P2 = torch.tensor([0.4, 0.6])


@pytest.mark.parametrize("kind", ANGLES)
def test_densities_of_angles_repeat_themselves(kind):
    """Pyro names the real line as their support, on which they have no finite mass: log evidences of 2 and 5 came."""
    make, half = ANGLES[kind]

    def model():
        a = pyro.sample("a", make())
        pyro.sample("y", dist.Normal((a * math.pi / half).cos(), 0.8).to_event(1), obs=torch.tensor([0.7, 0.1]))

    line = torch.linspace(0.0 if kind == "folded" else -half, half, 401)[1:]
    grid = torch.cartesian_prod(line, line)
    likelihood = dist.Normal((grid * math.pi / half).cos(), 0.8).to_event(1).log_prob(torch.tensor([0.7, 0.1]))
    exact = ((make().log_prob(grid) + likelihood).double().logsumexp(0) + 2 * (line[1] - line[0]).log()).item()
    guide = fitted(model, num_steps=100)
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.06)
    assert guide.sample(1000)["a"].abs().max() <= half


TRIL = torch.eye(2).repeat(2, 1, 1)
MIXTURES = {
    "real": lambda: dist.Normal(torch.tensor([-0.5, 1.0]), torch.tensor([0.5, 1.0])),
    "vectors": lambda: dist.MultivariateNormal(torch.tensor([[-0.5, 0.0], [1.0, 1.0]]), scale_tril=TRIL),
    "positive": lambda: dist.Gamma(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 4.0])),
    "bounded": lambda: dist.Beta(torch.tensor([2.0, 5.0]), torch.tensor([4.0, 2.0])),
    "bounded events": lambda: dist.Uniform(torch.zeros(2, 3), torch.ones(2, 3)).to_event(1),
    "bounded rows": lambda: dist.Uniform(torch.tensor([[0.0], [2.0]]).expand(2, 2), torch.tensor([[1.0], [3.0]])),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_as_a_prior(kind):
    """Torch knows no unconstrained coordinates for the support of a mixture."""

    def model():
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(P2), MIXTURES[kind]()))

    guide = fitted(model, num_steps=150)
    assert rn.diagnose(guide).log_evidence == pytest.approx(0.0, abs=0.1)
    prior = dist.MixtureSameFamily(dist.Categorical(P2), MIXTURES[kind]())
    means = guide.sample(4000)["z"].mean(0)
    torch.testing.assert_close(means, prior.expand([2]).mean.expand_as(means), rtol=0.1, atol=0.1)


def test_a_mixture_of_several_supports_is_refused():
    def model():
        components = dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]))
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(P2), components))

    with pytest.raises(ValueError, match=r"'z' has the support MixtureSameFamilyConstraint.*no unconstrained coord"):
        rn.AutoRealNVP(model).build()


def test_new_arguments_that_move_a_support_on_which_another_depends():
    def model(y, low):
        t = pyro.sample("t", dist.Uniform(low, low + 4.0))
        u = pyro.sample("u", dist.Uniform(low, t))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    arguments = [(torch.tensor(low + 0.3), torch.tensor(low)) for low in (0.0, 5.0)]
    guide = rn.AutoRealNVP(model, num_couplings=2)
    rn.fit_guide(guide, *arguments[0], num_steps=100, progress=False)
    one, other = (rn.diagnose(guide, *each).log_evidence for each in arguments)
    assert one == pytest.approx(-1.252, abs=0.02) and other == pytest.approx(one, abs=0.02)
    assert 0 < guide(*arguments[1])["u"] < 4
    assert 5 < guide.build(*arguments[1]).sample(1)["u"] < 9


def contextual(x, y=None):
    """A prior, and a support, that depend on an argument."""
    low = pyro.sample("low", dist.Uniform(-5.0 * x.max(), 0.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(mean, x.std()))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 5.0), obs=y)
    return low


def by_svi(guide, *args):
    svi = SVI(guide.plain_model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(*args)


@pytest.mark.parametrize("train", [lambda *a: rn.fit_guide(*a, num_steps=30, progress=False), by_svi])
def test_the_arguments_of_a_prediction_do_not_move_the_posterior(train):
    """The draws were carried over into the coordinates of the new arguments."""
    x, guide = torch.tensor([1.0, 2.0, 4.0]), rn.AutoRealNVP(contextual, num_couplings=2, hidden_dims=(16,))
    train(guide, x, 3 * x)
    assert list(guide.relative) == ["slope"]
    precision = (x**2).sum() / 25 + 1 / (1 + x.var())
    exact = 3 * (x**2).sum() / 25 / precision
    for scale in (1.0, 10.0, 0.1):
        draws = Predictive(contextual, guide=guide, num_samples=400)(scale * x)
        assert draws["low"].mean().item() == pytest.approx(-10.0, abs=2.0)
        assert draws["slope"].mean().item() == pytest.approx(exact.item(), abs=0.2)
        assert guide.quantiles([0.0], scale * x)["low"].item() < -18
        transform = guide.get_transform(scale * x)
        assert torch.equal(transform(torch.ones(3)), guide.get_transform(x, 3 * x)(torch.ones(3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_masked_prior_of_rows_that_the_first_subsample_lacks(seed):
    """The latent was dropped, and its value 0, or the guide did not fit the model, where the second look differed."""
    pyro.set_rng_seed(seed)
    group = torch.tensor([0] * 50 + [1] * 49 + [2])
    x = torch.randn(100) + group
    x[99] = 10.0

    def model():
        with pyro.plate("groups", 3), poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=5) as rows:
            pyro.sample("x", dist.Normal(z[group[rows]], 1.0), obs=x[rows])

    guide = fitted(model, num_steps=30)
    draws = guide.sample(2000)["z"]
    exact = torch.stack([x[group == k].mean() for k in range(3)])
    torch.testing.assert_close(draws.mean(0), exact, atol=0.15, rtol=0.0)
    torch.testing.assert_close(draws.std(0), 1 / group.bincount().sqrt(), atol=0.1, rtol=0.0)


def test_a_guide_that_nobody_has_trained_takes_the_arguments_of_the_training():
    x = torch.tensor([1.0, 2.0, 4.0])
    guide = rn.AutoRealNVP(contextual, num_couplings=2, hidden_dims=(16,)).build(x, 3 * x)
    by_svi(guide, 10 * x, 30 * x)
    assert guide.sample(1000)["low"].min() < -150


def test_a_latent_from_a_delta_is_named():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("e", dist.Delta(2 * z))

    with pytest.raises(ValueError, match=r"\['e'\] are drawn from a Delta.*pyro.deterministic"):
        rn.AutoRealNVP(model).build()


# -- hierarchies -------------------------------------------------------------------------------------------------------


def hierarchy(groups):
    """The model, and the exact mean and deviation of tau and the evidence, by a grid."""
    y = 2.0 + 0.6 * torch.randn(groups, generator=torch.Generator().manual_seed(0))
    y = y + torch.randn(groups, generator=torch.Generator().manual_seed(1))

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    mu, tau = torch.meshgrid(torch.linspace(-2, 6, 801), torch.linspace(0.002, 3, 1500), indexing="ij")
    variance = (1 + tau.square()).double()
    squares = (y.double().square().sum() - 2 * mu * y.sum() + groups * mu.square()) / variance
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(1.0).log_prob(tau)
    log_p = log_p - 0.5 * (groups * (2 * math.pi * variance).log() + squares)
    weights = log_p.flatten().softmax(0)
    mean = (weights * tau.flatten()).sum()
    deviation = ((weights * tau.flatten().square()).sum() - mean**2).sqrt()
    return model, mean.item(), deviation.item(), (log_p.flatten().logsumexp(0) + math.log(0.01 * 0.002)).item()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [8, 48, 98, 99])
def test_a_centered_hierarchy(groups):
    model, mean, deviation, evidence = hierarchy(groups)
    guide = rn.AutoRealNVP(model)
    history = rn.fit_guide(guide, num_steps=300, progress=False)
    tau = guide.sample(20_000)["tau"]
    assert history.skipped_steps == 0 and -history.best_loss == pytest.approx(evidence, abs=0.1)
    assert abs(tau.mean() - mean) < 0.1 * deviation and tau.std() == pytest.approx(deviation, rel=0.1)


@pytest.mark.slow
def test_coordinates_relative_to_priors_are_undone_for_pyro():
    model, _, _, evidence = hierarchy(8)
    guide = rn.AutoRealNVP(model)
    rn.fit_guide(guide, num_steps=200, progress=False)
    assert set(guide.relative) == {"theta"}
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    assert -elbo.loss(model, guide) == pytest.approx(evidence, abs=0.15)
    transform, base = guide.get_transform(), guide.get_base_dist()
    noise = base.sample((3,))
    z = transform(noise)
    torch.testing.assert_close(transform.inv(z), noise, atol=1e-4, rtol=1e-4)
    ladj = transform.log_abs_det_jacobian(noise, z)
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(transform, noise[k])
        assert ladj[k].item() == pytest.approx(jacobian.slogdet()[1].item(), abs=1e-3)
    reparam = NeuTraReparam(guide)
    warped = poutine.reparam(model, config=lambda _: reparam)
    draw = base.sample()
    trace = poutine.trace(poutine.condition(warped, {"mu_shared_latent": draw})).get_trace()
    density = LogDensity(model)
    density.relative = guide.relative
    inner = guide.transform
    expected = density.one(inner(draw)) + inner.log_abs_det_jacobian(draw, inner(draw))
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=1e-3)


def effects(x, y=None):
    slope, tau = pyro.sample("slope", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.LogNormal(0.0, 0.2))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(slope * x, tau))
        pyro.sample("y", dist.Normal(theta, 0.3), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_of_a_hierarchy(parallel):
    x, y = torch.arange(4.0), 2 * torch.arange(4.0)
    guide = rn.AutoRealNVP(effects)
    rn.fit_guide(guide, x, y, num_steps=100, progress=False)
    predictive = Predictive(effects, guide=guide, num_samples=300, parallel=parallel)
    draws = predictive(x)["y"].reshape(300, 4)
    assert (draws.mean(0) - y).abs().max() < 0.3
    before = guide.sample(4000)["theta"].mean(0)
    rn.diagnose(guide, x + 5, y)
    torch.testing.assert_close(guide.sample(4000)["theta"].mean(0), before, atol=0.1, rtol=0)


def test_a_pickled_guide_of_a_hierarchy_takes_its_model_back():
    x, y = torch.arange(4.0), 2 * torch.arange(4.0)
    guide = rn.AutoRealNVP(effects)
    rn.fit_guide(guide, x, y, num_steps=20, progress=False)
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="depend on its model"):
        other.sample(3)
    assert rn.diagnose(other, x, y, model=effects).effective_sample_size > 100
    torch.manual_seed(0)
    expected = guide.sample(3)
    torch.manual_seed(0)
    torch.testing.assert_close(other.sample(3), expected)


@pytest.mark.slow
def test_pyros_vectorized_enumeration_beside_relative_coordinates():
    @config_enumerate
    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(theta * z, 0.5), obs=torch.tensor([1.0, 0.2, 0.9]))

    guide = fitted(model, num_steps=100)
    assert set(guide.relative) == {"theta"}
    one, many = (
        TraceEnum_ELBO(num_particles=400, max_plate_nesting=1, vectorize_particles=vectorized).loss(model, guide)
        for vectorized in (False, True)
    )
    assert one == pytest.approx(many, abs=0.1)


def random_effects(family):
    groups = torch.arange(60) % 12
    truth = torch.randn(12, generator=torch.Generator().manual_seed(0))
    counts = dist.Poisson((0.5 + 0.7 * truth[groups]).exp())
    torch.manual_seed(1)
    y = counts.sample()

    def model():
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 12):
            effect = pyro.sample("effect", family(mu, tau))
        effect = effect.log() if family is dist.LogNormal else effect
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Poisson(effect[groups].exp()), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [dist.Normal, dist.LogNormal, dist.Laplace, functools.partial(dist.StudentT, 4.0)],
    ids=["normal", "lognormal", "laplace", "student"],
)
def test_priors_with_a_location_and_a_scale(family):
    guide = fitted(random_effects(family), num_steps=300)
    assert set(guide.relative) == {"effect"}
    report = rn.diagnose(guide)
    assert report.pareto_k < 0.7 and report.log_evidence - report.elbo < 0.3


def gaussian_process():
    """Its log-evidence, and the means of the logarithms of both hyperparameters, by a grid."""
    x = torch.linspace(0.0, 5.0, 12)
    squares = (x[:, None] - x).square()
    y = 1.5 * torch.sin(1.5 * x) + 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(0))

    def covariance(amplitude, length):
        return amplitude.square() * (-squares / (2 * length.square())).exp() + 1e-4 * torch.eye(12)

    def model():
        amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.5))
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(12), covariance(amplitude, length)))
        with pyro.plate("n", 12):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    steps = torch.linspace(-2, 2.5, 80)
    grid = torch.cartesian_prod(steps, steps)
    prior = dist.Normal(0.0, 0.5).log_prob(grid).sum(-1)
    noise = 0.09 * torch.eye(12)
    marginals = [
        dist.MultivariateNormal(torch.zeros(12), covariance(a.exp(), b.exp()) + noise).log_prob(y) for a, b in grid
    ]
    log_p = prior + torch.stack(marginals)
    return model, log_p.logsumexp(0).item() + 2 * math.log(4.5 / 79), log_p.softmax(0) @ grid


@pytest.mark.slow
def test_a_multivariate_prior_that_depends_on_latents():
    model, evidence, means = gaussian_process()
    guide = fitted(model, num_steps=200)
    assert set(guide.relative) == {"f"}
    report = rn.diagnose(guide)
    assert report.log_evidence == pytest.approx(evidence, abs=0.05) and evidence - report.elbo < 0.1
    draws = guide.sample(5000)
    for name, mean in zip(("amplitude", "length"), means):
        assert draws[name].log().mean() == pytest.approx(mean.item(), abs=0.04)
    transform, noise = guide.get_transform(), guide.get_base_dist().sample()
    jacobian = torch.autograd.functional.jacobian(transform, noise)
    assert transform.log_abs_det_jacobian(noise, transform(noise)).item() == pytest.approx(
        jacobian.slogdet()[1].item(), abs=0.05
    )
    torch.testing.assert_close(transform.inv(transform(noise)), noise, atol=0.01, rtol=0.01)


def test_a_draw_with_a_singular_matrix_is_rejected_and_the_others_are_not():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.linalg.cholesky(torch.eye(2) * z).diagonal().log().sum())

    density = LogDensity(model, values={"z": torch.tensor(1.0)})
    values = density(torch.tensor([[1.0], [-1.0], [2.0]]))
    assert values.isfinite().tolist() == [True, False, True] and values[1] == -math.inf


# -- entries that are missing ------------------------------------------------------------------------------------------

SEEN = torch.tensor([True, True, False, True])


def with_a_missing_entry():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 4):
        pyro.sample("x", dist.Normal(m, 1.0), obs=torch.tensor([1.0, 2.0, 0.0, 0.5]), obs_mask=SEEN)


def test_entries_that_a_mask_takes_out_are_no_latents():
    guide = fitted(with_a_missing_entry, num_steps=100)
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(torch.tensor([1.0, 2.0, 0.5])).item()
    draws = guide.sample(20_000)
    assert guide.latent_dim == 2
    assert draws["m"].mean() == pytest.approx(0.875, abs=0.02) and draws["m"].std() == pytest.approx(0.5, abs=0.01)
    assert draws["x_unobserved"][:, 2].std() == pytest.approx(1.25**0.5, abs=0.03)
    assert rn.diagnose(guide).log_evidence == pytest.approx(evidence, abs=0.01)
    elbos = [-Trace_ELBO().loss(with_a_missing_entry, guide) for _ in range(10)]
    assert max(abs(elbo - evidence) for elbo in elbos) < 0.2


@pytest.mark.slow
def test_missing_covariates():
    seen = torch.rand(N, 2, generator=torch.Generator().manual_seed(3)) > 0.15

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("rows", N, dim=-2), pyro.plate("columns", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.where(seen, X, 0.0), obs_mask=seen)
        with pyro.plate("responses", N):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=RESPONSE)

    guide = fitted(model, num_steps=200)
    assert guide.latent_dim == 2 + int((~seen).sum())
    report = rn.diagnose(guide)
    assert report.pareto_k < 0.7 and report.log_evidence - report.elbo < 0.2


def test_a_masked_prior_keeps_its_latent_if_the_likelihood_depends_on_it():
    y = 3 + torch.randn(100, generator=torch.Generator().manual_seed(0))

    def model():
        with poutine.mask(mask=torch.tensor(False)):
            loc = pyro.sample("loc", dist.Normal(0.0, 1e-3))
        with pyro.plate("rows", 100):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    draws = fitted(model, num_steps=50).sample(5000)["loc"]
    assert draws.mean() == pytest.approx(y.mean().item(), abs=0.02) and draws.std() == pytest.approx(0.1, rel=0.05)


def test_a_masked_prior_that_depends_on_latents_keeps_its_volume():
    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("n", 3), poutine.mask(mask=torch.tensor(False)):
            t = pyro.sample("t", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(t, 1.0).to_event(1), obs=torch.tensor([1.0, 2.0, 3.0]))

    guide = fitted(model, num_steps=200)
    assert rn.diagnose(guide).log_evidence == pytest.approx(0.0, abs=0.02)
    assert guide.sample(20_000)["tau"].mean() == pytest.approx(math.exp(0.125), abs=0.03)


def test_a_latent_behind_a_corner_keeps_its_influence():
    def model():
        with poutine.mask(mask=torch.tensor([False, True])), pyro.plate("n", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.relu().sum(), 1.0), obs=torch.tensor(1.0))

    density = LogDensity(model, values={"z": torch.tensor([-0.1, -0.1])})
    assert density.dim == 2


def no_data():
    """A straight line has no curvature either, and is not flat."""
    pyro.sample("v", dist.Laplace(0.0, 1.0))


def test_a_straight_line_is_not_flat():
    rn.AutoRealNVP(no_data).build()


def flat():
    a, b = (pyro.sample(name, dist.ImproperUniform(dist.constraints.real, (), ())) for name in "ab")
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(2.0))


def without_influence():
    pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(("model", "names"), [(flat, r"\['a', 'b'\]"), (without_influence, r"\['a'\]")])
def test_flat_directions_are_named(model, names):
    with pytest.warns(RuntimeWarning, match=f"does not change along a direction of the latents {names}"):
        guide = rn.AutoRealNVP(model).build()
    assert guide.sample(1000)["a"].std() < 10


# -- discrete latents, summed over -------------------------------------------------------------------------------------


@config_enumerate
def clusters(size=None):
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("n", 3, subsample_size=size) as rows:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(m * z, 0.5), obs=torch.tensor([2.0, 2.2, 0.1])[rows])


def exact_clusters():
    m = torch.linspace(-10, 10, 4001)
    log_p = dist.Normal(0.0, 3.0).log_prob(m)
    for x in (2.0, 2.2, 0.1):
        both = torch.stack([dist.Normal(loc, 0.5).log_prob(torch.tensor(x)) for loc in (m, torch.zeros_like(m))])
        log_p = log_p + both.logsumexp(0) + math.log(0.5)
    weights = log_p.softmax(0)
    mean = (weights * m).sum()
    deviation = ((weights * m * m).sum() - mean**2).sqrt()
    return mean.item(), deviation.item(), (log_p.logsumexp(0) + math.log(0.005)).item()


@pytest.mark.slow
def test_discrete_latents_are_summed_over():
    mean, deviation, evidence = exact_clusters()
    guide = fitted(clusters, num_steps=200)
    draws = guide.sample(20_000)["m"]
    assert draws.mean() == pytest.approx(mean, abs=0.03) and draws.std() == pytest.approx(deviation, rel=0.05)
    assert rn.diagnose(guide).log_evidence == pytest.approx(evidence, abs=0.01)
    posterior = rn.neutra(guide, num_samples=300, warmup_steps=100, progress=False).samples["m"]
    assert posterior.mean() == pytest.approx(mean, abs=0.1) and posterior.std() == pytest.approx(deviation, rel=0.25)


def test_discrete_latents_under_a_subsampled_plate():
    density, whole = LogDensity(clusters, (1,)), LogDensity(clusters)
    for m in (-0.5, 2.0):
        rows = density.passes()
        mean = density.mean_over(torch.tensor([[m]]), rows).item()
        assert len(rows) == 3 and mean == pytest.approx(whole.one(torch.tensor([m])).item(), abs=1e-5)


@pytest.mark.slow
def test_discrete_latents_with_pyros_loss_and_guide():
    mean, _, evidence = exact_clusters()
    guide = AutoNormal(poutine.block(clusters, hide=["z"]))
    history = rn.fit_guide(guide, model=clusters, num_steps=300, lr=0.05, progress=False)
    assert -history.best_loss == pytest.approx(evidence, abs=0.1)
    other = rn.AutoRealNVP(clusters)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    rn.fit_guide(other, loss=loss, num_steps=50, validation_particles=10, progress=False)
    assert other.median()["m"].item() == pytest.approx(mean, abs=0.3)


def test_masked_sites_count_no_states():
    @config_enumerate
    def model(length):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        z = torch.tensor(0)
        for t in range(3):
            with poutine.mask(mask=torch.tensor(t < length)):
                z = pyro.sample(
                    f"z_{t}", dist.Categorical(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])[z.clamp(max=1)])
                )
                pyro.sample(f"x_{t}", dist.Normal(m + z, 1.0), obs=torch.tensor(1.0))

    m = torch.tensor(0.3)
    first = dist.Normal(m + torch.arange(3.0), 1.0).log_prob(torch.tensor(1.0)) + torch.tensor([0.6, 0.3, 0.1]).log()
    exact = dist.Normal(0.0, 1.0).log_prob(m) + first.logsumexp(0)
    assert LogDensity(model, (1,)).one(m.reshape(1)).item() == pytest.approx(exact.item(), abs=1e-5)


MARKOV_Y = torch.tensor([-1.2, -0.8, 2.1, 1.7, -0.9, 2.4, 2.2, -1.1])


def markov(by_index=True):
    @config_enumerate
    def model():
        stay = pyro.sample("stay", dist.Beta(torch.tensor([5.0, 2.0]), torch.tensor([2.0, 5.0])).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(MARKOV_Y))):
            p = Vindex(stay)[z] if by_index else torch.where(z == 0, stay[0], stay[1])
            z = pyro.sample(f"z_{t}", dist.Bernoulli(1 - p)).long()
            mean = Vindex(loc)[z] if by_index else torch.where(z == 0, loc[0], loc[1])
            pyro.sample(f"y_{t}", dist.Normal(mean, 0.7), obs=MARKOV_Y[t])

    return model


def forward_algorithm(stay, loc):
    log_p = dist.Beta(torch.tensor([5.0, 2.0]), torch.tensor([2.0, 5.0])).log_prob(stay).sum()
    log_p = log_p + dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).log_prob(loc).sum()
    transition = torch.stack([stay, 1 - stay], -1).log()
    state = transition[0]
    for t, y in enumerate(MARKOV_Y):
        state = (state[:, None] + transition).logsumexp(0) if t else state
        state = state + dist.Normal(loc, 0.7).log_prob(y)
    return log_p + state.logsumexp(0)


@pytest.mark.slow
@pytest.mark.parametrize("by_index", [True, False], ids=["Vindex", "where"])
def test_a_hidden_markov_model_has_the_density_of_the_forward_algorithm(by_index):
    guide = rn.AutoRealNVP(markov(by_index))
    history = rn.fit_guide(guide, num_steps=100, progress=False)
    report = rn.diagnose(guide, num_samples=500)
    assert "good" in str(report) and -history.best_loss < report.log_evidence + 0.05
    density = LogDensity(markov(by_index))
    draws = {name: values[:8] for name, values in report.draws.items()}
    exact = torch.stack([forward_algorithm(draws["stay"][k], draws["loc"][k]) for k in range(8)])
    torch.testing.assert_close(density(draws), exact, rtol=1e-4, atol=1e-4)


# -- what is an error --------------------------------------------------------------------------------------------------


def noisy():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + 0.1 * torch.randn(()), 1.0), obs=torch.tensor(0.0))


calls = []


def remembering():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    calls.append(1)
    pyro.factor("f", torch.tensor(float(len(calls))))
    return z


def over_the_batch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    inside = torch._C._functorch.is_batchedtensor(z)
    pyro.factor("f", torch.tensor(1.0 if inside else 0.0))


def outside():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([1.0, 2.5, 2.0]))


def detached():
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.stack([a, b.detach()]), 1.0).to_event(1), obs=torch.ones(2))


def other_entries():
    guide = rn.AutoRealNVP(lambda seen: with_missing(seen)).build(SEEN)
    rn.diagnose(guide, ~SEEN)


def with_missing(seen):
    with pyro.plate("n", 4):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(4), obs_mask=seen)


def wishart():
    pyro.sample("w", dist.Wishart(torch.tensor(20.0), torch.eye(2)))


def fit(model, guide=rn.AutoRealNVP):
    return lambda: rn.fit_guide(guide(model), num_steps=5, progress=False)


@pytest.mark.filterwarnings("ignore:Singular sample")
@table(
    ("make", "message"),
    {
        "hidden and random": (fit(poutine.block(clusters, hide=["z"])), "random numbers.*poutine.block.*config_enum"),
        "hidden, Pyro's guide": (fit(poutine.block(clusters, hide=["z"]), AutoNormal), "random numbers.*poutine.block"),
        "noise": (fit(noisy), "random numbers that the guide does not draw"),
        "noise, Pyro's guide": (fit(noisy, AutoNormal), "random numbers that the guide does not draw"),
        "state": (fit(remembering), "two evaluations of the model at the same latents"),
        "the batch": (fit(over_the_batch), "depend on the batch"),
        "data outside the support": (fit(outside), "log_prob at site 'y'"),
        "data outside, Pyro's guide": (fit(outside, AutoNormal), "log_prob at site 'y'"),
        "detached": (fit(detached), "with the latent 'b' in another way.*detaches the latent"),
        "other entries": (other_entries, "other entries of them are missing"),
        "all masked": (fit(poutine.mask(dynamic, mask=False)), "no latent variables that the density counts"),
        "symmetric": (fit(wishart), "'w' is a symmetric matrix.*Cholesky"),
        "discrete": (fit(lambda: pyro.sample("k", dist.Poisson(2.0))), "'k' is discrete.*config_enumerate"),
        "sphere": (fit(lambda: pyro.sample("s", dist.ProjectedNormal(torch.ones(3)))), "'s' has the support.*draw"),
    },
)
def test_an_error_and_no_wrong_number(make, message):
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        make()


# -- memory, rows, precision, files ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pieces_that_fit_the_memory_give_the_same_numbers():
    model = regression(WRITINGS["X @ b"])
    guide = rn.AutoRealNVP(model).build()
    reports, losses = [], []
    for memory in (1, 2000, 2**29):
        pyro.set_rng_seed(0)
        reports.append(rn.diagnose(guide, memory=memory, num_samples=50).log_evidence)
        clone = rn.AutoRealNVP(model).build()
        losses.append(rn.fit_guide(clone, seed=0, memory=memory, num_steps=3, progress=False).best_loss)
    assert max(reports) - min(reports) < 1e-3 and max(losses) - min(losses) < 1e-3
    density = LogDensity(model)
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    check(density, points.detach()[:2])
    (whole,) = torch.autograd.grad(density(points).sum(), points)
    density.memory = 3 * density.bytes_per_draw
    (pieces,) = torch.autograd.grad(density(points).sum(), points)
    assert density.piece == 3
    torch.testing.assert_close(pieces, whole)


SHIFTS = torch.tensor([-1.0, 0.5, 0.9, 2.0])
WAITS = torch.tensor([1.0, 2.5, 0.7])


def shifted(fn, **options):
    """A model with the observations WAITS - a, which are negative where a is larger."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", fn(**options), obs=WAITS - a)

    return model


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (shifted(dist.Exponential, rate=1.0), lambda a: torch.where(a < 0.7, 3 * a - 4.2, -torch.inf)),
        (
            shifted(lambda: dist.Exponential(torch.ones(3)).mask(WAITS > 0.8)),
            lambda a: torch.where(a < 1.0, 2 * a - 3.5, -torch.inf),
        ),
        (
            poutine.mask(shifted(lambda: dist.Exponential(torch.ones(3)).mask(WAITS > 0.8)), torch.tensor(False)),
            lambda a: 0.5 * a.square() + math.log(2 * math.pi) / 2,  # the prior is masked, too
        ),
        (shifted(dist.Exponential, rate=1.0, validate_args=False), lambda a: 3 * a - 4.2),
        (
            shifted(dist.Gamma, concentration=1.0, rate=1.0),
            lambda a: torch.where(a < 0.7, 3 * a - 4.2, -torch.inf),
        ),
    ],
    ids=["one site", "distribution's mask", "poutine.mask", "without validation", "gamma"],
)
def test_observations_outside_of_their_support_have_density_zero(model, exact, is_mapped):
    density = LogDensity(model, values={"a": torch.tensor(0.0)})
    density.is_mapped = is_mapped
    expected = dist.Normal(0.0, 1.0).log_prob(SHIFTS) + exact(SHIFTS)
    torch.testing.assert_close(density({"a": SHIFTS}), expected)


def test_parameters_that_are_invalid_have_density_zero():
    """Gamma's formula gives a number for the concentration -0.5, too."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Gamma(a, 1.0).to_event(1), obs=torch.ones(2))

    density = LogDensity(model, values={"a": torch.ones(2)})
    points = torch.tensor([[0.5, 1.0], [0.5, -0.5]], requires_grad=True)
    log_p = density({"a": points})
    expected = dist.Normal(0.0, 1.0).log_prob(points[0]) + dist.Gamma(points[0], 1.0).log_prob(torch.ones(2))
    torch.testing.assert_close(log_p, torch.stack([expected.sum(), torch.tensor(-torch.inf)]))
    log_p.sum().backward()
    assert points.grad.isfinite().all()


P = torch.tensor([0.2, 0.3, 0.5])
VALID = {
    "mixture of normals": (dist.MixtureOfDiagNormals(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)), (3,)),
    "scale mixture": (dist.GaussianScaleMixture(torch.ones(3), torch.zeros(2), torch.ones(2)), (3,)),
    "logistic normal": (dist.LogisticNormal(torch.zeros(2), torch.ones(2)), (3,)),
    "vector parameter": (dist.MultivariateStudentT(3 * torch.ones(4), torch.zeros(3), torch.eye(3)), (4, 3)),
    "nested wrappers": (dist.Gamma(torch.ones(1), P.expand(4, 3)).mask(P > 0.2).to_event(1).expand([2, 4]), (2, 4, 3)),
    "mixture": (dist.MixtureSameFamily(dist.Categorical(P.expand(4, 3)), dist.Exponential(P.expand(4, 3))), (4,)),
    "components with other supports": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(20, 2)),
            dist.Uniform(0.0, torch.tensor([1.0, 9.0]), validate_args=False).expand([20, 2]),
            validate_args=False,
        ),
        (20,),
    ),
    "pareto": (dist.Pareto(P, P), (3,)),
    "zero-inflated": (dist.ZeroInflatedPoisson(P, gate=torch.tensor(0.3)), (3,)),
    "one-hot": (dist.OneHotCategorical(P.expand(4, 3)), (4, 3)),
    "ordered": (dist.OrderedLogistic(P, torch.tensor([-1.0, 1.0])), (3,)),
    "cholesky": (dist.LKJCholesky(3, torch.tensor(1.0)), (3, 3)),
    "covariance": (dist.MultivariateNormal(torch.zeros(2, 3), 0.5 + torch.eye(3)), (2, 3)),
    "gumbel": (dist.Gumbel(torch.tensor([-20.0, 0.0, 5.0]), 1.0), (3,)),
    "improper": (dist.ImproperUniform(constraints.positive, (2,), (3,)), (2, 3)),
    "transformed": (dist.TransformedDistribution(dist.Exponential(P), [T.AffineTransform(1.0, 2.0)]), (3,)),
    "masked mixture": (
        dist.MaskedMixture(P > 0.2, dist.VonMises(P, 0.25 - P, validate_args=False), dist.VonMises(P, P)),
        (3,),
    ),
    "hidden states": (dist.DiscreteHMM(P, torch.zeros(3, 3), dist.Poisson(P), duration=5), (5,)),
    "skewed": (dist.SineSkewed(dist.VonMises(P, P).to_event(1), torch.full((3,), 0.1)), (3,)),
    "folded": (dist.FoldedDistribution(dist.StudentT(P, P, P)), (3,)),
    "counts": (dist.BetaBinomial(P, P, 5.0), (3,)),
    "gamma-poisson": (dist.GammaPoisson(P, P), (3,)),
    "multinomial": (dist.Multinomial(4, P.expand(2, 3)), (2, 3)),
    "relaxed": (dist.RelaxedOneHotCategorical(P[0], P.expand(2, 3)), (2, 3)),
    "correlation": (dist.LKJ(3, torch.tensor([0.5, 1.0])), (2, 3, 3)),
    "F": (dist.FisherSnedecor(P, P), (3,)),
    "low-rank": (dist.LowRankMultivariateNormal(torch.zeros(2, 3), torch.ones(3, 1), P), (2, 3)),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_values_keep_their_density(name):
    """The parameters of many distributions have axes of the event, which no log-density has."""
    fn, shape = VALID[name]
    value = torch.full(shape, 0.7) if name in ("improper", "gumbel", "masked mixture") else fn.sample()
    assert value.shape == shape
    trace = poutine.trace(lambda: pyro.sample("x", fn, obs=value)).get_trace()
    apply_validity(trace, ["x"])
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], fn.log_prob(value))


INVALID = {
    "shifted": lambda s: (dist.TransformedDistribution(dist.Gamma(1.0, torch.ones(3)), [T.AffineTransform(s, 1.0)]), P),
    "mixture": lambda s: (dist.MixtureSameFamily(dist.Categorical(P), dist.Exponential(P)), 0.6 - s),
    "weights": lambda s: (dist.MixtureSameFamily(dist.Categorical(torch.stack([s, 1 - s])), dist.Normal(0, P[:2])), s),
    "categorical": lambda s: (dist.Categorical(torch.stack([s / 2, s / 2, 1 - s])), torch.tensor(0)),
    "one-hot": lambda s: (dist.OneHotCategorical(torch.stack([s / 2, s / 2, 1 - s])), torch.tensor([1.0, 0.0, 0.0])),
    "multinomial": lambda s: (dist.Multinomial(2, torch.stack([s / 2, s / 2, 1 - s])), torch.tensor([1.0, 1.0, 0.0])),
    "cutpoints": lambda s: (dist.OrderedLogistic(P[0], torch.stack([s, torch.tensor(1.0)])), torch.tensor(0)),
    "simplex": lambda s: (dist.Dirichlet(torch.ones(2)), torch.stack([s, 1 - s])),
    "cholesky": lambda s: (dist.MultivariateNormal(P[:2], scale_tril=(1 - s) * torch.eye(2)), P[:2]),
    "base": lambda s: (dist.TransformedDistribution(dist.VonMises(0.0, 1 - s), [T.AffineTransform(0.0, 1.0)]), P[0]),
    "zero-inflated": lambda s: (dist.ZeroInflatedPoisson(1 - s, gate=P), torch.ones(3)),
    "any zero-inflated": lambda s: (
        dist.ZeroInflatedDistribution(dist.GammaPoisson(1 - s, P), gate=torch.tensor(0.5)),
        torch.ones(3),
    ),
    "masked mixture": lambda s: (dist.MaskedMixture(P > 0.2, dist.VonMises(0.0, P), dist.VonMises(P, 1 - s)), P),
    "component": lambda s: (
        dist.MixtureSameFamily(dist.Categorical(P[:2]), dist.VonMises(0.0, torch.stack([1 - s, s]))),
        P,
    ),
    "hidden states": lambda s: (
        dist.DiscreteHMM(P[:2], torch.zeros(2, 2), dist.VonMises(0.0, torch.stack([1 - s, s])), duration=3),
        P,
    ),
    "skewed": lambda s: (dist.SineSkewed(dist.VonMises(P, 1 - s).to_event(1), torch.full((3,), 0.1)), P),
}


@pytest.mark.parametrize("name", INVALID)
def test_all_kinds_of_invalid_values_have_density_zero(name):
    def model():
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        fn, value = INVALID[name](s)
        pyro.sample("y", fn, obs=value)

    good, bad = torch.tensor(0.1), torch.tensor(1.5)
    density = LogDensity(model, values={"s": good})
    log_p = torch.stack([density.one({"s": s}) for s in (good, bad)])
    expected = poutine.trace(poutine.condition(model, {"s": good})).get_trace().log_prob_sum()
    torch.testing.assert_close(log_p, torch.stack([expected, torch.tensor(-torch.inf)]))


def test_a_discrete_site_that_the_guide_draws_is_not_summed_over():
    """As in Pyro, where a guide's draw takes precedence over the sum."""

    @config_enumerate
    def model():
        z, k = pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=torch.tensor(1.0))

    def guide():
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("z", dist.Normal(0.5 - k, 0.8))

    states = torch.stack([dist.Normal(m, math.sqrt(2)).log_prob(torch.tensor(1.0)) for m in (0.0, 2.0)])
    exact = (states + torch.tensor([0.7, 0.3]).log()).logsumexp(0).item()
    report = rn.diagnose(guide, model=model, num_samples=20_000)
    assert report.log_evidence == pytest.approx(exact, abs=0.02) and set(report.draws) == {"k", "z"}
    k, z = torch.tensor(1.0), torch.tensor(0.2)
    log_p = LogDensity(model, values={"k": k, "z": z}).one({"k": k, "z": z})
    expected = dist.Normal(0.0, 1.0).log_prob(z) + math.log(0.3) + dist.Normal(z + 2, 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(log_p, expected)


def test_a_one_hot_site_is_summed_over():
    """It has no median to start from."""
    x = torch.tensor([0.3, -1.0])

    @config_enumerate
    def model():
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", 2):
            k = pyro.sample("k", dist.OneHotCategorical(P))
            pyro.sample("x", dist.Normal((k * locs).sum(-1), 1.0), obs=x)

    guide, point = rn.AutoRealNVP(model).build(), torch.tensor([0.1, 0.5, -0.7])
    mixture = dist.MixtureSameFamily(dist.Categorical(P), dist.Normal(point, 1.0))
    expected = dist.Normal(0.0, 1.0).log_prob(point).sum() + mixture.log_prob(x).sum()
    torch.testing.assert_close(LogDensity(model, values=guide()).one({"locs": point}), expected)


def test_components_beyond_their_supports_leave_the_mixture():
    lows, x, logits = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5, 0.5]), torch.tensor([0.3, 0.7]).log()

    def model(count):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        pareto = dist.Pareto(lows, 3.0 + 0 * s)
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), pareto, validate_args=None)
        with pyro.plate("n", count):
            pyro.sample("x", mixture, obs=x[:count])

    formulas = dist.Pareto(lows, 3.0, validate_args=False).log_prob(x[:, None]) + logits
    expected = torch.stack([formulas[0, 0], formulas[1].logsumexp(0)]).sum() + dist.Normal(0.0, 1.0).log_prob(
        torch.zeros(())
    )
    s = torch.zeros((), requires_grad=True)
    log_p = LogDensity(model, (2,), values={"s": s}).one({"s": s})
    torch.testing.assert_close(log_p, expected)
    log_p.backward()
    assert s.grad.isfinite()
    assert LogDensity(model, (3,), values={"s": s}).one({"s": s}) == -torch.inf


def test_a_state_with_invalid_values_leaves_the_sum():
    """In the first state the observation is outside of the support, so that the second one has all of the density."""

    @config_enumerate
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.25))
        pyro.sample("y", dist.Exponential(1.0), obs=1.0 - a * (1 - k))

    density = LogDensity(model, values={"a": torch.tensor(0.0)})
    a = torch.tensor([0.5, 2.0])
    states = torch.stack([0.75 * (a - 1).exp() * (a < 1), 0.25 * torch.full((2,), -1.0).exp()])
    torch.testing.assert_close(density({"a": a}), dist.Normal(0.0, 1.0).log_prob(a) + states.sum(0).log())


@pytest.mark.parametrize("seed", range(4))
def test_a_discrete_site_that_is_drawn_impossibly_is_summed_over(seed):
    """Half of the numbers N are too small for the counts, which is no reason not to start."""
    counts = torch.tensor([2.0, 4.0, 3.0])

    @config_enumerate
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        number = pyro.sample("N", dist.Categorical(torch.ones(8)))
        with pyro.plate("n", 3):
            pyro.sample("k", dist.Binomial(number.float(), p), obs=counts)

    p, numbers = torch.linspace(0.0005, 0.9995, 1000), torch.arange(4.0, 8.0)
    of_counts = dist.Binomial(numbers[:, None, None], p[:, None]).log_prob(counts).sum(-1)
    evidence = (of_counts.logsumexp(0) + dist.Beta(2.0, 2.0).log_prob(p)).logsumexp(0) - math.log(8 * 1000)
    pyro.set_rng_seed(seed)
    guide = fitted(model, num_steps=100)
    assert rn.diagnose(guide).log_evidence == pytest.approx(evidence.item(), abs=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_a_first_draw_that_is_impossible_is_no_error(seed):
    pyro.set_rng_seed(seed)
    guide = AutoNormal(shifted(dist.Exponential, rate=1.0), init_scale=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[0-9]+ of 3 steps had a loss or gradient that is not finite")
        rn.fit_guide(guide, num_steps=3, num_particles=8, progress=False)


def test_observations_that_are_always_impossible_are_an_error():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Exponential(a.exp()), obs=torch.tensor(-1.0))

    for make in (rn.AutoRealNVP, AutoNormal):
        with pytest.raises(ValueError, match="to be within the support"):
            rn.fit_guide(make(model), num_steps=1, progress=False)


def test_a_support_that_is_learned():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.high = PyroParam(torch.tensor(8.0), constraints.positive)

        def forward(self, y):
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Uniform(0.0, self.high))
                pyro.sample("y", dist.Normal(z, 0.2), obs=y)

    y, model = torch.linspace(0.1, 4.6, 10), Model()
    guide = rn.AutoRealNVP(model)
    rn.fit_guide(guide, y, num_steps=300, lr=0.03, progress=False)
    assert model.high < 6
    assert (guide.sample(2000)["z"].mean(0) - y).abs().max() < 0.15
    unpickled = pickle.loads(pickle.dumps(guide))
    rn.diagnose(unpickled, y, model=model)
    for other in (copy.deepcopy(guide), unpickled):
        assert (other(y)["z"] - y).abs().max() < 1
    svi = SVI(model, rn.AutoRealNVP(model), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step(y)) for _ in range(3))


def test_draws_of_ones_own_in_place_of_a_sum_are_refused():
    @config_enumerate(num_samples=5)
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'z' asks for num_samples=5 draws.*leave out num_samples="):
        rn.AutoRealNVP(model).build()


@pytest.mark.slow
def test_subsampled_rows():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0]) + torch.randn(2000, generator=torch.Generator().manual_seed(1))

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("rows", 2000, subsample_size=50) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ b, 1.0), obs=y[rows])

    covariance = torch.linalg.inv(torch.eye(2) / 25 + x.T @ x)
    deviations = covariance.diagonal().sqrt()
    for steps in (0, 200):
        guide = rn.AutoRealNVP(model).build()
        if steps:
            rn.fit_guide(guide, num_steps=steps, progress=False)
        draws = guide.sample(20_000)["b"]
        torch.testing.assert_close(draws.std(0), deviations, rtol=0.1, atol=0)
        assert ((draws.mean(0) - covariance @ (x.T @ y)) / deviations).abs().max() < 0.2
    exact = dist.LowRankMultivariateNormal(torch.zeros(2000), 5 * x, torch.ones(2000)).log_prob(y).item()
    assert rn.diagnose(guide).log_evidence == pytest.approx(exact, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 6, 7])
def test_passes_see_all_rows(size):
    y = torch.arange(10.0)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=size) as rows:
            pyro.sample("y", dist.Normal(m, 2.0), obs=y[rows])
        with pyro.plate("others", 7, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(m, 3.0), obs=y[rows])

    density, m = LogDensity(model), torch.tensor([[0.5]])
    exact = dist.Normal(0.0, 1.0).log_prob(m) + dist.Normal(m, 2.0).log_prob(y).sum()
    exact = exact + dist.Normal(m, 3.0).log_prob(y[:7]).sum()
    passes = density.passes(most=None)
    assert sum(weight for weight, _ in passes) == pytest.approx(1.0)
    assert density.mean_over(m, passes).item() == pytest.approx(exact.item(), rel=1e-5)
    assert len(density.passes(most=2)) == 2


def test_passes_see_all_cells_of_crossed_plates():
    y = torch.arange(30.0).reshape(5, 6) / 10

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 5, subsample_size=2, dim=-2) as a, pyro.plate("b", 6, subsample_size=3, dim=-1) as b:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[a][:, b])

    density, m = LogDensity(model), torch.tensor([[0.5]])
    exact = dist.Normal(0.0, 1.0).log_prob(m) + dist.Normal(m, 1.0).log_prob(y).sum()
    assert density.mean_over(m, density.passes(most=None)).item() == pytest.approx(exact.item(), rel=1e-5)


def test_double_precision_data_and_single_precision_priors():
    y = 3 + torch.randn(20, generator=torch.Generator().manual_seed(0)).double()

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    guide = rn.AutoRealNVP(model)
    rn.fit_guide(guide, y, num_steps=20, progress=False)
    exact = (y.sum() / (20 + 1 / 25)).item()
    draws = rn.neutra(guide, y, num_samples=200, warmup_steps=100, progress=False).samples["m"]
    assert draws.mean().item() == pytest.approx(exact, abs=0.1)
    assert rn.diagnose(guide, y).effective_sample_size > 1900


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        RenyiELBO(num_particles=8),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=4),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_other_losses_of_pyro(loss):
    guide = AutoDiagonalNormal(regression(WRITINGS["X @ b"]))
    history = rn.fit_guide(guide, loss=loss, num_steps=400, lr=0.02, validation_particles=20, progress=False)
    assert -history.best_loss == pytest.approx(EVIDENCE, abs=0.8)
    ours = rn.AutoRealNVP(regression(WRITINGS["X @ b"]), num_couplings=2)
    rn.fit_guide(ours, loss=loss, num_steps=5, validation_particles=8, progress=False)
    assert ours.is_trained


@pytest.mark.parametrize("make", [rn.AutoRealNVP, AutoNormal])
def test_a_loss_that_leaves_out_jacobians_is_refused(make):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"leaves out the Jacobians of the guide's sites \['z'\].*Trace_ELBO"):
        rn.fit_guide(make(model), loss=TraceMeanField_ELBO(), num_steps=1, progress=False)


STORE = """
import sys, torch, pyro, pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro_realnvp import AutoRealNVP, fit_guide

def model(loc=3.0):
    pyro.sample("z", dist.Normal(torch.full((3,), loc), 0.1).to_event(1))

def other():
    model(-7.0)

pyro.set_rng_seed(int(sys.argv[2] == "save"))
first, second = AutoRealNVP(model, num_couplings=2), AutoRealNVP(other, num_couplings=2, warm_start=False)
if sys.argv[2] == "save":
    fit_guide(first, num_steps=20, progress=False)
    first()
    svi = SVI(other, second, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(100):
        svi.step()
    pyro.get_param_store().save(sys.argv[1])
else:
    pyro.get_param_store().load(sys.argv[1])
    first.build(), second.build()
torch.manual_seed(0)
for guide in (first, second):
    print(guide.is_trained, guide.sample(5)["z"].flatten().tolist())
"""


@pytest.mark.slow
def test_pyros_own_file_gives_the_trained_guides_back(tmp_path):
    saved, loaded = (run_python("-c", STORE, tmp_path / "store.pt", mode).stdout for mode in ("save", "load"))
    assert saved == loaded and saved.count("True") == 2


def test_a_store_with_other_shapes_is_refused():
    guide = rn.AutoRealNVP(dynamic, num_couplings=2)
    guide()
    state = pyro.get_param_store().get_state()
    state["params"] = {name: value.detach().clone() for name, value in state["params"].items()}
    name = next(name for name in state["params"] if name.endswith("parts.1.loc"))
    state["params"][name] = torch.zeros(5)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    with pytest.raises(RuntimeError, match=r"of the shape \(5,\).*clear_param_store"):
        guide.sample(3)


def test_parameters_local_to_modules():
    with pyro.settings.context(module_local_params=True):
        guide = rn.AutoRealNVP(dynamic, num_couplings=2)
        rn.fit_guide(guide, num_steps=5, progress=False)
        other = rn.AutoRealNVP(dynamic, num_couplings=2).build()
        other.load_state_dict(guide.state_dict())
        torch.manual_seed(0)
        expected = guide.sample(3)
        torch.manual_seed(0)
        assert torch.equal(other.sample(3)["a"], expected["a"]) and other.is_trained


def test_svi_of_a_dynamic_support_and_relative_coordinates():
    for model in (dynamic, hierarchy(8)[0]):
        guide = rn.AutoRealNVP(model, num_couplings=2)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(5)) and guide.is_trained


@pytest.mark.parametrize(
    ("wrap", "value", "count"),
    [
        (lambda fn: fn.mask(torch.tensor(True)), torch.tensor(1.5), 1),
        (lambda fn: fn.expand([3]).to_event(1), torch.full((3,), 1.5), 3),
        (lambda fn: fn.expand([3]).mask(torch.tensor([True, False, True])).to_event(1), torch.full((3,), 1.5), 2),
    ],
)
def test_components_count_within_their_own_supports_in_all_wrappers(wrap, value, count):
    with pyro.validation_enabled(False):
        pareto = dist.Pareto(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]))
        fn = wrap(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), pareto))
        trace = poutine.trace(lambda: pyro.sample("x", fn, obs=value)).get_trace()
        apply_validity(trace, ["x"])
    right = math.log(0.5 * 3 * 1.5**-4)  # only the first has a density at 1.5
    assert trace.nodes["x"]["log_prob_sum"].item() == pytest.approx(count * right, abs=1e-5)


def test_enumeration_takes_one_scale():
    @config_enumerate
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 0.5])):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(k, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match=r"one number as the scale of the site 'k'.* got shape \(3,\)"):
        rn.AutoRealNVP(model).build()


def test_memory_that_a_statement_should_have_filled_is_not_taken_for_noise():
    """Under vmap the filled tensor is a new one, the result of the call."""

    def one(point, is_result_used):
        noise = torch.empty(3)
        filled = noise.normal_()
        return ({"y": point + (filled if is_result_used else noise)},)

    points = torch.zeros(2000)
    (used,) = map_over(functools.partial(one, is_result_used=True), points, True)
    (unused,) = map_over(functools.partial(one, is_result_used=False), points, True)
    assert used["y"].std().item() == pytest.approx(1, abs=0.05) and unused["y"].isnan().all()


@pytest.mark.parametrize("likelihood", [dist.Cauchy, dist.Logistic, functools.partial(dist.StudentT, 4.0)])
@pytest.mark.parametrize("scale", [1e-3, 1e-4, 1e-8])
def test_a_steep_density_is_no_jump(likelihood, scale):
    """Both steps of the check of gradients were longer than the posterior is wide, and the model was refused."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        data = 0.1 + scale * torch.tensor([0.0, 2.0, 2.7], dtype=torch.float64)
        pyro.sample("y", likelihood(z, scale).expand([3]).to_event(1), obs=data)

    for seed in range(3):
        pyro.set_rng_seed(seed)
        rn.fit_guide(rn.AutoRealNVP(model, num_couplings=2), num_steps=1, progress=False, seed=seed)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_a_latent_that_is_detached_in_part(share):
    """The shortest steps, which rounding hides, must not decide that the gradient is right."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        loc = (1 - share) * a + share * a.item()
        pyro.sample("y", dist.Normal(loc, 0.1), obs=torch.tensor(0.7, dtype=torch.float64))

    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="in another way than its gradient says"):
            check(LogDensity(model), torch.randn(2, 1, dtype=torch.float64))


def test_a_fast_density_beside_many_rows_is_no_jump():
    """Of the steps that are short enough, rounding leaves few to judge by: a sum of 20,000 rows is large."""
    y = torch.randn(20_000, generator=torch.Generator().manual_seed(0))

    def model():
        v = pyro.sample("v", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        pyro.factor("y", -0.5 * (y - mean).square().sum())
        pyro.factor("fast", 5 * torch.cos(3000 * v))

    for seed in range(12):
        torch.manual_seed(seed)
        check(LogDensity(model), torch.randn(2, 2, dtype=torch.float64))
