# SPDX-License-Identifier: Apache-2.0
"""Batches from memory, from files and from streams."""

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import fit, make_flow, points, table
from torch.utils.data import DataLoader, IterableDataset

import pyro_realnvp as rn

X = points()


def run(data, flow=None, **options):
    flow = make_flow(seed=1) if flow is None else flow
    return flow, fit(flow, data, **options)


def memmap(path, values):
    np.save(path, values)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_memory_mapped_array_is_trained_on_from_the_disk(tmp_path, dtype):
    x = X.numpy().astype(dtype)
    mapped = memmap(tmp_path / "x.npy", x)
    flow, history = run(mapped)
    again, others_history = run(x)
    assert history.loss == others_history.loss
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), again.parameters()))
    assert next(flow.parameters()).dtype == torch.float32


def test_a_memory_mapped_array_is_never_read_as_a_whole(tmp_path, monkeypatch):
    mapped = memmap(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20_000, 2)))
    rows_read = []
    getitem = np.memmap.__getitem__

    def record(self, index):
        rows = getitem(self, index)
        rows_read.append(len(rows))
        return rows

    monkeypatch.setattr(np.memmap, "__getitem__", record)
    run(mapped, batch_size=64)
    assert max(rows_read) <= 4096
    assert rows_read.count(64) == 40


def test_memory_mapped_images_and_contexts(tmp_path):
    images = memmap(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 16, (60, 1, 4, 4), dtype=np.uint8))
    contexts = memmap(tmp_path / "c.npy", np.random.default_rng(1).normal(size=(60, 3)))
    flow = rn.image_real_nvp((1, 4, 4), num_scales=1, hidden_channels=4, context_dim=3)
    flow = rn.DequantizedFlow(rn.Flow(rn.Compose([flow, rn.Logit().inv])), levels=16)
    _, history = run(images, flow, context=contexts)
    assert np.isfinite(history.loss).all()


@table(
    ("values", "message"),
    {
        "nan": (np.full((100, 2), np.nan), "nan or inf in 100 of 100"),
        "constant": (np.ones((100, 2)), "constant"),
    },
)
def test_bad_values_in_a_file(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        run(memmap(tmp_path / "x.npy", values))


def test_read_only_and_reversed_arrays():
    x = X.numpy().copy()
    x.flags.writeable = False
    assert run(x)[1].loss == run(X)[1].loss
    assert run(x[::-1])[1].loss == run(X.flip(0))[1].loss


def test_arrays_whose_dtype_torch_does_not_have(tmp_path):
    """Of the other byte order, as in files of astronomy; and of extended precision."""
    x = X.numpy()
    other = x.dtype.newbyteorder()
    assert run(x.astype(other))[1].loss == run(memmap(tmp_path / "x.npy", x.astype(other)))[1].loss == run(X)[1].loss
    assert run(x.astype(np.longdouble))[1].loss == run(X)[1].loss


def test_sparse_matrices_are_refused():
    with pytest.raises(TypeError, match=r"got csr_matrix: pass x.toarray\(\)"):
        run(scipy.sparse.csr_matrix(X.numpy()))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(2)


def batches(number):
    for _ in range(number):
        yield torch.randn(32, 2)


def test_streams():
    for stream in (DataLoader(Endless(), batch_size=16), batches(40), iter([X[:100]] * 40)):
        assert len(run(stream)[1].loss) == 40
    assert run(iter([X[:100].numpy()] * 40))[1].loss == run(iter([X[:100]] * 40))[1].loss
    conditional = make_flow(seed=1, context_dim=3)
    stream = ((torch.randn(32, 2), torch.randn(32, 3)) for _ in range(40))
    assert run(stream, conditional, validation=(X, torch.randn(400, 3)))[1].validation_steps == [0, 10, 20, 30, 40]


@table(
    ("stream", "error", "message"),
    {
        "empty": (lambda: batches(0), ValueError, "generator that yields batches; got none"),
        "too short": (lambda: batches(20), ValueError, "has come to its end"),
        "dataset below a batch": (
            lambda: DataLoader(X[:3], batch_size=8, drop_last=True),
            ValueError,
            "smaller than a batch",
        ),
        "three tensors": (lambda: iter([(X, X, X)]), ValueError, "batches of 3 tensors"),
        "dict": (lambda: {"x": X}, TypeError, "got dict"),
    },
)
def test_bad_streams(stream, error, message):
    with pytest.raises(error, match=message):
        run(stream())


def test_the_flow_keeps_its_best_weights_where_a_stream_ends():
    flow = make_flow(seed=1)
    with pytest.raises(ValueError, match="end"):
        run(iter([X[:100]] * 35), flow, validation=X)
    assert flow().log_prob(X).mean() > make_flow(seed=1)().log_prob(X).mean()


def test_no_weights_beside_a_loader():
    with pytest.raises(ValueError, match="weights= beside it"):
        run(DataLoader(X, batch_size=8), weights=torch.ones(400))
