# SPDX-License-Identifier: Apache-2.0
"""The latent sites of a model, and how a point in unconstrained coordinates becomes their values."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints

from ..bijections.shapes import bounds, of_entries, sum_events
from ..supports import circle_of, plain, turned
from .relative import Relative
from .subsampling import draws_rows


class Site(NamedTuple):
    """The part of the vector of all latents that belongs to one latent site."""

    shape: torch.Size
    """The shape of the whole value in unconstrained coordinates."""
    mask: Tensor | None = None
    """Which elements of the batch are latents. None if all of them are."""
    entries: Tensor | None = None
    """The numbers of those entries of the flattened value that are latents. None if all of them are."""
    turn: Tensor | None = None
    """The part of a period by which each angle of the value is turned. None if no angle is."""

    @property
    def size(self) -> int:
        return self.shape.numel() if self.entries is None else len(self.entries)

    @property
    def layout(self) -> tuple:
        """What two sites share whose vectors mean the same."""
        return self.shape, None if self.entries is None else self.entries.tolist()

    def pack(self, value: Tensor) -> Tensor:
        """The vector of the latent entries of an unconstrained value."""
        flat = value.reshape(-1)
        return flat if self.entries is None else flat[self.entries.to(flat.device)]

    def unpack(self, vector: Tensor) -> Tensor:
        """Unconstrained values, ``(..., *shape)``, of vectors, ``(..., size)``. Entries that are no latents are 0."""
        if self.entries is not None:
            whole = vector.new_zeros(vector.shape[:-1] + (self.shape.numel(),))
            vector = whole.index_copy(-1, self.entries.to(vector.device), vector)
        return vector.reshape(vector.shape[:-1] + self.shape)

    def constrain(self, name: str, fn: Distribution, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        """The values in the support of `fn`, and log|det| of each element of the batch, which no turn changes."""
        transform = unconstraining(name, fn)
        value = transform(unconstrained)
        if value.dim() - transform.codomain.event_dim > unconstrained.dim() - transform.domain.event_dim:
            raise ValueError(
                f"the support of the latent site {name!r} depends on a discrete site that is summed over, so it has no "
                "coordinates of its own: draw it on one support, such as Uniform(0, 1), and rescale it in the model"
            )
        try:
            ladj = transform.log_abs_det_jacobian(unconstrained, value)
        except NotImplementedError:
            raise ValueError(
                f"the latent site {name!r} has the support {fn.support}, of which torch does not know the volume: draw "
                "its free entries, and compute this value from them"
            ) from None
        ladj = self.counted(sum_events(ladj, ladj.dim() - value.dim() + fn.event_dim))
        return value if self.turn is None else turned(fn, value, self.turn), ladj

    def unconstrain(self, name: str, fn: Distribution, value: Tensor) -> Tensor:
        """The unconstrained values that :meth:`constrain` takes to values in the support."""
        return unconstraining(name, fn).inv(value if self.turn is None else turned(fn, value, -self.turn))

    def counted(self, ladj: Tensor) -> Tensor:
        """log|det| of each element of the batch, and 0 for those that are no latents."""
        return ladj if self.mask is None else torch.where(self.mask.to(ladj.device), ladj, 0.0)


def is_enumerated(site: dict[str, Any]) -> bool:
    """Whether a discrete site is summed over, as `config_enumerate` asks for.

    Raises:
        ValueError: the site is to be estimated from draws of its own instead.
    """
    if site["infer"].get("enumerate") != "parallel":
        return False
    if site["infer"].get("num_samples") is not None:
        raise ValueError(
            f"the site {site['name']!r} asks for num_samples={site['infer']['num_samples']} draws of its own in place "
            "of a sum: leave out num_samples= of config_enumerate, so that discrete sites are summed over, and the "
            "guide draws the others"
        )
    return True


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site is drawn, and is neither observed, nor summed over, nor the rows of a plate."""
    is_drawn = site["type"] == "sample" and not site["is_observed"]
    return is_drawn and not site_is_subsample(site) and not is_enumerated(site)


def find_sites(nodes: Mapping[str, dict[str, Any]], influence: dict[str, Tensor] | None = None) -> dict[str, Site]:
    """The latent sites of a model, in the order in which it draws them.

    Args:
        nodes: the latent sites of a run of the model.
        influence: for each site, which entries of its value change the log-density. An entry that ``poutine.mask``
            takes out of the density (as ``obs_mask`` does with entries that are observed) and that has no influence
            elsewhere is no latent. None counts all entries.

    Raises:
        ValueError: a support that has no unconstrained coordinates; a discrete site that nobody sums over.
    """
    found = {}
    for name, site in nodes.items():
        value = site["value"].detach()
        entries = of_entries(site["fn"].support)
        if isinstance(entries, constraints.interval) and any(torch.as_tensor(b).isinf().any() for b in bounds(entries)):
            raise ValueError(
                f"the latent site {name!r} has the support {site['fn'].support} with an infinite end, for which torch "
                "has no coordinates: draw a site with another support, and compute this one from it"
            )
        found[name] = Site(unconstraining(name, site["fn"]).inv(value).shape)
        if influence is not None and batch_mask(site) is not None:
            found[name] = _masked(found[name].shape, mask_of_latents(site, influence[name]))
    # A value without free coordinates, such as a simplex of one entry, is a latent all the same.
    return {name: site for name, site in found.items() if site.size or (counts(nodes[name]) and not site.shape.numel())}


def batch_mask(site: dict[str, Any]) -> Tensor | None:
    """The mask of ``poutine.mask`` over the batch of a site, or None if it takes nothing out of the density."""
    mask = site["mask"]
    if mask is None or mask is True:
        return None
    mask = torch.as_tensor(mask, device=site["value"].device).expand(site["fn"].batch_shape)
    return None if mask.all() else mask


def counts(site: dict[str, Any]) -> bool:
    """Whether the density counts an entry of the site."""
    mask = batch_mask(site)
    return site["value"].numel() > 0 and (mask is None or bool(mask.any()))


def mask_of_latents(site: dict[str, Any], has_influence: Tensor) -> Tensor:
    """Which elements of the batch of a site are latents: those with a prior, or with entries that have influence."""
    mask = batch_mask(site)
    if mask is None:
        return torch.ones(site["fn"].batch_shape, dtype=torch.bool, device=site["value"].device)
    return mask | has_influence.reshape(mask.shape + (-1,)).any(-1)


def _masked(shape: torch.Size, is_latent: Tensor) -> Site:
    if is_latent.all():
        return Site(shape)
    entries = is_latent.reshape(is_latent.shape + (1,) * (len(shape) - is_latent.dim())).expand(shape)
    return Site(shape, is_latent, entries.reshape(-1).nonzero().squeeze(-1))


def unconstraining(name: str, fn: Distribution) -> Transform:
    """The transform from unconstrained coordinates to the support of a site."""
    support = circle_of(fn) or fn.support
    if getattr(support, "is_discrete", False):
        remedy = "decorate the model with pyro.infer.config_enumerate, so that the site is summed over"
        if not getattr(fn, "has_enumerate_support", False):
            kind = type(plain(fn)).__name__
            remedy = f"draw the site from a Categorical, since {kind} has no finite support, and {remedy}"
        raise ValueError(f"the latent site {name!r} is discrete, and a guide has continuous latents only: {remedy}")
    if of_entries(support) in (constraints.symmetric, constraints.positive_definite, constraints.positive_semidefinite):
        raise ValueError(
            f"the latent site {name!r} is a symmetric matrix, whose entries are no free coordinates: draw its Cholesky "
            "factor instead, such as a LKJCholesky site times a scale for each row"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"the latent site {name!r} has the support {support}, for which torch knows no unconstrained coordinates: "
            "draw a site with another support, and compute this one from it"
        ) from None


def with_fallback(init_loc_fn: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """Starts at zero, in unconstrained coordinates, where `init_loc_fn` has nothing to draw from."""

    def init(site: dict[str, Any]) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            return site["fn"].sample() if is_enumerated(site) else _constant(site["name"], site["fn"])

    return init


def _constant(name: str, fn: Distribution) -> Tensor:
    """The value at zero in unconstrained coordinates."""
    transform = unconstraining(name, fn)
    return transform(torch.zeros(transform.inverse_shape(fn.shape())))


class Rows(Messenger):
    """Gives each subsampled plate the rows that were drawn for it."""

    def __init__(self, rows: dict[str, Tensor]):
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.rows:
            msg["value"] = self.rows[msg["name"]]


class Place(Rows):
    """Puts one point into a run of a model.

    Each latent site gets its part of the point, constrained by the support and relative to the prior that the site has
    in this run. Both may depend on latents that the model draws before it.

    Args:
        point: a vector in unconstrained coordinates, or the value of each site.
        sites: the parts of the vector.
        rows: the rows of subsampled plates.
        relative: the sites whose coordinates are relative to their priors.
        is_strict: whether latent sites that the point does not have are an error.
    """

    def __init__(
        self,
        point: Tensor | dict[str, Tensor],
        sites: dict[str, Site],
        rows: dict[str, Tensor],
        relative: Mapping[str, Relative] = MappingProxyType({}),
        is_strict: bool = True,
    ):
        super().__init__(rows)
        self.sites = sites
        self.relative = relative
        self.is_strict = is_strict
        self.is_constrained: bool = not isinstance(point, Tensor)
        self.parts: dict[str, Tensor] = point if self.is_constrained else unpack(point, sites)
        self.values: dict[str, Tensor] = {}
        self.ladjs: dict[str, Tensor] = {}
        self.unconstrained: dict[str, Tensor] = {}
        self.relative_ladjs: dict[str, Tensor] = {}
        self.new: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_sample(msg)
        name = msg["name"]
        if self.rows and msg["value"] is None and draws_rows(msg):
            raise ValueError(
                f"the plate {name!r} draws a subsample, but was not there in the first run of the model: inside of a "
                "loop over a subsample, whose plates change with its rows, let all other plates show all of theirs"
            )
        if msg["value"] is not None or msg["is_observed"]:
            return
        if name in self.parts:
            value = self.parts[name]
            if not self.is_constrained:
                value = self._constrain(name, msg["fn"], value)
            msg["value"] = self.values[name] = value
        elif is_latent(msg):
            self._fill(msg)

    def _constrain(self, name: str, fn: Distribution, part: Tensor) -> Tensor:
        site = self.sites[name]
        unconstrained = site.unpack(part)
        if name in self.relative:
            unconstrained, ladj = self.relative[name].forward(fn, unconstrained)
            self.relative_ladjs[name] = site.counted(ladj)
        self.unconstrained[name] = unconstrained
        value, self.ladjs[name] = site.constrain(name, fn, unconstrained)
        return value

    def _fill(self, msg: dict[str, Any]) -> None:
        """Gives a constant to a site that the point does not have, and notes its name if the density counts it."""
        fn, mask = msg["fn"], msg["mask"]
        if not getattr(fn.support, "is_discrete", False):
            msg["value"] = _constant(msg["name"], fn)
        counts = mask is None or bool(torch.as_tensor(mask).any())
        if self.is_strict and counts and fn.shape().numel():
            self.new.append(msg["name"])

    def check(self) -> None:
        """Raises an error if the sites of this run are not those of the point."""
        gone = [name for name in self.parts if name not in self.values]
        if self.new or gone:
            raise ValueError(
                f"the model's latent sites have changed since the guide was made: {self.new} are new, {gone} are gone; "
                "a guide is made for a model whose sites do not change from call to call"
            )


def unpack(points: Tensor, sites: dict[str, Site]) -> dict[str, Tensor]:
    """The part of each site in vectors ``(..., D)``."""
    return dict(zip(sites, points.split([site.size for site in sites.values()], -1)))


def beside_plates(values: Tensor, batch_shape: torch.Size, event_dim: int) -> Tensor:
    """Values ``batch_shape + site shape`` as Pyro has them, where axes of the batch may be the axes of the plates."""
    shape = values.shape[len(batch_shape) :]
    return values.reshape(torch.broadcast_shapes(shape, batch_shape + (1,) * event_dim))
