# SPDX-License-Identifier: Apache-2.0
"""Base distributions as modules."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from .bijections.conditioners import MLP
from .bijections.inputs import check_context
from .bijections.modes import is_autocast
from .bijections.shapes import bounds, of_entries, sum_events
from .mixtures import choose_mixture, fit_mixture
from .supports import circle_of, plain


class Base(nn.Module):
    """A base distribution as a module, so that its parameters are moved and saved with the flow and can be learned.

    All of its axes form one event.

    Args:
        distribution: a class of :mod:`pyro.distributions`.
        learnable: whether the parameters are trained. Each is then stored in unconstrained coordinates.
        parameters: the arguments of the class, which must be tensors.

    Raises:
        ValueError: a parameter is invalid, parameters that constrain each other are to be learned, or the entries of an
            event constrain each other, as those of a Dirichlet.
        TypeError: a parameter is no tensor.

    Example:
        >>> heavy_tailed = Base(dist.StudentT, df=torch.tensor(4.0), loc=torch.zeros(2), scale=torch.ones(2))
        >>> heavy_tailed().event_shape
        torch.Size([2])
        >>> learned = Base(dist.Normal, loc=torch.zeros(2), scale=torch.ones(2), learnable=True)
        >>> sorted(dict(learned.named_parameters()))
        ['loc', 'scale']
    """

    def __init__(
        self, distribution: Callable[..., dist.Distribution], *, learnable: bool = False, **parameters: Tensor
    ):
        super().__init__()
        self.distribution = distribution
        self.names: tuple[str, ...] = tuple(parameters)
        self.learnable = learnable
        if learnable and not isinstance(distribution.arg_constraints, Mapping):
            raise ValueError(
                f"the parameters of {distribution.__name__} constrain each other, so they cannot be learned one "
                "by one: use learnable=False"
            )
        first = distribution(**parameters, validate_args=True)  # raises an error if the parameters are invalid
        if entries_of(first).event_dim:
            raise ValueError(
                f"expected a distribution of real numbers, or of numbers between bounds; got {distribution.__name__} "
                f"with the support {first.support}, whose entries depend on each other: transform samples of it instead"
            )
        for name, value in parameters.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"expected {name} to be a tensor; got {type(value).__name__}: pass torch.tensor({value})"
                )
            if learnable:
                self.register_parameter(name, nn.Parameter(self._constrain(name).inv(value).clone()))
            else:
                self.register_buffer(name, value.clone())

    def extra_repr(self) -> str:
        return f"{self.distribution.__name__}, learnable={self.learnable}"

    def _constrain(self, name: str) -> torch.distributions.Transform:
        """The map from the unconstrained coordinates of a parameter to its value."""
        return transform_to(self.distribution.arg_constraints[name])

    def forward(self) -> dist.Distribution:
        parameters = {name: getattr(self, name) for name in self.names}
        if self.learnable:
            parameters = {name: self._constrain(name)(value) for name, value in parameters.items()}
        base = self.distribution(**parameters, validate_args=False)
        return _Entries(base, len(base.batch_shape), validate_args=False)


class _Entries(dist.Independent):
    """Entries as one event. Beyond their support they have no density, which torch's formulas do not say; and an empty
    batch has none to sum, where torch's own class fails."""

    def cdf(self, value: Tensor) -> Tensor:
        return self._of_one_number("cdf").cdf(value)

    def icdf(self, value: Tensor) -> Tensor:
        return self._of_one_number("icdf").icdf(value)

    def _of_one_number(self, what: str) -> dist.Distribution:
        if self.reinterpreted_batch_ndims:
            raise NotImplementedError(
                f"{what} is that of single numbers; got events of shape {tuple(self.event_shape)}"
            )
        return self.base_dist

    def log_prob(self, value: Tensor) -> Tensor:
        entries, event_dim = self.base_dist, self.reinterpreted_batch_ndims
        support = entries_of(entries)
        if support is constraints.real:
            return sum_events(entries.log_prob(value), event_dim)
        inside = support.check(value)
        # Any point of the support stands in for the others, whose formula and gradient may be nan.
        value = torch.where(inside, value, transform_to(support)(torch.zeros_like(value)))
        inside = sum_events(~inside, len(entries.event_shape)) == 0
        return sum_events(torch.where(inside, entries.log_prob(value), -torch.inf), event_dim)


def within_support(base: dist.Distribution) -> dist.Distribution:
    """A base whose entries have no density beyond their support, as that of a :class:`Base`."""
    if isinstance(base, _Entries):
        return base
    support = entries_of(base)
    is_bounded = support is not constraints.real and not support.event_dim
    return _Entries(base, 0, validate_args=False) if is_bounded and _has_points(base, support) else base


def _has_points(base: dist.Distribution, support: constraints.Constraint) -> bool:
    """Whether points of a support of entries are known. Components of a mixture may have bounds of their own."""
    has_components = isinstance(plain(base), torch.distributions.MixtureSameFamily)
    if has_components and any(isinstance(end, Tensor) and end.dim() for end in bounds(support)):
        return False
    try:
        transform_to(support)
    except NotImplementedError:
        return False
    return True


def entries_of(base: dist.Distribution) -> constraints.Constraint:
    """The values of the entries of a base. One that does not say takes all real numbers."""
    try:
        support = circle_of(base) or of_entries(base.support)
        return support if support.event_dim >= 0 else constraints.real
    except NotImplementedError:  # of a base without a support, or of one that depends on what it does not say
        return constraints.real


class MixtureBase(nn.Module):
    r""":math:`p_0(x) = \sum_k \pi_k\, \mathcal N(x;\, \mu_k, L_k L_k^T)`: a base of several pieces, all learned.

    A flow is continuous, so from a single normal it makes separate pieces only with a bridge between them. From a
    mixture it needs none. :func:`fit` first initializes a new mixture from the rows, so that the flow starts as a
    mixture of normals, and then trains all parameters.

    A draw jumps between the components, so it has no gradients with respect to the parameters, and ``rsample`` raises
    an error. A context changes the weights, the locations and the diagonals, by an :class:`MLP`. The temperature of a
    :class:`Flow` scales each component about its own location.

    Args:
        event_size: the size D of an event.
        num_components: the number K of normals.
        full: whether the :math:`L_k` are triangular matrices; otherwise they are diagonal.
        context_dim: the width of the context of a conditional flow, 0 for none.
        hidden_dims: the widths of the hidden layers that read the context.

    Shapes:
        ``base()`` has batch shape ``()`` and event shape ``(D,)``, ``base(context)`` the batch shape of the context.

    Raises:
        ValueError: a size is less than 1. When called: the context is missing, unexpected or of the wrong width.

    Example:
        >>> from pyro_realnvp import Flow, real_nvp
        >>> flow = Flow(real_nvp(2), base=MixtureBase(2, num_components=3))
        >>> flow().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_size: int,
        *,
        num_components: int,
        full: bool = True,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
    ):
        super().__init__()
        for name, size in {"event_size": event_size, "num_components": num_components}.items():
            if size < 1:
                raise ValueError(f"expected {name} >= 1; got {size}")
        self.event_shape: torch.Size = torch.Size([event_size])
        self.num_components = num_components
        self.context_dim = context_dim
        self._started = False
        shape = (num_components, event_size)
        # As in TriangularAffine, what is learned is relative to the start, so that steps are in units of each normal.
        self.register_buffer("start_logits", torch.zeros(num_components))
        # Components that are equal would stay so, since their gradients are equal.
        self.register_buffer("start_locs", torch.randn(shape) if num_components > 1 else torch.zeros(shape))
        self.register_buffer("start_trils", torch.eye(event_size).repeat(num_components, 1, 1))
        self.logits: nn.Parameter = nn.Parameter(torch.zeros(num_components))
        self.locs: nn.Parameter = nn.Parameter(torch.zeros(shape))
        self.log_diagonals: nn.Parameter = nn.Parameter(torch.zeros(shape))
        self.lowers: nn.Parameter | None = nn.Parameter(torch.zeros(*shape, event_size)) if full else None
        outputs = num_components * (1 + 2 * event_size)
        self.conditioner: MLP | None = MLP(context_dim, outputs, hidden_dims) if context_dim else None

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, full={self.lowers is not None}"

    @property
    def needs_data(self) -> bool:
        """Whether :func:`fit` initializes the mixture from its rows: it is new, nothing of it has been set, and it is
        not frozen."""
        return not self._has_started() and any(p.requires_grad for p in self.parameters())

    def _has_started(self) -> bool:
        self._started = self._started or any(bool(own.any()) for own in self.parameters(recurse=False))
        return self._started

    @torch.no_grad()
    def start_at(self, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> "MixtureBase":
        """Sets the starting point and returns the base itself.

        Args:
            weights: the weights of the components, of shape ``(K,)``; they are scaled to a sum of 1.
            locs: the locations, ``(K, D)``.
            scale_trils: the lower triangular matrices, ``(K, D, D)``, diagonal unless ``full``.

        Raises:
            ValueError: a value is not finite, a shape does not fit, or a weight or an entry of a diagonal is not
                positive.
        """
        diagonals = scale_trils.diagonal(dim1=-2, dim2=-1)
        given, own = (weights, locs, scale_trils), (self.start_logits, self.start_locs, self.start_trils)
        if any(one.shape != other.shape or not one.isfinite().all() for one, other in zip(given, own)):
            shapes = ", ".join(str(tuple(one.shape)) for one in given)
            raise ValueError(f"expected finite weights (K,), locs (K, D) and scale_trils (K, D, D); got {shapes}")
        if not (weights > 0).all() or not (diagonals > 0).all():
            raise ValueError("expected weights and diagonals of scale_trils that are positive: drop empty components")
        off = scale_trils.triu(1) if self.lowers is not None else scale_trils - diagonals.diag_embed()
        if off.any():
            raise ValueError("expected scale_trils that are lower triangular, or diagonal if the base has full=False")
        for one, other in zip((weights.log(), locs, scale_trils), own):
            other.copy_(one)
        self._started = True
        return self

    @classmethod
    def for_rows(
        cls, x: Tensor | np.ndarray, weights: ArrayLike | None = None, *, context_dim: int = 0, seed: int = 0
    ) -> "MixtureBase":
        """Returns a mixture, initialized from x, with a number of components that suits a flow of such rows.

        A flow of many rows shapes each piece by itself, so there are as many normals as x has separate clusters
        (:class:`sklearn.cluster.HDBSCAN`). From few rows a flow learns little more than what it starts from, and heavy
        tails it does not learn from those of a normal, so there are as many as the Bayesian information criterion asks
        for. It also chooses between full covariances, diagonal ones and, if all rows have the same weight, equal ones.

        Args:
            x, weights, seed: as in :meth:`initialize`.
            context_dim: the width of the context, on which the initialized mixture does not depend.

        Example:
            >>> pieces = torch.cat([torch.randn(1000, 2) - 6, torch.randn(1000, 2) + 6])
            >>> MixtureBase.for_rows(pieces).num_components
            2
        """
        x = torch.as_tensor(x)
        best = choose_mixture(x, weights, seed)
        full = best.covariance_type != "diag"
        base = cls(x.shape[1], num_components=best.n_components, full=full, context_dim=context_dim).to(x)
        return base._start_at(best)

    def initialize(self, x: Tensor | np.ndarray, weights: ArrayLike | None = None, *, seed: int = 0) -> "MixtureBase":
        """Starts at the mixture of normals of :class:`sklearn.mixture.GaussianMixture`, fitted to x.

        Args:
            x: rows in the coordinates of the base, ``(N, D)``, with N at least K.
            weights: the weight of each row; by default all count alike.
            seed: the seed of the fit.
        """
        kind = "diag" if self.lowers is None else "full"
        return self._start_at(fit_mixture(x, weights, self.num_components, kind, seed))

    def _start_at(self, mixture: GaussianMixture) -> "MixtureBase":
        covariances = torch.from_numpy(mixture.covariances_)
        trils = covariances.sqrt().diag_embed() if self.lowers is None else torch.linalg.cholesky(covariances)
        trils = trils.expand_as(self.start_trils)  # "tied" has one for all components
        return self.start_at(torch.from_numpy(mixture.weights_), torch.from_numpy(mixture.means_), trils)

    def rsample_each(self, num: int) -> tuple[Tensor, Tensor]:
        r"""Reparametrized draws of the components in turn, and their weights, with which a mean over the draws is one
        over the mixture: :math:`E_{p_0} g = \sum_k \pi_k E_k g`.

        Args:
            num: the number of draws.

        Returns:
            The draws, ``(num, D)``, and their weights, ``(num,)``, both with gradients.
        """
        mixture = self()
        pieces, probs = mixture.component_distribution, mixture.mixture_distribution.probs
        first = torch.randint(self.num_components, ())  # so that the mean is right even of fewer draws than components
        k = (torch.arange(num) + first) % self.num_components
        noise = torch.randn(num, *self.event_shape, dtype=pieces.loc.dtype, device=pieces.loc.device)
        draws = pieces.loc[k] + (pieces.scale_tril[k] @ noise.unsqueeze(-1)).squeeze(-1)
        return draws, self.num_components * probs[k]

    def forward(self, context: Tensor | None = None, *, temperature: float = 1.0) -> dist.Distribution:
        logits, locs, log_diagonals = self.logits, self.locs, self.log_diagonals
        if context is not None or self.context_dim:
            check_context(self, context)
            shifts = self.conditioner(context).split([logits.numel(), locs.numel(), locs.numel()], -1)
            logits = logits + shifts[0]
            locs, log_diagonals = (
                own + by.unflatten(-1, own.shape) for own, by in zip((locs, log_diagonals), shifts[1:])
            )
        # Autocast is for the products of networks.
        with torch.autocast(locs.device.type, enabled=False) if is_autocast(locs) else nullcontext():
            trils = self.start_trils * log_diagonals.exp().unsqueeze(-2)
            if self.lowers is not None:
                trils = trils + self.start_trils @ self.lowers.tril(-1)
            locs = self.start_locs + (self.start_trils @ locs.unsqueeze(-1)).squeeze(-1)
        pieces = dist.MultivariateNormal(locs, scale_tril=temperature * trils, validate_args=False)
        categories = dist.Categorical(logits=self.start_logits + logits, validate_args=False)
        return NormalMixture(categories, pieces, validate_args=False)

    # As in ActNorm, the flag is a Python value, since code that branches on a buffer would wait for the GPU.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._has_started())

    def set_extra_state(self, state: Tensor) -> None:
        self._started = bool(state)


class NormalMixture(dist.MixtureSameFamily):
    """A mixture of normals that has empty batches, too, where torch's own class fails."""

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return super().sample(sample_shape) if shape.numel() else self.component_distribution.loc.new_zeros(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if 0 in value.shape[:-1] or 0 in self.batch_shape:
            return value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))
        return super().log_prob(value)
