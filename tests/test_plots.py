# SPDX-License-Identifier: Apache-2.0
import matplotlib
import pyro.distributions as dist
import pytest
import torch
from helpers import table
from torch import nn

import pyro_realnvp as rn

matplotlib.use("agg")
from pyro_realnvp import plots

CLOSE = {"atol": 0.01, "rtol": 0, "check_dtype": False}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plots.plt.close("all")


@pytest.fixture
def x():
    return torch.randn(100, 2)


def drawn(ax):
    ax.figure.canvas.draw()
    return ax.collections


def test_density(x):
    flow = rn.Flow(rn.real_nvp(2))
    assert len(drawn(plots.plot_density(flow, x))) == 2
    assert len(drawn(plots.plot_density(flow))) == 1
    mesh = plots.plot_density(flow.double(), x.double()).collections[0]
    assert mesh.get_array().max() == pytest.approx(1 / (2 * torch.pi), rel=1e-2)
    conditional = rn.Flow(rn.real_nvp(2, context_dim=3))
    plots.plot_density(conditional, x, context=torch.zeros(3))


def test_samples_share_their_scales(x):
    left, right = plots.plot_samples(rn.Flow(rn.real_nvp(2)), x)
    assert len(left.collections[0].get_offsets()) == len(right.collections[0].get_offsets()) == 100
    assert left.get_xlim() == right.get_xlim()
    conditional = rn.Flow(rn.real_nvp(2, context_dim=3))
    for context in (torch.zeros(3), torch.zeros(100, 3)):
        plots.plot_samples(conditional, x, context=context)


def test_samples_of_labels():
    """One label for each row was taken for one context: the samples were those of the first two rows' labels."""
    flow = rn.Flow(rn.ConditionalAffine(2, 1), embedding=nn.Embedding(3, 1))
    with torch.no_grad():
        flow.embedding.weight.copy_(torch.tensor([[-50.0], [0.0], [50.0]]))
        flow.bijection.linear.weight[2:] = 1.0
    labels = torch.arange(3).repeat(40)
    _, ax = plots.plot_samples(flow, torch.randn(120, 2), context=labels)
    found = torch.tensor(ax.collections[0].get_offsets().data)
    assert (found - flow.embedding(labels)).abs().max() < 9
    _, ax = plots.plot_samples(flow, torch.randn(120, 2), context=torch.tensor(2))
    assert len(ax.collections[0].get_offsets()) == 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "numpy", "gradients"])
def test_data_of_all_kinds(x, dtype):
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2))
    data = x.numpy() if dtype == "numpy" else x.requires_grad_() if dtype == "gradients" else x.to(dtype)
    if isinstance(dtype, torch.dtype):
        flow.to(dtype)
    plots.plot_density(flow, data)
    plots.plot_samples(flow, data)
    plots.plot_latent(flow, data, color=list(range(100)))
    plots.plot_latent(flow, data, color="red")
    plots.plot_latent(flow, data, color=["a", "b"] * 50)
    plots.plot_layers(flow, data, color=[0.0] * 100)
    plots.plot_density(rn.Flow(rn.Standardize(2).fit(x.detach()).inv), data)  # which has no parameters


def test_layers_of_a_conditional_flow(x):
    flow = rn.Flow(rn.real_nvp(2, num_couplings=3, context_dim=3))
    for context in (torch.zeros(3), torch.zeros(100, 3)):
        assert len(plots.plot_layers(flow, x, context=context).axes) == 4


def test_latent_space_shows_the_normal_of_its_base(x):
    base = rn.Base(dist.Normal, loc=torch.tensor([5.0, -3.0]), scale=torch.tensor([2.0, 0.5]))
    ax = plots.plot_latent(rn.Flow(rn.real_nvp(2, num_couplings=2), base=base), x)
    widest = torch.from_numpy(ax.lines[-1].get_xydata())
    torch.testing.assert_close(widest.amax(0) - widest.amin(0), 6.07 * torch.tensor([2.0, 0.5]), **CLOSE)
    base = rn.Base(dist.StudentT, df=torch.tensor(2.0), loc=torch.zeros(2), scale=torch.ones(2))
    assert not plots.plot_latent(rn.Flow(rn.real_nvp(2, num_couplings=2), base=base), x).lines
    base = rn.MixtureBase(2, num_components=3, context_dim=3)
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, context_dim=3), base=base)
    assert not plots.plot_latent(flow, x, context=torch.zeros(100, 3)).lines
    assert len(plots.plot_latent(flow, x, context=torch.zeros(3)).lines) == 9


def test_latent(x):
    ax = plots.plot_latent(rn.Flow(rn.real_nvp(2)), x, color=x[:, 0])
    torch.testing.assert_close(torch.tensor(ax.collections[0].get_offsets().data).float(), x)
    plots.plot_latent(rn.Flow(rn.real_nvp(4, context_dim=3)), torch.randn(10, 4), context=torch.zeros(3))


def test_layers(x):
    fig = plots.plot_layers(rn.Flow(rn.real_nvp(2)), x, max_panels=5)
    titles = [ax.get_title() for ax in fig.axes]
    assert (len(titles), titles[0], titles[-1]) == (5, "data", "latent")


def test_loss():
    history = rn.History(
        loss=[3.0, float("nan"), 2.0], validation_steps=[3], validation_loss=[2.5], best_step=3, best_loss=2.5
    )
    assert len(plots.plot_loss(history).lines) == 3
    history.best_loss = 2.4  # of a validation before, from which noise alone separates the best weights
    assert plots.plot_loss(history).lines[-1].get_xydata().tolist() == [[3.0, 2.5]]
    plots.plot_loss(rn.History()).figure.canvas.draw()


@table(
    ("draw", "message"),
    {
        "three dimensions": (lambda x: plots.plot_density(rn.Flow(rn.real_nvp(3)), x), "a flow of two dimensions"),
        "three columns": (
            lambda x: plots.plot_density(rn.Flow(rn.real_nvp(2)), torch.randn(9, 3)),
            r"\(N, 2\), N >= 1",
        ),
        "no rows": (lambda x: plots.plot_samples(rn.Flow(rn.real_nvp(2)), x[:0]), r"got shape \(0, 2\)"),
        "one row": (lambda x: plots.plot_latent(rn.Flow(rn.real_nvp(2)), x[0]), r"got shape \(2,\)"),
        "nan": (lambda x: plots.plot_density(rn.Flow(rn.real_nvp(2)), x / 0), "nan or inf among them"),
        "contexts for one density": (
            lambda x: plots.plot_density(rn.Flow(rn.real_nvp(2, context_dim=1)), x, context=torch.zeros(100, 1)),
            "expected one context",
        ),
        "other contexts than rows": (
            lambda x: plots.plot_samples(rn.Flow(rn.real_nvp(2, context_dim=1)), x, context=torch.zeros(7, 1)),
            "one for each of the 100 rows",
        ),
        "no Compose": (lambda x: plots.plot_layers(rn.Flow(rn.Permute(torch.tensor([1, 0]))), x), "around a Compose"),
    },
)
def test_bad_input(draw, message, x):
    with pytest.raises(ValueError, match=message):
        draw(x)


def test_latent_space_of_a_mixture_shows_its_normals():
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2), base=rn.MixtureBase(2, num_components=3))
    ax = plots.plot_latent(flow, torch.randn(50, 2))
    assert len(ax.lines) == 3 * 3
    first = torch.from_numpy(ax.lines[0].get_xydata())
    torch.testing.assert_close(first.mean(0).float(), flow.base.start_locs[0], atol=0.05, rtol=0)


def test_the_density_of_bounded_data():
    flow = rn.Flow(rn.Compose([rn.real_nvp(2), rn.Unbound([0.0, 0.0], [torch.inf, torch.inf]).inv]))
    x = torch.randn(200, 2).exp()
    (mesh,) = plots.plot_density(flow, x).collections[:1]
    density = mesh.get_array().reshape(200, 200)
    assert density[0].max() == 0 < density.max()


def test_plots_in_double_precision():
    x = torch.randn(50, 2, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        for base in (None, rn.MixtureBase.for_rows(x)):
            flow = rn.Flow(rn.real_nvp(2, num_couplings=2), base=base)
            plots.plot_density(flow, x)
            plots.plot_latent(flow, x)
    finally:
        torch.set_default_dtype(torch.float32)
