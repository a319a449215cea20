# SPDX-License-Identifier: Apache-2.0
import matplotlib
import pytest
import torch
from helpers import table

import pyro_realnvp as rn

matplotlib.use("agg")
from pyro_realnvp import plots


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
    plots.plot_loss(rn.History()).figure.canvas.draw()


@table(
    ("draw", "message"),
    {
        "three dimensions": (lambda x: plots.plot_density(rn.Flow(rn.real_nvp(3)), x), "a flow of two dimensions"),
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
