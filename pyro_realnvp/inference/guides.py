# SPDX-License-Identifier: Apache-2.0
"""A flow as the guide of a whole model."""

import math
import warnings
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from ..bijections.bijection import Bijection
from ..bijections.compose import Compose
from ..bijections.linear import TriangularAffine
from ..distributions import FlowDistribution
from ..flows import real_nvp, spline_flow
from .base import GuideBase
from .traces import by_site, constrain, run_at
from .warm_start import Normal, best_normal

_LARGEST_FULL = 100  # beyond it a matrix has more entries than data usually tell


class AutoRealNVP(GuideBase, AutoContinuous):
    r"""A RealNVP guide over all latent variables of a model: :math:`z = \mu + L\,(m + T f(\epsilon)),\
    \epsilon \sim N(0, 1)`, in unconstrained coordinates.

    :math:`\mu` and L are the best normal approximation on the way of Newton's method to a mode, found before the first
    step (a warm start, as by Pathfinder; Zhang et al. 2022); m and the triangular T are learned with the flow f
    (:func:`real_nvp`), which starts as the identity. So posteriors whose coordinates have scales 1000 apart and
    correlations of 0.999 work as they come, and the flow learns what is left. A single latent dimension, which has
    nothing to be coupled with, gets a spline.

    Train it with :func:`fit_guide` or Pyro's ``SVI``. It is built by the first call, or by :meth:`build`, which
    is needed before ``load_state_dict``.

    Args:
        model: a Pyro model with continuous latent variables, of constant structure.
        num_couplings: couplings of the flow.
        hidden_dims: widths of the hidden layers of each coupling; by default as in :func:`real_nvp`.
        init_loc_fn: where to start, for each site; see Pyro's ``autoguide.initialization``. Flat priors, which have
            nothing to draw from, start at zero in unconstrained coordinates.
        init_scale: the standard deviation of the guide where there is no warm start.
        full: whether L and T are triangular matrices, or diagonal. By default up to 100 dimensions.
        warm_start: whether to search for the normal approximation. By default up to 100 dimensions.
        init_flow_fn: makes another bijection of so many dimensions in place of the RealNVP.

    Raises:
        ValueError: a log-density at the start that is not finite; latents under a subsampled plate (which need
            :class:`AmortizedRealNVP`); a state loaded into a guide that is not built.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_realnvp import fit_guide
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoRealNVP(model)
        >>> history = fit_guide(guide, torch.randn(50), num_steps=20, progress=False)
        >>> guide.median()["scale"].shape
        torch.Size([])
    """

    draws_all_at_once = True

    def __init__(
        self,
        model: Callable,
        *,
        num_couplings: int = 8,
        hidden_dims: Sequence[int] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        full: bool | None = None,
        warm_start: bool | None = None,
        init_flow_fn: Callable[[int], Bijection] | None = None,
    ):
        super().__init__(model, init_loc_fn=_with_fallback(init_loc_fn))
        if not init_scale > 0:
            raise ValueError(f"expected init_scale > 0; got {init_scale}")
        self.init_scale, self.full, self.warm_start = init_scale, full, warm_start
        self._options = {"num_couplings": num_couplings, "hidden_dims": hidden_dims}
        self._init_flow_fn = init_flow_fn

    def build(self, *args, **kwargs) -> "AutoRealNVP":
        """Looks at the model and makes the parameters; returns itself. Takes what the model takes."""
        is_new = self.prototype_trace is None
        super().build(*args, **kwargs)
        if is_new and self.master is None:
            self._create_plates(*args, **kwargs)  # which NeuTra wants
        return self

    def mark_trained(self) -> None:
        self.fitted.fill_(True)

    @property
    def is_trained(self) -> bool:
        """Whether :func:`fit_guide` was run, or another optimizer has moved it."""
        if self.prototype_trace is None:
            return False
        return bool(self._buffers["fitted"]) or any(p.any() for p in self._modules["transform"].parts[-1].parameters())

    def make_parameters(self, args: tuple, kwargs: dict) -> None:
        for name, frames in self._cond_indep_stacks.items():
            for frame in frames:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"latent site {name!r} lies under the plate {frame.name!r}, of which {frame.size} of "
                        f"{frame.full_size} rows are drawn: its values would be shared between rows. Use "
                        "AmortizedRealNVP for it, or make the plate without subsampling"
                    )
        start = self._init_loc()
        dim = self.latent_dim
        full = dim <= _LARGEST_FULL if self.full is None else self.full
        normal = Normal(start, self.init_scale * torch.eye(dim, dtype=start.dtype, device=start.device))
        self._check_start(start, args, kwargs)
        self.is_warm = False
        if dim <= _LARGEST_FULL if self.warm_start is None else self.warm_start:
            normal = self._find_start(normal, args, kwargs)
        affine = TriangularAffine(dim, full=full).to(start)
        if not full:  # the best diagonal normal has the deviations of each coordinate given all others
            deviations = torch.linalg.inv(normal.scale_tril).square().sum(0).rsqrt()
            normal = Normal(normal.loc, deviations.diag())
        if self._init_flow_fn:
            flow = self._init_flow_fn(dim)
        else:
            flow = real_nvp(dim, **self._options) if dim > 1 else spline_flow()
        self.register_buffer("fitted", torch.tensor(False))
        self.transform = Compose([flow.to(start), affine.start_at(*normal)])

    def _find_start(self, start: Normal, args: tuple, kwargs: dict) -> Normal:
        """The best normal, in double precision where the model can be evaluated in it."""
        for dtype in dict.fromkeys((torch.float64, start.loc.dtype)):
            try:
                with pyro.validation_enabled(False), torch.random.fork_rng():
                    found = best_normal(
                        lambda z: self._log_density(z, args, kwargs), Normal(*(t.to(dtype) for t in start))
                    )
                self.is_warm = True
                return found
            except (RuntimeError, TypeError, NotImplementedError) as error:  # mixed types, or no second derivative
                problem = error
        warnings.warn(
            f"no warm start, since the model's log-density could not be differentiated twice ({problem}): "
            f"the guide starts at init_loc_fn with init_scale={self.init_scale}",
            RuntimeWarning,
            stacklevel=2,
        )
        return start

    def _log_density(self, z: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """log p(z, data) of one point in unconstrained coordinates, with the same random numbers at each call."""
        values, ladj = constrain(self, z)
        torch.manual_seed(0)  # of subsamples
        with poutine.block():
            return run_at(self.plain_model, values, args, kwargs).log_prob_sum() + ladj

    @torch.no_grad()
    def _check_start(self, start: Tensor, args: tuple, kwargs: dict) -> None:
        values, _ = constrain(self, start)
        with poutine.block(), pyro.validation_enabled(False), torch.random.fork_rng():
            trace = run_at(self.plain_model, values, args, kwargs)
        trace.compute_log_prob()
        bad = {
            name: site["log_prob_sum"].item()
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not math.isfinite(site["log_prob_sum"])
        }
        if bad:
            raise ValueError(
                f"the log-density at the start is not finite at the sites {bad}: pass init_loc_fn=, e.g. "
                "pyro.infer.autoguide.init_to_value(values={...}) with values at which it is, or check the data"
            )

    # -- what AutoContinuous asks for --------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.Distribution:
        """A standard normal, ``(latent_dim,)``."""
        self._check_built()
        like = self._modules["transform"].parts[-1].start_loc
        return dist.Normal(torch.zeros_like(like), torch.ones_like(like), validate_args=False).to_event(1)

    def get_transform(self, *args, **kwargs) -> Bijection:
        """From the base to unconstrained coordinates."""
        return self.own("transform")

    def get_posterior(self, *args, **kwargs) -> FlowDistribution:
        """The guide's distribution of all latents, in unconstrained coordinates."""
        return FlowDistribution(self.get_base_dist(), [self.own("transform")])

    @torch.no_grad()
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of each site from the guide, ``(num_samples,) + site shape``."""
        return by_site(self, self.get_posterior().sample((num_samples,)))

    def median(self, *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """The posterior median of each latent, from samples."""
        return {name: values[0] for name, values in self.quantiles([0.5], num_samples=num_samples).items()}

    def quantiles(self, quantiles: Sequence[float], *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, from samples: ``(len(quantiles),) + site shape``."""
        levels = torch.as_tensor(quantiles, dtype=torch.float64)
        return {name: values.quantile(levels.to(values), dim=0) for name, values in self.sample(num_samples).items()}


def _with_fallback(init_loc_fn: Callable) -> Callable:
    """Zero, in unconstrained coordinates, where there is nothing to draw from."""

    def init(site):
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            fn = site["fn"]
            transform = biject_to(fn.support)
            return transform(torch.zeros(transform.inverse_shape(fn.shape())))

    return init
