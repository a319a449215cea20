# SPDX-License-Identifier: Apache-2.0
"""Bad data by every door: each cause has its own message, which says what to do."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers import make_flow, table
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_realnvp as rn
from pyro_realnvp.training import streams


def run(flow, x, **options):
    return rn.fit(flow, x, **{"num_steps": 20, "progress": False, "seed": 0} | options)


def with_bad(value, shape=(64, 2)):
    x = torch.randn(shape)
    x[3, 0] = value
    return x


def images_flow():
    return rn.DequantizedFlow(rn.Flow(rn.Compose([rn.image_real_nvp((1, 4, 4), hidden_channels=2), rn.Logit().inv])))


def proportions_flow():
    return rn.Flow(rn.Compose([rn.real_nvp(2, num_couplings=2), rn.Logit(0).inv], event_shape=(2,)))


def labelled(*shape):
    return DataLoader(TensorDataset(torch.randn(64, *shape), torch.randint(10, (64,))), batch_size=16)


def on_bounds():
    x = torch.rand(64, 2)
    x[5], x[9, 1] = 0.0, 1.0
    return x


def flow_with_hidden_location():
    loc = nn.Parameter(torch.zeros(2))
    return rn.Flow(rn.real_nvp(2), base=lambda: dist.Normal(loc, 1.0).to_event(1))


def flow_with_hidden_scale():
    normal = dist.Normal(torch.zeros(2), nn.Parameter(torch.ones(())))  # which expands the parameter
    normal_scores = dist.transforms.CumulativeDistributionTransform(normal).inv
    return rn.Flow(rn.Compose([rn.real_nvp(2), dist.transforms.SigmoidTransform(), normal_scores]))


class Entries(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))

    def forward(self):
        return dist.Normal(self.loc, 1.0)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(2)


class Table:
    """What a DataFrame says of itself."""

    def to_numpy(self):
        return torch.randn(64, 2).numpy()


@table(
    ("call", "error", "message"),
    {
        "parameters that a function holds": (
            lambda: run(flow_with_hidden_location(), torch.randn(64, 2)),
            ValueError,
            r"a parameter of shape \(2,\) .* make it an attribute",
        ),
        "parameters that a distribution expands": (
            lambda: run(flow_with_hidden_scale(), torch.randn(64, 2)),
            ValueError,
            r"a parameter of shape \(\) .* make it an attribute",
        ),
        "floats as levels": (
            lambda: run(images_flow(), torch.rand(64, 1, 4, 4)),
            TypeError,
            r"if they are in \[0, 1\], pass \(x \* 255\).round\(\).long\(\)",
        ),
        "floats as levels, scored": (
            lambda: images_flow()().log_prob(torch.rand(64, 1, 4, 4)),
            TypeError,
            r"pass \(x \* 255\).round\(\).long\(\)",
        ),
        "labels": (lambda: run(make_flow(), labelled(2)), ValueError, "if the second is a label, let it yield x alone"),
        "labels of images": (
            lambda: run(images_flow(), DataLoader(TensorDataset(torch.ones(8, 1, 4, 4).long(), torch.ones(8)))),
            ValueError,
            "if the second is a label",
        ),
        "labels as contexts": (lambda: run(make_flow(context_dim=10), labelled(2)), ValueError, "one_hot"),
        "nan in a loader": (
            lambda: run(make_flow(), DataLoader(with_bad(torch.nan), 64)),
            ValueError,
            "1 of 64 rows of x",
        ),
        "inf in a loader": (
            lambda: run(make_flow(), DataLoader(with_bad(torch.inf), 64)),
            ValueError,
            "1 of 64 rows of x",
        ),
        "nan in a loader's context": (
            lambda: run(
                make_flow(context_dim=1),
                DataLoader(TensorDataset(torch.randn(64, 2), with_bad(torch.nan, (64, 1))), 64),
            ),
            ValueError,
            "1 of 64 rows of context",
        ),
        "on a bound": (lambda: run(proportions_flow(), on_bounds()), ValueError, "2 of 64 rows of x on a bound"),
        "on a bound, in a loader": (
            lambda: run(proportions_flow(), DataLoader(on_bounds(), 64)),
            ValueError,
            "2 of 64 rows of x on a bound or beyond, where the density is 0: move them inside",
        ),
        "on a bound, held out": (
            lambda: run(proportions_flow(), torch.rand(64, 2), validation=on_bounds()),
            ValueError,
            "2 of 64 rows of x on a bound",
        ),
        "padded images": (
            lambda: run(rn.Flow(rn.image_real_nvp((1, 4, 4))), torch.nn.functional.pad(torch.rand(9, 1, 4, 3), (0, 1))),
            ValueError,
            r"pixels \[3, 7, 11, 15\] of x are constant .* use a DequantizedFlow or add noise",
        ),
        "constant up to rounding": (
            lambda: run(make_flow(), torch.stack([torch.randn(64), 0.1 + 1e-9 * torch.randn(64)], -1)),
            ValueError,
            r"columns \[1\] of x are constant",
        ),
        "seconds since 1970": (
            lambda: run(make_flow(), 1.7e9 + np.random.default_rng(0).uniform(0, 60, (64, 2))),
            ValueError,
            "column 0 of x runs from 1.7e.09 to .*float32 is too coarse for: subtract a constant",
        ),
        "seconds as contexts": (
            lambda: run(
                make_flow(context_dim=1),
                torch.randn(64, 2),
                context=1.7e9 + np.random.default_rng(0).uniform(0, 60, (64, 1)),
            ),
            ValueError,
            "column 0 of context runs from 1.7e",
        ),
        "beyond float32": (
            lambda: run(make_flow(), 1e39 * np.random.default_rng(0).normal(size=(64, 2))),
            ValueError,
            r"column 0 of x runs from -.*e\+39 .* too coarse",
        ),
        "rows with a graph": (
            lambda: run(make_flow(), 2 * torch.randn(64, 2, requires_grad=True)),
            ValueError,
            "pass x.detach()",
        ),
        "a table": (lambda: run(make_flow(), Table()), TypeError, r"got Table: pass x.to_numpy\(\)"),
        "a list": (lambda: run(make_flow(), [[0.0, 1.0]] * 64), TypeError, r"got list: pass np.asarray\(x\)"),
        "rows that augment drops": (
            lambda: run(make_flow(), torch.randn(64, 2), weights=torch.rand(64), augment=lambda x: x[::2]),
            ValueError,
            "expected augment to keep the 58 rows",
        ),
        "sparse rows": (lambda: run(make_flow(), torch.randn(64, 2).to_sparse()), TypeError, "pass x.to_dense()"),
        "flat contexts": (
            lambda: run(make_flow(context_dim=1), torch.randn(64, 2), context=torch.randn(64)),
            ValueError,
            r"got \(64,\): pass context\[:, None\]",
        ),
        "half a row": (lambda: run(make_flow(), torch.randn(64, 2), batch_size=32.0), ValueError, "got 32.0"),
        "without gradients": (
            lambda: torch.no_grad()(run)(make_flow(), torch.randn(64, 2)),
            RuntimeError,
            "outside of torch.no_grad",
        ),
        "axes of a row that are no event": (
            lambda: run(Entries(), torch.randn(64, 4)),
            ValueError,
            r"one log-density for each of the \d+ rows; got shape .*by .to_event\(\)",
        ),
        "dicts in a loader": (
            lambda: run(make_flow(), DataLoader([{"x": torch.randn(2)}] * 64, 16)),
            TypeError,
            "expected batches of tensors.*got dict",
        ),
        "no validation": (
            lambda: run(make_flow(), torch.randn(64, 2), validation=None),
            TypeError,
            "got NoneType: pass 0 to hold out none",
        ),
        "one callback": (
            lambda: run(make_flow(), torch.randn(64, 2), callbacks=print),
            TypeError,
            r"pass callbacks=\[print\]",
        ),
        "no averaging": (lambda: run(make_flow(), torch.randn(64, 2), averaging=None), ValueError, "averaging from 0"),
        "generator to validate": (
            lambda: run(make_flow(), torch.randn(64, 2), validation=(torch.randn(8, 2) for _ in range(3))),
            ValueError,
            "that each validation can read again; got a generator",
        ),
        "array to score": (lambda: make_flow()().log_prob(np.zeros((3, 2))), TypeError, "torch.as_tensor"),
        "array to standardize": (lambda: rn.Standardize(2).fit(np.zeros((3, 2))), TypeError, "torch.as_tensor"),
        "array to initialize": (lambda: rn.ActNorm(2).initialize(np.zeros((3, 2))), TypeError, "torch.as_tensor"),
        "array as context": (lambda: make_flow(context_dim=1)(np.zeros((3, 1))), TypeError, "torch.as_tensor"),
        "a number of samples": (lambda: make_flow()().sample(1000), TypeError, r"got 1000: pass \(1000,\)"),
        "a number of draws": (lambda: make_flow()().rsample(1000), TypeError, r"got 1000: pass \(1000,\)"),
        "temperature without a mean": (
            lambda: rn.Flow(
                rn.real_nvp(2), base=rn.Base(dist.StudentT, df=torch.ones(2), loc=torch.zeros(2), scale=torch.ones(2))
            )(temperature=0.5),
            ValueError,
            "expected a base with a mean",
        ),
        "one scale": (
            lambda: rn.image_real_nvp((1, 7, 7)),
            ValueError,
            r"torch.nn.functional.pad\(x, \(0, 1, 0, 1\)\)$",
        ),
    },
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_endless_validation_data(monkeypatch):
    monkeypatch.setattr(streams, "_MOST_BATCHES", 10)
    with pytest.raises(ValueError, match="expected validation data that end; got 10 batches"):
        run(make_flow(), torch.randn(64, 2), validation=DataLoader(Endless(), batch_size=4))
    assert len(run(make_flow(), DataLoader(Endless(), batch_size=4)).loss) == 20


@table(
    "call, message",
    {
        "fill values": (
            lambda: run(make_flow(), with_bad(1e20), validation=0),
            r"1 of 64 rows of x hold values such as 1e\+20, far beyond all others: if these are fill values, drop",
        ),
        "fill values in a context": (
            lambda: run(make_flow(context_dim=1), torch.randn(64, 2), context=with_bad(1e20, (64, 1)), validation=0),
            "1 of 64 rows of context hold values such as 1e",
        ),
        "images of 0 and 1": (
            lambda: run(images_flow(), torch.randint(2, (64, 1, 4, 4))),
            "all values of x are 0 or 1, while the flow has 256 levels",
        ),
        "a high learning rate": (lambda: run(make_flow(), torch.randn(64, 2), lr=30.0), "the training has raised"),
    },
)
def test_warnings(call, message):
    with pytest.warns(RuntimeWarning, match=message), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of|.*steps had a loss")
        call()


def test_a_torch_distribution_as_a_base():
    base = rn.Base(torch.distributions.Normal, loc=torch.zeros(2), scale=torch.ones(2))
    assert rn.Flow(rn.real_nvp(2), base=base)().sample((3,)).shape == (3, 2)


def test_options_may_be_scalars_of_torch():
    x = torch.randn(64, 2)
    flows = [make_flow(), make_flow()]
    flows[1].load_state_dict(flows[0].state_dict())
    for flow, lr, steps in zip(flows, (0.003, torch.tensor(0.003)), (5, torch.tensor(5))):
        assert len(run(flow, x, lr=lr, num_steps=steps).loss) == 5
    torch.testing.assert_close(flows[0].state_dict(), flows[1].state_dict())
