# SPDX-License-Identifier: Apache-2.0
import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import perturb, small, table
from torch.distributions import constraints

import pyro_realnvp as rn


def three_normals(full=True):
    """A mixture with known weights, locations and covariances."""
    locs = torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, -1.0]])
    trils = torch.tensor([[[0.5, 0.0], [0.3, 0.2]], [[1.0, 0.0], [0.0, 0.1]], [[0.2, 0.0], [-0.5, 1.0]]])
    if not full:
        trils = trils.diagonal(dim1=-2, dim2=-1).diag_embed()
    return torch.tensor([0.2, 0.3, 0.5]), locs, trils


@pytest.mark.parametrize("full", [True, False])
def test_density_is_that_of_the_mixture(full):
    weights, locs, trils = three_normals(full)
    base = rn.MixtureBase(2, num_components=3, full=full).start_at(weights, locs, trils)
    x = 3 * torch.randn(100, 2)
    expected = (dist.MultivariateNormal(locs, scale_tril=trils).log_prob(x[:, None]) + weights.log()).logsumexp(-1)
    torch.testing.assert_close(base().log_prob(x), expected)
    draws = base().sample((100_000,))
    torch.testing.assert_close(draws.mean(0), weights @ locs, atol=0.05, rtol=0)
    shares = torch.bincount(torch.cdist(draws, locs).argmin(-1), minlength=3) / len(draws)
    torch.testing.assert_close(shares, weights, atol=0.03, rtol=0)
    assert not base().has_rsample


def test_learned_parameters_are_relative_to_the_start():
    weights, locs, trils = three_normals()
    base = rn.MixtureBase(2, num_components=3).start_at(weights, locs, trils)
    with torch.no_grad():
        base.logits.copy_(torch.tensor([1.0, 0.0, 0.0]))
        base.locs[0] = torch.tensor([2.0, 1.0])
        base.log_diagonals[1] = torch.tensor([0.0, math.log(3.0)])
        base.lowers[2, 1, 0] = 0.7
    mixture = base()
    expected = torch.tensor([0.2 * math.e, 0.3, 0.5])
    torch.testing.assert_close(mixture.mixture_distribution.probs, expected / expected.sum())
    pieces = mixture.component_distribution
    torch.testing.assert_close(pieces.loc[0], torch.tensor([-4.0 + 0.5 * 2, 0.3 * 2 + 0.2 * 1]))
    torch.testing.assert_close(pieces.scale_tril[1], torch.tensor([[1.0, 0.0], [0.0, 0.3]]))
    torch.testing.assert_close(pieces.scale_tril[2], torch.tensor([[0.2, 0.0], [-0.5 + 0.7, 1.0]]))


@pytest.mark.parametrize("full", [True, False])
def test_initialize_finds_the_mixture(full):
    weights, locs, trils = three_normals(full)
    true = rn.MixtureBase(2, num_components=3, full=full).start_at(weights, locs, trils)()
    x = true.sample((5000,))
    base = rn.MixtureBase(2, num_components=3, full=full).initialize(x)
    assert (true.log_prob(x) - base().log_prob(x)).mean().abs() < 0.01
    # With weights, the rows of the first component count no more.
    counts = (x[:, 0] > -2).float()
    base = rn.MixtureBase(2, num_components=2, full=full).initialize(x, counts)
    assert base().mixture_distribution.probs.sort().values.tolist() == pytest.approx([3 / 8, 5 / 8], abs=0.03)
    assert base().component_distribution.loc[:, 0].min() > -1


def test_for_rows_chooses_the_number_and_the_kind_of_covariances():
    """Two normals with equal covariances of correlation 0.9, then with covariances of their own, then diagonal ones."""
    torch.manual_seed(0)
    tril = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5]])
    trils = {
        "equal": torch.stack([tril, tril]),
        "full": torch.stack([tril, tril * torch.tensor([[1.0, 0.0], [-1.0, 1.0]])]),
        "diagonal": torch.stack([torch.tensor([1.0, 0.3]).diag(), torch.tensor([0.3, 1.0]).diag()]),
    }
    for kind, scale_trils in trils.items():
        truth = rn.MixtureBase(2, num_components=2).start_at(
            torch.tensor([0.4, 0.6]), torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), scale_trils
        )()
        base = rn.MixtureBase.for_rows(truth.sample((500,)))
        assert base.num_components == 2
        assert (base.lowers is None) == (kind == "diagonal")
        assert torch.equal(base.start_trils[0], base.start_trils[1]) == (kind == "equal")
        x = truth.sample((20_000,))
        assert (truth.log_prob(x) - base().log_prob(x)).mean().abs() < 0.03


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_mixture_does_not_depend_on_the_units(unit):
    """What scikit-learn adds to the variances is 1e-6, whatever the unit: it made deviations of 1e-3 too wide."""
    x = torch.cat([torch.randn(300, 2) - 5, torch.randn(300, 2) + 5]).double()
    units = torch.tensor([unit, 1.0], dtype=torch.float64)
    for base_of in (
        rn.MixtureBase.for_rows,
        lambda rows: rn.MixtureBase(2, num_components=2).double().initialize(rows),
    ):
        one, other = base_of(x), base_of(units * x)
        assert one.num_components == other.num_components
        log_p = one().log_prob(x) - units.log().sum()
        torch.testing.assert_close(other().log_prob(units * x), log_p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 1e6])
def test_a_constant_column_of_a_mixture(constant):
    x = torch.cat([torch.randn(300, 1), torch.full((300, 1), constant)], 1).double()
    log_p = rn.MixtureBase.for_rows(x)().log_prob(x)
    assert log_p.mean().item() == pytest.approx(4.6, abs=0.3)  # as wide as scikit-learn's own addition to the variances


def test_rows_and_weights_may_be_arrays():
    x, weights = torch.randn(50, 2, dtype=torch.float64), torch.rand(50)
    expected = rn.MixtureBase.for_rows(x, weights)().log_prob(x)
    torch.testing.assert_close(rn.MixtureBase.for_rows(x.numpy(), weights.tolist())().log_prob(x), expected)
    base = rn.MixtureBase(2, num_components=2).double().initialize(x.numpy(), weights.numpy())
    assert base().log_prob(x).isfinite().all()


def test_for_rows_takes_few_rows_for_one_normal():
    """The likelihood of two rows to a normal has no bound."""
    for seed in range(10):
        torch.manual_seed(seed)
        assert rn.MixtureBase.for_rows(torch.randn(20, 2)).num_components <= 2
        assert rn.MixtureBase.for_rows(torch.randn(6, 2)).num_components == 1


def test_fit_starts_at_a_mixture_of_the_rows():
    weights, locs, trils = three_normals()
    x = rn.MixtureBase(2, num_components=3).start_at(weights, locs, trils)().sample((2000,))
    flow = rn.Flow(small(2), base=rn.MixtureBase(2, num_components=3))
    history = rn.fit(flow, x, validation=x, num_steps=20, progress=False)
    entropy = rn.MixtureBase(2, num_components=3).initialize(x)().log_prob(x).mean()
    assert history.validation_loss[0] == pytest.approx(-entropy.item(), abs=1e-3)
    # A second fit goes on from there.
    again = rn.fit(flow, x, validation=x, num_steps=20, progress=False)
    assert again.validation_loss[0] == pytest.approx(history.best_loss, abs=1e-5)


def test_fit_leaves_what_was_set():
    def copied():
        base = rn.MixtureBase(2, num_components=3)
        base.load_state_dict(rn.MixtureBase(2, num_components=3).start_at(*three_normals()).state_dict())
        return base

    def written(name):
        base = rn.MixtureBase(2, num_components=3)
        with torch.no_grad():
            getattr(base, name)[0] += 0.1
        return base

    names = ("logits", "locs", "log_diagonals", "lowers")
    started = rn.MixtureBase(2, num_components=3).start_at(*three_normals())
    for base in (started, copied(), *(written(name) for name in names)):
        for one in (base, copy.deepcopy(base)):
            assert not one.needs_data
    assert rn.MixtureBase(2, num_components=3).needs_data


def test_as_a_base():
    torch.manual_seed(0)
    flow = rn.Flow(perturb(small(2)), base=rn.MixtureBase(2, num_components=3).start_at(*three_normals())).double()
    d = flow()
    assert d.sample((4,)).dtype == torch.float64 and not d.has_rsample
    assert d.expand((5, 4)).sample((6,)).shape == (6, 5, 4, 2) and d.expand((4,)).log_prob(
        torch.zeros(4, 2).double()
    ).shape == (4,)
    with pytest.raises(NotImplementedError, match="NormalMixture has no rsample"):
        d.rsample_and_log_prob((3,))
    other = rn.Flow(small(2), base=rn.MixtureBase(2, num_components=3)).double()
    other.load_state_dict(flow.state_dict())
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(other().log_prob(x), d.log_prob(x))


def test_temperature_scales_each_component():
    flow = rn.Flow(small(2), base=rn.MixtureBase(2, num_components=3).start_at(*three_normals()))
    cold = flow(temperature=0.5).base_dist
    torch.testing.assert_close(cold.component_distribution.loc, three_normals()[1])
    torch.testing.assert_close(cold.component_distribution.scale_tril, 0.5 * three_normals()[2])


def test_with_a_context():
    base = rn.MixtureBase(2, num_components=3, context_dim=1).start_at(*three_normals())
    for bijection in (small(2), small(2, context_dim=1)):
        flow = rn.Flow(bijection, base=perturb(base))
        context = torch.randn(7, 1)
        d = flow(context)
        assert d.batch_shape == (7,) and d.sample((4,)).shape == (4, 7, 2)
        x = torch.randn(7, 2)
        each = torch.stack([flow(c).log_prob(one) for c, one in zip(context, x)])
        torch.testing.assert_close(d.log_prob(x), each)
        with pytest.raises(ValueError, match="expected a context of width 1; got none"):
            flow()
        with pytest.raises(ValueError, match=r"expected a context of shape \(..., 1\); got shape \(7, 3\)"):
            flow(torch.zeros(7, 3))


@pytest.mark.slow
def test_a_context_that_chooses_the_piece():
    """x is near 3 c or near -3 c with equal weights, so the mixture must turn with its context."""

    def draw(num):
        c = torch.rand(num, 1) + 0.5
        return 3 * c * torch.sign(torch.randn(num, 1)) + 0.3 * torch.randn(num, 2), c

    x, c = draw(4000)
    flow = rn.Flow(small(2, context_dim=1), base=rn.MixtureBase(2, num_components=2, context_dim=1))
    rn.fit(flow, x, context=c, num_steps=600, progress=False)
    x, c = draw(20_000)
    pieces = dist.Normal(torch.stack([3 * c, -3 * c]), 0.3).to_event(1)
    with torch.no_grad():
        kl = (pieces.log_prob(x).logsumexp(0) - math.log(2) - flow(c).log_prob(x)).mean()
    assert kl < 0.06


@table(
    "make, message",
    {
        "size": (lambda: rn.MixtureBase(0, num_components=2), "expected event_size >= 1; got 0"),
        "components": (lambda: rn.MixtureBase(2, num_components=0), "expected num_components >= 1; got 0"),
        "event": (
            lambda: rn.Flow(small(3), base=rn.MixtureBase(2, num_components=2)),
            r"event shape \(3,\); got \(2,\)",
        ),
        "context": (lambda: rn.MixtureBase(2, num_components=2)(torch.zeros(3)), "MixtureBase takes no context"),
        "weights": (
            lambda: rn.MixtureBase(1, num_components=1).start_at(
                torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1)
            ),
            "drop empty components",
        ),
        "shapes": (
            lambda: rn.MixtureBase(1, num_components=2).start_at(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1)),
            r"got \(1,\), \(1, 1\), \(1, 1, 1\)",
        ),
        "entries that constrain each other": (
            lambda: rn.Base(dist.Dirichlet, concentration=torch.ones(3)),
            "got Dirichlet with the support Simplex",
        ),
        "bounds that constrain each other": (
            lambda: rn.Base(dist.Uniform, low=torch.zeros(2), high=torch.ones(2), learnable=True),
            "the parameters of Uniform constrain each other",
        ),
        "counts": (
            lambda: rn.Flow(small(2), base=rn.Base(dist.Poisson, rate=torch.ones(2))),
            "expected a base of real numbers; got Poisson",
        ),
        "counts without a Base": (
            lambda: rn.Flow(small(2), base=lambda: dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)),
            "got Bernoulli, whose probabilities are no density",
        ),
        "temperature of a flow": (lambda: rn.Flow(small(2), base=rn.Flow(small(2)))(temperature=0.5), "with a mean"),
        "temperature of a Cauchy": (
            lambda: rn.Flow(small(2), base=lambda: dist.Cauchy(torch.zeros(2), 1.0).to_event(1))(temperature=0.5),
            "with a mean",
        ),
        "full": (
            lambda: rn.MixtureBase(2, num_components=3, full=False).start_at(*three_normals()),
            "diagonal if the base has full=False",
        ),
    },
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bounded_base_has_no_density_beyond_its_support():
    for make in (
        lambda: rn.Base(dist.Exponential, rate=torch.ones(2)),
        lambda: rn.Base(dist.Gamma, concentration=torch.full((2,), 2.0), rate=torch.ones(2)),
        lambda: lambda: dist.Exponential(torch.ones(2)).to_event(1),  # whose formula goes on, or whose check fails
    ):
        flow = rn.Flow(perturb(rn.real_nvp(2)), base=make())
        y, outside = flow().sample((3,)), flow.bijection(torch.tensor([-5.0, 1.0]))
        assert flow().log_prob(y).isfinite().all()
        assert flow().log_prob(outside) == flow(temperature=0.5).log_prob(outside) == -torch.inf
        flow().log_prob(torch.stack([y[0], outside])).exp().sum().backward()
        assert all(p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize(
    "base",
    [
        rn.Base(dist.VonMises, loc=torch.zeros(1), concentration=torch.ones(1)),
        lambda: dist.VonMises(torch.zeros(1), 1.0).to_event(1),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_angles_as_a_base_fill_one_period(base, temperature):
    """Torch's density of angles repeats itself on the real line, so its integral grew with the range."""
    flow = rn.Flow(rn.Standardize(1).inv, base=base)
    x = torch.linspace(-30, 30, 60_001)[:, None]
    assert flow(temperature=temperature).log_prob(x).exp().sum() * 1e-3 == pytest.approx(1, abs=1e-3)


def test_a_tensor_as_temperature():
    flow = rn.Flow(perturb(rn.real_nvp(3)))
    y = torch.randn(2, 3)
    torch.testing.assert_close(flow(temperature=torch.tensor(0.5)).log_prob(y), flow(temperature=0.5).log_prob(y))


def test_an_empty_batch_of_a_mixture():
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2), base=rn.MixtureBase(2, num_components=3))
    assert flow().sample((0,)).shape == (0, 2)
    conditional = rn.Flow(
        rn.real_nvp(2, num_couplings=2, context_dim=1), base=rn.MixtureBase(2, num_components=3, context_dim=1)
    )(torch.zeros(0, 1))
    assert conditional.sample((5,)).shape == (5, 0, 2)
    assert conditional.log_prob(torch.zeros(5, 0, 2)).shape == (5, 0)


def test_a_mixture_is_exported_with_batches_of_any_size():
    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = rn.MixtureBase(3, num_components=2)

        def forward(self, x):
            return self.base().log_prob(x)

    score, x = Score(), torch.randn(7, 3)
    program = torch.export.export(score, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x), score(x))


def test_rows_in_turn_are_seen_alike():
    """Two classes in turn, of which every second row is one."""
    torch.manual_seed(0)
    x = torch.stack([torch.randn(5000, 2) - 6, torch.randn(5000, 2) + 6], 1).reshape(-1, 2)
    assert rn.MixtureBase.for_rows(x).num_components == 2
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2), base=rn.MixtureBase(2, num_components=2))
    rn.fit(flow, x, validation=0, num_steps=1, progress=False)
    torch.testing.assert_close(flow.base.start_locs[:, 0].sort().values, torch.tensor([-6.0, 6.0]), atol=0.2, rtol=0)
    only = rn.Flow(rn.real_nvp(2, num_couplings=2), base=rn.MixtureBase(2, num_components=1))
    rn.fit(only, x, weights=(torch.arange(len(x)) % 2).float(), validation=0, num_steps=1, progress=False)
    assert only.base.start_locs[0, 0] == pytest.approx(6, abs=0.2)


WEIGHTS = {
    "equal": lambda num: torch.ones(num),
    "even": lambda num: 0.5 + torch.rand(num),
    "exponential": lambda num: torch.empty(num).exponential_(),
    "heavy": lambda num: (1.5 * torch.randn(num)).exp(),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("num", [100, 999])
def test_weights_do_not_make_a_normal_collapse(kind, num):
    """One normal. Rows drawn with replacement would come several times, and look like normals of their own."""
    torch.manual_seed(num)
    x, new = torch.randn(num, 4), torch.randn(4000, 4)
    base = rn.MixtureBase.for_rows(x, WEIGHTS[kind](num))
    assert base.num_components == 1
    entropy = 2 * math.log(2 * math.pi * math.e)
    assert -base().log_prob(new).mean().item() == pytest.approx(entropy, abs=1.0 if kind == "heavy" else 0.25)


def test_equal_weights_are_none():
    x = torch.cat([torch.randn(60, 2), torch.randn(60, 2) + 6])
    one, other = (rn.MixtureBase.for_rows(x, weights) for weights in (None, torch.full((120,), 3.0)))
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    assert one.num_components == 2


@pytest.mark.parametrize("full", [True, False])
def test_whole_weights_are_copies(full):
    x = torch.cat([torch.randn(60, 2), torch.randn(60, 2) + 6]).double()
    weights = torch.arange(120) % 4
    one, other = (
        rn.MixtureBase(2, num_components=2, full=full).double().initialize(*rows)
        for rows in ((x, weights), (x.repeat_interleave(weights, 0),))
    )
    torch.testing.assert_close(one().log_prob(x), other().log_prob(x), rtol=1e-3, atol=1e-3)


def test_an_empty_batch_of_contexts():
    base = rn.MixtureBase(2, num_components=2, context_dim=3)
    assert base(torch.zeros(0, 3)).log_prob(torch.zeros(2)).shape == (0,)


def test_the_distribution_function_of_one_number():
    flow = rn.Flow(rn.Compose([dist.transforms.ExpTransform()]), event_shape=())
    torch.testing.assert_close(flow().cdf(torch.tensor(1.0)), torch.tensor(0.5))
    torch.testing.assert_close(flow().icdf(torch.tensor(0.5)), torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match="cdf is that of single numbers"):
        rn.Flow(rn.real_nvp(2))().base_dist.cdf(torch.zeros(2))


def test_too_few_rows_count():
    weights = torch.zeros(50).index_fill(0, torch.arange(3), 1.0)
    with pytest.raises(ValueError, match="expected 5 rows or more, of positive weight; got 3 of 50"):
        rn.MixtureBase(2, num_components=5).initialize(torch.randn(50, 2), weights)


def test_a_base_that_does_not_say_its_support():
    class Own(dist.TorchDistribution):
        arg_constraints = {}
        has_rsample = True

        def __init__(self):
            super().__init__(event_shape=(2,), validate_args=False)

        def rsample(self, sample_shape=()):
            return torch.randn(*sample_shape, 2)

        def log_prob(self, value):
            return dist.Normal(0.0, 1.0).log_prob(value).sum(-1)

    flow, y = perturb(rn.real_nvp(2)), torch.randn(5, 2)
    torch.testing.assert_close(rn.Flow(flow, base=Own)().log_prob(y), rn.Flow(flow)().log_prob(y))


def test_a_flow_distribution_of_a_bounded_base():
    d = rn.FlowDistribution(dist.Exponential(torch.ones(2)), [rn.real_nvp(2)])
    assert d.log_prob(torch.tensor([[1.0, 1.0], [-1.0, 1.0]])).tolist() == [-2.0, -torch.inf]
    assert d.expand((3,)).log_prob(torch.ones(3, 2)).tolist() == [-2.0] * 3 and d.expand((3,)).sample().shape == (3, 2)


@pytest.mark.parametrize("transform", [rn.Standardize(2), rn.Spline(2), rn.Compose([rn.Standardize(2)])])
def test_angles_behind_a_bijection(transform):
    base = dist.TransformedDistribution(dist.VonMises(torch.zeros(2), 1.0).to_event(1), [transform])
    y = base.sample((5,))
    torch.testing.assert_close(rn.Flow(rn.Standardize(2), base=lambda: base)().log_prob(y), base.log_prob(y))


def test_bounded_bases_that_say_little():
    a = rn.Compose([dist.transforms.AffineTransform(1.0, 2.0)])
    uniforms = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 3.0]))
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), uniforms
    )  # whose components have their own bounds
    with pyro.validation_enabled(False):
        found = rn.FlowDistribution(mixture, [a]).log_prob(1 + 2 * torch.tensor([2.5, 0.5, 0.6]))
    torch.testing.assert_close(found, torch.tensor([1 / 6, 2 / 3, 2 / 3]).log() - math.log(2))

    class Positive(constraints.Constraint):
        event_dim, is_discrete = 0, False

        def check(self, value):
            return value > 0

    class Own(dist.Exponential):
        support = Positive()

    class Dependent(dist.Exponential):
        support = constraints.dependent

    for kind in (Own, Dependent):
        d = rn.FlowDistribution(kind(1.0, validate_args=False), [a])
        assert d.log_prob(torch.tensor(2.0)).item() == pytest.approx(-0.5 - math.log(2))
    one, other = (rn.FlowDistribution(base, [a]) for base in (dist.Uniform(0.0, 1.0), dist.Normal(-1.0, 2.0)))
    assert torch.distributions.kl_divergence(one, other) == pytest.approx(1.9038, abs=1e-3)


def test_a_mixture_of_weighted_rows_has_no_equal_covariances():
    rng = np.random.default_rng(0)
    is_rare = np.arange(12_000) < 6000
    x = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=12_000) + np.where(is_rare, 12, 0)[:, None]
    base = rn.MixtureBase.for_rows(torch.from_numpy(x), np.where(is_rare, 0.01, 0.99))
    assert {round(loc) for loc in base().component_distribution.loc[:, 0].tolist()} == {0, 12}
    weights = np.where(np.arange(6000) == 3, 1, 1e-5)  # one of them worth more than all others
    rn.MixtureBase.for_rows(torch.from_numpy(rng.standard_t(2, size=(6000, 2))), weights)
