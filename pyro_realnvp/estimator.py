# SPDX-License-Identifier: Apache-2.0
"""A density estimator with the interface of scikit-learn."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Tensor

from .columns import Columns, check_weights
from .distributions import Flow
from .extremes import fit_scaler, standardized
from .table_flows import candidates, fading_noise, is_better, mixture_start, refit
from .ties import warn_of_ties
from .training.history import History
from .training.maximum_likelihood import fit, for_an_estimator

Seed = int | np.random.RandomState | None

_LOCK = threading.Lock()
_ROWS_PER_PASS = 4096


class RealNVPDensity(DensityMixin, BaseEstimator):
    r"""A normalizing flow as a scikit-learn estimator, fitted by maximum likelihood:
    :math:`\log p(x) = \log p_0(f^{-1}(x)) + \log|\det \partial f^{-1} / \partial x|` (Dinh et al. 2017, eqs. 2-8).

    The estimator maps the columns to the real line, standardizes them with the statistics of the training rows, and
    models them by :func:`real_nvp` (a single column by a spline). The fitted :class:`Flow` contains all of these steps,
    so that its densities are in the units of X. A fraction of the rows is held out, and the weights that score best on
    them are kept. Noise is added to the training rows and fades away during training; if there are few rows, the best
    weights come early, while there is still noise.

    Args:
        support: the values of the columns: ``"real"``, ``"positive"``, a pair (low, high), in which None stands for no
            bound, ``"integer"``, ``("integer", low, high)``, ``"count"`` for 0, 1, 2, ..., or ``("circular", period)``
            for angles and hours (``"circular"``: 2 pi). A sequence gives each column its own; a dict does so by column
            name or number and leaves the other columns real. Whole numbers are dequantized: they get uniform noise,
            and their scores are probabilities (Theis et al. 2016, section 3.1). On a circle, scores add up over its
            turns, and samples lie in the period that X lies in.
        noise: the standard deviation of the noise at the start of training, as a fraction of the standard deviation of
            the rows in each direction; 0 for none.
        num_components: the number of normals in the base, a :class:`MixtureBase` if there are several. ``"auto"``
            trains a flow from one normal and, if :meth:`MixtureBase.for_rows` finds several, one from these, and keeps
            the one that scores better on the held-out rows. Unless it beats the mixture itself there by more than a
            standard error, the estimator keeps the mixture, which it then chooses and fits anew with all rows.
        num_couplings, hidden_dims: as in :func:`real_nvp`.
        num_steps, batch_size, lr, weight_decay, patience, compile: as in :func:`fit`.
        validation: the fraction of the rows that is held out; 0 for none.
        device: the device that trains and evaluates; by default the CPU.
        random_state: an int, a numpy ``RandomState`` or None.
        verbose: whether to show a progress bar, as :func:`fit` does.

    Attributes:
        flow_ (Flow): the fitted flow, in the units and the precision of X.
        history_ (History): the record of the training, which ``plots.plot_loss`` draws.
        n_features_in_ (int): the number of columns of X.
        feature_names_in_ (ndarray): the names of the columns, if X had any.
        n_context_in_ (int): the number of columns of the context, 0 for none.
        context_scaler_ (StandardScaler): the map from contexts to the context of ``flow_``; only if :meth:`fit` had
            one.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> density = RealNVPDensity(support="positive", num_steps=20, random_state=0).fit(X)
        >>> density.score_samples(X[:5]).shape, density.sample(3, random_state=0).shape
        ((5,), (3, 4))
    """

    def __init__(
        self,
        *,
        support: str | Sequence[Any] | Mapping[Any, Any] = "real",
        noise: float = 0.5,
        num_components: int | str = "auto",
        num_couplings: int = 16,
        hidden_dims: Sequence[int] | None = None,
        num_steps: int = 2000,
        batch_size: int = 256,
        lr: float = 5e-3,
        weight_decay: float = 0.0,
        validation: float = 0.1,
        patience: int | None = 1000,
        compile: bool = False,
        device: str | None = None,
        random_state: Seed = None,
        verbose: bool = False,
    ):
        self.support = support
        self.noise = noise
        self.num_components = num_components
        self.num_couplings = num_couplings
        self.hidden_dims = hidden_dims
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.validation = validation
        self.patience = patience
        self.compile = compile
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self, X: ArrayLike, y: Any = None, *, context: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> "RealNVPDensity":
        """Fits a new flow to the rows of X and returns the estimator.

        Args:
            X: the rows, an array or a data frame of shape ``(n_samples, n_features)``.
            y: ignored.
            context: the context of each row, ``(n_samples, n_context)``. If given, the flow models the density of a row
                of X given its row of the context.
            sample_weight: the weight of each row, ``(n_samples,)``; not negative.

        Raises:
            ValueError: X or the context has missing or infinite values, X has a constant column, values outside of the
                support or too few rows, the context or the weights do not have a row for each row of X, weights are
                negative or all zero, or the support does not fit the columns.

            KeyboardInterrupt: the training was interrupted. The estimator keeps the best flow until then.

        Warns:
            RuntimeWarning: Training steps were skipped because they were not finite; a few rows are so far from all
                others that they do not count in the scales of the columns; or the density has no bound, because
                columns hold undeclared whole numbers, repeat one value, are copies of others or depend on them
                linearly, or many rows are copies of others.
        """
        names = list(getattr(X, "columns", ()))
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=3)
        if sample_weight is not None:
            sample_weight = check_weights(sample_weight, X)
        random = check_random_state(self.random_state)
        order = random.permutation(len(X) if sample_weight is None else np.flatnonzero(sample_weight))
        if not 0 <= self.validation <= 1:
            raise ValueError(f"expected validation from 0 to 1, a fraction of the rows; got {self.validation!r}")
        if not self.noise >= 0:
            raise ValueError(f"expected noise >= 0; got {self.noise!r}")
        num_held_out = max(1, int(self.validation * len(order))) if self.validation else 0
        if len(order) - num_held_out < 2:
            raise ValueError(
                f"expected at least two rows to train on; got {len(order)} rows, {num_held_out} of them held out: "
                "pass more rows, or a smaller validation="
            )
        held_out, rows = order[:num_held_out], order[num_held_out:]
        self.columns_: Columns = Columns(self.support, X[order], names)
        self.columns_.check(X[order])
        warn_of_ties(X[order], self.columns_)
        X = self.columns_.unwrap(X)
        self.n_context_in_: int = 0
        vars(self).pop("context_scaler_", None)
        if context is not None:
            weights = np.isin(np.arange(len(X)), rows) * (1 if sample_weight is None else sample_weight)
            check_consistent_length(X, check_array(context, input_name="context"))
            self.context_scaler_: StandardScaler = fit_scaler(context, weights, "context")
            self.n_context_in_ = self.context_scaler_.n_features_in_
        columns = (X, self._standard_context(context), sample_weight)
        train, apart = ([c if c is None else self._tensor(c[p]) for c in columns] for p in (rows, held_out))
        seeds = [int(seed) for seed in random.randint(2**31, size=2)]
        noise = torch.Generator(train[0].device).manual_seed(seeds[0])
        train[0], apart[0] = (self.columns_.add_noise(rows, noise) for rows in (train[0], apart[0]))
        x, context, weights = train
        with _seeded(random, self.device):
            flows = candidates(
                self.columns_,
                x,
                context,
                weights,
                num_components=self.num_components if num_held_out or self.num_components != "auto" else 1,
                seed=seeds[0],
                num_couplings=self.num_couplings,
                hidden_dims=self.hidden_dims,
            )
        # With a context, the start is no rival, since it says the same of all contexts.
        start = mixture_start(flows) if num_held_out and context is None else None
        histories: list[History] = []
        options = {name: getattr(self, name) for name in ("num_steps", "lr", "weight_decay", "patience", "compile")}
        with for_an_estimator(held_out):  # a flow starts as a normal or a mixture, which few rows may not improve
            for flow in flows:
                history = fit(
                    flow,
                    x,
                    context=context,
                    weights=weights,
                    validation=tuple(apart) if num_held_out else 0,
                    augment=fading_noise(flow, self.columns_, x, context, weights, self.noise, self.num_steps, noise),
                    batch_size=min(self.batch_size, len(x)),
                    seed=seeds[1],
                    standardize=False,  # the flow standardizes all columns already
                    progress=bool(self.verbose),
                    **options,
                )
                histories.append(history)
                if history.stopped == "interrupted":
                    break
        best = min(range(len(histories)), key=lambda k: histories[k].best_loss)
        self.flow_: Flow = flows[best].eval()
        self.history_: History = histories[best]
        if histories[-1].stopped == "interrupted":  # what has been trained is kept, but is not what was asked for
            raise KeyboardInterrupt
        if start is not None and not is_better(self.flow_, start, *apart):
            # The held-out rows do not show that training improves the mixture, which all rows may therefore determine.
            with _seeded(random, self.device):
                refit(start, train, apart, num_components=self.num_components, seed=seeds[0])
            self.flow_, self.history_ = start.eval(), histories[-1]
        return self

    def score_samples(self, X: ArrayLike, *, context: ArrayLike | None = None) -> np.ndarray:
        """The log-density of each row.

        Args:
            X: the rows, ``(n_samples, n_features)``.
            context: the context of each row, ``(n_samples, n_context)``; required if :meth:`fit` had one.

        Returns:
            log p in nats, ``(n_samples,)``; -inf for rows outside of the support. In columns of whole numbers, p is a
            probability, averaged over 64 values of the noise, or up to 256 of several such columns.

        Raises:
            ValueError: The columns of X or of the context are not those of :meth:`fit`, or values are missing or
                infinite.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self.columns_.low.dtype, reset=False)
        context = self._standard_context(context, X)
        scores = np.full(len(X), -np.inf, dtype=X.dtype)
        inside = np.flatnonzero(self.columns_.is_inside(X))
        with torch.no_grad():
            for rows in np.array_split(inside, math.ceil(len(inside) / _ROWS_PER_PASS)) if len(inside) else ():
                density = self.flow_() if context is None else self.flow_(self._tensor(context[rows]))
                each = [density.log_prob(self._tensor(x)) + math.log(w) for x, w in self.columns_.points(X[rows])]
                # Of rows so far away that differences overflow, the density is below all numbers.
                each = [log_p.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf) for log_p in each]
                scores[rows] = torch.stack(each).logsumexp(0).cpu().numpy()
        return scores

    def score(
        self, X: ArrayLike, y: Any = None, *, context: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> float:
        """The mean of :meth:`score_samples`, weighted by ``sample_weight``. Higher is better."""
        scores = self.score_samples(X, context=context)
        weights = np.ones(len(scores)) if sample_weight is None else check_weights(sample_weight, scores)
        # Rows without weight may score -inf, and 0 times -inf would make the mean nan.
        return float(np.average(np.where(weights > 0, scores, 0), weights=weights))

    def sample(
        self, n_samples: int | None = None, random_state: Seed = None, *, context: ArrayLike | None = None
    ) -> np.ndarray:
        """Draws rows from the fitted density.

        Args:
            n_samples: the number of rows to draw; by default one, or one for each row of the context.
            random_state: an int, a numpy ``RandomState`` or None.
            context: the context of each row, ``(n_samples, n_context)``, or one context for all, ``(1, n_context)``.

        Returns:
            The rows, ``(n_samples, n_features)``.

        Raises:
            ValueError: ``n_samples`` is less than 1, the context has neither one row nor ``n_samples``, or its columns
                are not those of :meth:`fit`.
        """
        check_is_fitted(self)
        context = self._standard_context(context)
        n_samples = (1 if context is None else len(context)) if n_samples is None else n_samples
        if not isinstance(n_samples, (int, np.integer)) or n_samples < 1:
            raise ValueError(f"expected a whole number n_samples >= 1; got {n_samples!r}")
        if context is not None:
            if len(context) not in (1, n_samples):
                raise ValueError(
                    f"expected one context, or one for each of the {n_samples} rows to draw; got {len(context)}: leave "
                    "n_samples out to draw one row for each context"
                )
            context = np.broadcast_to(context, (n_samples, context.shape[1]))
        with _seeded(check_random_state(random_state), self.device), torch.no_grad():
            density = self.flow_() if context is None else self.flow_(self._tensor(context))
            rows = density.sample((n_samples,) if context is None else ()).cpu().numpy()
        return self.columns_.restore(rows).astype(rows.dtype)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _standard_context(self, context: ArrayLike | None, X: np.ndarray | None = None) -> np.ndarray | None:
        """The context that the flow takes, checked."""
        array = None if context is None else check_array(context, input_name="context")
        expected, got = self.n_context_in_, 0 if array is None else array.shape[1]
        if got != expected:
            routing = (
                ": pass context=; searches and cross-validation pass it on if you call "
                "sklearn.set_config(enable_metadata_routing=True) and search with an estimator that has "
                ".set_fit_request(context=True).set_score_request(context=True)"
            )
            raise ValueError(
                f"expected a context of {expected or 'no'} columns, as in fit; got {got or 'none'}"
                + (routing if context is None else "")
            )
        if array is None:
            return None
        check_consistent_length(X, array)
        # This checks the names of the columns, too. It is precise enough for seconds since 1970, unlike float32.
        return standardized(context, self.context_scaler_, self.columns_.low.dtype)


@contextmanager
def _seeded(random: np.random.RandomState, device: torch.device | str | None) -> Iterator[None]:
    """Seeds torch's generators, and restores their states at the end.

    The generators belong to all threads, so only one thread at a time may have seeded them.
    """
    devices = [device] if device is not None and torch.device(device).type == "cuda" else []
    with _LOCK, torch.random.fork_rng(devices):
        torch.manual_seed(int(random.randint(2**31)))
        yield
