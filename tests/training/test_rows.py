# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas
import pyro.distributions as dist
import pytest
import torch
from helpers import fit, make_flow, points, table
from torch import nn

import pyro_realnvp as rn
from pyro_realnvp.training.rows import Batch, Rows

X = points()


def run(data, flow=None, **options):
    flow = make_flow(seed=1) if flow is None else flow
    return flow, fit(flow, data, **options)


def test_weights_are_repetitions():
    """Each step uses all rows, so that the trainings differ in nothing but weights and repetitions."""
    counts = torch.arange(400) % 3
    options = {"validation": 0, "num_steps": 20}
    flow, history = run(
        X.double(), make_flow(seed=1).double(), weights=counts, batch_size=int((counts > 0).sum()), **options
    )
    repeated = X.double().repeat_interleave(counts, 0)
    again, others_history = run(repeated, make_flow(seed=1).double(), batch_size=len(repeated), **options)
    assert history.loss == pytest.approx(others_history.loss)
    for p, q in zip(flow.parameters(), again.parameters()):
        torch.testing.assert_close(p, q)


def test_the_scale_of_weights_does_not_matter_and_arrays_serve():
    weights = torch.rand(400)
    first, second = run(X, weights=weights)[1], run(X, weights=100 * weights.numpy())[1]
    assert first.loss == pytest.approx(second.loss)
    assert first.validation_loss == pytest.approx(second.validation_loss)
    assert run(X, weights=torch.full((400,), 7.0))[1].loss == pytest.approx(run(X)[1].loss)
    series = pandas.Series(weights.numpy(), index=range(1, 401))
    assert run(X, weights=series)[1].loss == run(X, weights=weights.tolist())[1].loss == pytest.approx(first.loss)


def test_rows_of_one_number_each():
    class Normal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

        def forward(self):
            return dist.Normal(self.loc, self.log_scale.exp())

    for convert in (lambda x: x, lambda x: x.double().numpy()):
        normal, x = Normal(), 1 + 2 * torch.randn(500, generator=torch.Generator().manual_seed(0))
        rn.fit(normal, convert(x), num_steps=400, lr=0.05, validation=0, progress=False)
        torch.testing.assert_close(normal().mean, x.mean(), atol=0.1, rtol=0)
        torch.testing.assert_close(normal().stddev, x.std(), atol=0.1, rtol=0)


@table(
    ("weights", "message"),
    {
        "too few": (torch.ones(10), r"a weight for each of the 400 rows of x; got shape \(10,\)"),
        "matrix": (torch.ones(400, 1), r"got shape \(400, 1\)"),
        "negative": (-torch.ones(400), "finite weights >= 0"),
        "all zero": (torch.zeros(400), "some are positive"),
        "nan": (torch.full((400,), torch.nan), "finite weights"),
        "one": ((torch.arange(400) == 0).float(), "at least two rows of x, of positive weight; got 1 of 400"),
    },
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        run(X, weights=weights)


def test_rows_of_weight_0_do_not_count(tmp_path):
    """They may be anything: they made each loss nan, and all steps were skipped."""
    keep, weights = torch.arange(400) % 3 > 0, torch.rand(400)
    filled = torch.where(keep[:, None], X, torch.tensor([torch.inf, 1e25]))
    np.save(tmp_path / "x.npy", filled.numpy())
    expected = run(X[keep], weights=weights[keep])[1]
    for x in (filled, np.load(tmp_path / "x.npy", mmap_mode="r")):
        history = run(x, weights=weights * keep)[1]
        assert history.loss == pytest.approx(expected.loss)
        assert history.validation_loss == pytest.approx(expected.validation_loss)


def test_extreme_held_out_rows_have_the_numbers_that_the_user_knows():
    weights = (torch.arange(100) >= 50).float()
    held_out = X[:100].clone()
    held_out[70] = 1e6
    with pytest.warns(RuntimeWarning, match=r"the held-out rows \[70\] are far"):
        run(X, validation=(held_out, None, weights))


@pytest.mark.parametrize("shape", [(400,), (400, 1)])
@pytest.mark.parametrize("convert", [lambda labels: labels, lambda labels: labels.numpy()])
def test_an_embedding_reads_labels(shape, convert):
    labels = (X[:, :1] > 0).long().reshape(shape)
    embedding = nn.Sequential(nn.Embedding(2, 3), nn.Flatten(1))
    flow = rn.Flow(rn.real_nvp(2, num_couplings=2, hidden_dims=(8,), context_dim=3), embedding=embedding)
    rn.fit(flow, X, context=convert(labels), num_steps=5, validation=0.1, progress=False, seed=0)
    assert flow(labels).log_prob(X).shape == (400,)
    flow.embedding = None
    with pytest.raises(TypeError, match=r"one_hot|floating-point array"):
        rn.fit(flow, X, context=convert(labels), progress=False)


def test_marks_of_many_rows_stay_inside():
    rows = Rows(make_flow(seed=1), X)
    rows.columns = Batch(torch.zeros(1, 2).expand(2**24 + 4, 2))
    assert isinstance(rows.mark(), int)


def test_arrays_serve_a_flow_of_16_bits():
    flow = make_flow(seed=1).bfloat16()
    assert len(run(X.double().numpy(), flow)[1].loss) == 40
    with pytest.raises(ValueError, match="bfloat16 is too coarse"):
        run(X.double().numpy() + 100, flow)


def test_weights_keep_their_graph_to_themselves():
    weights = torch.rand(400, requires_grad=True)
    assert run(X, weights=weights)[1].loss == pytest.approx(run(X, weights=weights.detach())[1].loss)
    assert weights.grad is None
