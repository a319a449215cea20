# SPDX-License-Identifier: Apache-2.0
"""Draws from a posterior with their diagnostics."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .convergence import effective_sample_size, r_hat
from .predictions import Predictions
from .traces import check_argument_names

if TYPE_CHECKING:
    from arviz import InferenceData


@dataclass
class PosteriorSamples:
    """The draws of :func:`sample_posterior` or :func:`neutra` with their diagnostics, to be printed."""

    samples: dict[str, Tensor]
    """The draws of each latent site of the model, chain after chain, ``(num_chains * num_samples,) + site shape``."""
    divergences: Tensor
    """Whether the integration of a trajectory failed, ``(num_chains, num_samples)``. It should be so nowhere."""
    acceptance: Tensor
    """The acceptance probability of each trajectory, ``(num_chains, num_samples)``. NUTS tells the mean of each chain
    only, which then stands at all of its draws."""
    seconds: float
    """The wall-clock time, including the warmup."""
    jumps: Tensor | None = None
    """Whether the guide's proposal was accepted, ``(num_chains, num_samples)``. None if the draws are those of NUTS."""
    energy: Tensor | None = None
    r"""The energy :math:`-\log p + |p|^2 / 2` at each draw, ``(num_chains, num_samples)``. None if the draws are those
    of NUTS."""
    model: Callable | None = field(default=None, repr=False)
    """The model. It is not pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"model": None}

    @property
    def by_chain(self) -> dict[str, Tensor]:
        """The draws of each site, ``(num_chains, num_samples) + site shape``."""
        return {name: draws.unflatten(0, self.divergences.shape) for name, draws in self.samples.items()}

    @cached_property
    def r_hat(self) -> dict[str, Tensor]:
        """Rank-normalised split R-hat of each entry (Vehtari et al. 2021), 1 if the halves of all chains agree.

        From 32 chains on, groups of chains that begin near each other take the place of the chains. Entries that never
        vary have nan.
        """
        return {name: r_hat(draws) for name, draws in self.by_chain.items()}

    @cached_property
    def effective_sample_size(self) -> dict[str, Tensor]:
        """The number of independent draws of each entry that the draws are worth (bulk-ESS; Vehtari et al. 2021)."""
        return {name: effective_sample_size(draws) for name, draws in self.by_chain.items()}

    @property
    def min_ess(self) -> float:
        """The smallest effective sample size of all entries, nan if none of them varies."""
        return -_largest({name: -ess for name, ess in self.effective_sample_size.items()})

    @property
    def max_r_hat(self) -> float:
        """The largest R-hat of all entries, nan if none of them varies."""
        return _largest(self.r_hat)

    @property
    def min_ess_per_second(self) -> float:
        """The smallest effective sample size of all entries, per second."""
        return self.min_ess / self.seconds

    def to_arviz(
        self,
        *args: Any,
        model: Callable | None = None,
        log_likelihood: bool = False,
        posterior_predictive: bool = False,
        **kwargs: Any,
    ) -> "InferenceData":
        r"""The draws as an ``InferenceData`` of ArviZ, with the groups ``posterior`` and ``sample_stats`` (diverging,
        acceptance_rate, energy), and on request others.

        Args:
            args, kwargs: the model's arguments, with the observations; only needed for the other groups.
            model: the model; only needed for draws that were unpickled, or for one that differs from that of the draws
                in what is observed.
            log_likelihood: whether to add :math:`\log p(x_n \mid z)` of each observation, which ``arviz.loo`` reads,
                and the group ``observed_data``. Terms of ``pyro.factor`` are none, and ``poutine.scale`` does not
                count. Entries that a mask leaves out of the density, as ``obs_mask`` does, are no observations: the
                others of the site are then on one axis.
            posterior_predictive: whether to add one new draw of each observation for each draw of the latents, and the
                group ``observed_data``. Discrete latents that the model sums over are drawn from their priors.

        Raises:
            ImportError: ArviZ is not installed.
            RuntimeError: the draws were unpickled, and ``model`` is missing.
            ValueError: the model observes nothing; plates draw subsamples of their rows; the log-likelihood is wanted
                of a model that sums over discrete latents.

        Example:
            >>> import pyro
            >>> import pyro.distributions as dist
            >>> from pyro_realnvp import AutoRealNVP, fit_guide, sample_posterior
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("rows", len(y)):
            ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            >>> y = torch.randn(5)
            >>> guide = AutoRealNVP(model)
            >>> history = fit_guide(guide, y, num_steps=20, seed=0, progress=False)
            >>> posterior = sample_posterior(guide, y, num_samples=10, seed=0, progress=False)
            >>> data = posterior.to_arviz(y, log_likelihood=True)
            >>> data.log_likelihood["y"].shape
            (256, 10, 5)
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install 'pyro_realnvp[arviz]'") from error
        stats = {"diverging": self.divergences, "acceptance_rate": self.acceptance, "energy": self.energy}
        groups = {"posterior": self.by_chain, "sample_stats": {k: v for k, v in stats.items() if v is not None}}
        if log_likelihood or posterior_predictive:
            model = self.model if model is None else model
            if model is None:
                raise RuntimeError("the draws were unpickled and have lost their model: pass model=")
            check_argument_names(model, self.to_arviz, args)
            predictions = Predictions(model, args, kwargs, self.samples)
            groups["observed_data"] = predictions.observed
            shape = self.divergences.shape
            if log_likelihood:
                found = predictions.log_likelihood()
                groups["log_likelihood"] = {name: values.unflatten(0, shape) for name, values in found.items()}
            if posterior_predictive:
                found = predictions.draw()
                groups["posterior_predictive"] = {name: values.unflatten(0, shape) for name, values in found.items()}
        arrays = {
            group: {name: value.numpy(force=True) for name, value in sites.items()} for group, sites in groups.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="More chains")  # than draws, which is meant
            return arviz.from_dict(**arrays)

    def __repr__(self) -> str:
        lines = [f"{'site':<20} {'mean':>9} {'std':>9} {'r-hat':>7} {'ess':>8}"]
        for name, values in self.samples.items():
            columns = (values.mean(0), values.std(0), self.r_hat[name], self.effective_sample_size[name])
            rows = zip(*(column.reshape(-1).tolist() for column in columns))
            for k, (mean, std, agreement, ess) in enumerate(rows):
                label = name if values.dim() == 1 else f"{name}[{k}]"
                lines.append(f"{label:<20} {mean:>9.3g} {std:>9.3g} {agreement:>7.3f} {ess:>8.0f}")
        rates = f"acceptance {self.acceptance.mean():.2f}"
        if self.jumps is not None:
            rates += f", of the guide's proposals {self.jumps.float().mean():.2f}"
        return "\n".join(
            [
                *lines,
                f"{int(self.divergences.sum())} divergences, {rates}, {self.seconds:.1f} s, "
                f"{self.min_ess_per_second:.1f} draws/s",
            ]
        )


def _largest(values: dict[str, Tensor]) -> float:
    flat = torch.cat([value.reshape(-1) for value in values.values()])
    known = flat[~flat.isnan()]
    return known.max().item() if len(known) else float("nan")
