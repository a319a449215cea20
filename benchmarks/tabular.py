# SPDX-License-Identifier: Apache-2.0
"""Held-out log-likelihood of small tables, in nats per row: `RealNVPDensity` with its defaults beside other estimators.

All methods see the same folds. Their columns are standardized with the training rows of the fold.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pyro_realnvp import RealNVPDensity

from .peers import Contender, Setting, zuko_nvp
from .tables import print_table, verdict
from .time_to import nflows_inverse

FOLDS = KFold(5, shuffle=True, random_state=0)
DEFAULTS = RealNVPDensity()
LRS, VALIDATE_EVERY, PATIENCE = (1e-3, 3e-3), 50, 500
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A function that fits the first rows and returns the scores of the second rows."""


def ours(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return RealNVPDensity(random_state=0).fit(train).score_samples(test)


def gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return multivariate_normal(train.mean(0), np.cov(train.T, bias=True)).logpdf(test)


def mixture(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    kinds = [(num, kind) for num in range(1, 9) for kind in ("full", "tied", "diag")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [GaussianMixture(num, covariance_type=kind, n_init=3, random_state=0).fit(train) for num, kind in kinds]
    return min(fits, key=lambda fit: fit.bic(train)).score_samples(test)


def kernels(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    # The folds are shuffled, since the rows of some data sets are ordered by class.
    search = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.03, 3, 21)}, cv=FOLDS)
    return search.fit(train).score_samples(test)


def flow_of(make: Callable[[Setting], Contender], train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """A peer with the number of couplings and the network widths of ours, and the same fraction of rows held out."""
    dim, order = train.shape[1], np.random.RandomState(0).permutation(len(train))
    shuffled = torch.as_tensor(train[order], dtype=torch.float32)
    held_out, x = shuffled.tensor_split([int(DEFAULTS.validation * len(train))])
    setting = Setting(dim, min(DEFAULTS.batch_size, len(x)), DEFAULTS.num_couplings, (max(32, 2 * dim),) * 2)
    outcomes = []
    for lr in LRS:
        torch.manual_seed(0)
        contender = with_tanh(make(setting))
        outcomes.append((by_hand(contender, x, held_out, lr, setting.batch), contender))
    best = min(outcomes, key=lambda outcome: outcome[0])[1]
    with torch.no_grad():
        return best.log_prob(torch.as_tensor(test, dtype=torch.float32)).double().numpy()


def with_tanh(contender: Contender) -> Contender:
    """Replaces ReLU by Tanh, our activation. With ReLU, both peers lose more than ten nats on breast_cancer."""
    for module in list(contender.module.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Tanh())
    return contender


def by_hand(contender: Contender, x: Tensor, held_out: Tensor, lr: float, batch: int) -> float:
    """The training loop of the tutorials, with early stopping. It restores the best weights and returns their held-out
    loss."""
    optimizer = torch.optim.Adam(contender.parameters(), lr)
    least, best_step, weights = math.inf, 0, copy.deepcopy(contender.module.state_dict())
    for step in range(1, DEFAULTS.num_steps + 1):
        optimizer.zero_grad()
        loss = -contender.log_prob(x[torch.randperm(len(x))[:batch]]).mean()
        loss.backward()
        optimizer.step()
        if step % VALIDATE_EVERY == 0:
            with torch.no_grad():
                held_out_loss = float(-contender.log_prob(held_out).mean())
            if held_out_loss < least:
                least, best_step, weights = held_out_loss, step, copy.deepcopy(contender.module.state_dict())
            if step - best_step >= PATIENCE:
                break
    contender.module.load_state_dict(weights)
    return least


OURS = "RealNVPDensity"
METHODS: dict[str, Method] = {
    OURS: ours,
    "nflows": partial(flow_of, nflows_inverse),
    "Zuko": partial(flow_of, zuko_nvp),
    "KernelDensity": kernels,
    "GaussianMixture": mixture,
    "Gaussian": gaussian,
}


def tables() -> dict[str, np.ndarray]:
    """The tables with real columns that come with scikit-learn.

    In diabetes the column s2 equals s1 - s3 - exp(s5) / 5 up to rounding, and s4 equals s1 / s3, often rounded to a
    whole number. So the rows lie on a surface, the likelihood has no upper bound, and the comparison shows how close
    to the surface each method puts its mass.
    """
    diabetes = load_diabetes().data
    return {
        "wine": load_wine().data,
        "breast_cancer": load_breast_cancer().data,
        "diabetes": np.delete(diabetes, 1, axis=1),  # without the sex, which has two values
        "diabetes without s2 and s4": np.delete(diabetes, [1, 5, 7], axis=1),
        "digits": load_digits().data,
        "iris": load_iris().data,
    }


def folds_of(name: str, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for train, test in FOLDS.split(x):
        steps = [PCA(16, random_state=0), StandardScaler()] if name == "digits" else [StandardScaler()]
        scaler = make_pipeline(*steps).fit(x[train])
        pairs.append((scaler.transform(x[train]), scaler.transform(x[test])))
    return pairs


def compare(name: str, x: np.ndarray) -> None:
    folds = folds_of(name, x)
    scores, seconds = {}, {}
    for method, scores_of in METHODS.items():
        started = time.perf_counter()
        scores[method] = np.concatenate([scores_of(train, test) for train, test in folds])
        seconds[method] = time.perf_counter() - started
    best = max(scores, key=lambda method: scores[method].mean())
    rows = []
    for method, values in scores.items():
        behind = scores[best] - values
        error, target = standard_error(behind), 1 if method == OURS else None
        row = [method, f"{values.mean():.3f}", f"{standard_error(values):.3f}"]
        row += ["", ""] if method == best else [f"{behind.mean():.3f}", f"{error:.3f}"]
        in_errors = 0.0 if method == best else behind.mean() / error
        rows.append([*row, f"{in_errors:.1f}", *verdict(in_errors, target), f"{seconds[method]:.0f}"])
    header = ["", "nats per row", "s.e.", f"behind {best}", "s.e.", "/ s.e.", "target", "", "seconds"]
    shape = f"{len(x)} x {folds[0][0].shape[1]}"
    print_table(f"{name}, {shape}: held-out log-likelihood, {FOLDS.n_splits} folds", header, rows)


def standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(len(values))


def main() -> None:
    for name, x in tables().items():
        compare(name, x)
