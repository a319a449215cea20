# SPDX-License-Identifier: Apache-2.0
"""Ready-made flows, from base to data."""

import operator
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from torch import nn
from torch.distributions import Transform

from .bijections import masks
from .bijections.compose import Compose
from .bijections.conditioners import MLP
from .bijections.coupling import AffineCoupling, Coupling
from .bijections.linear import ConditionalAffine
from .bijections.masks import Mask
from .bijections.splines import ConditionalSpline, identity_spline


def real_nvp(
    input_dim: int,
    *,
    num_couplings: int = 16,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    residual: bool = False,
    max_log_scale: float | None = None,
    coupling: type[Coupling] = AffineCoupling,
    mask_cycle: Sequence[Mask] | None = None,
    between: Callable[[int], Transform] | None = None,
) -> Compose:
    r"""A RealNVP flow, base to data: :math:`y = (f_n \circ \dots \circ f_1)(x)`, each :math:`f_i` an affine coupling
    (Dinh et al. 2017, eqs. 4-8). Identity at birth.

    Goes into :class:`~pyro.distributions.TransformedDistribution`, :class:`Flow` and, as it stands, into
    ``AutoNormalizingFlow(model, real_nvp)``.

    Args:
        input_dim: D, at least 2.
        num_couplings: how many couplings, at least 2.
        hidden_dims: widths of the hidden layers of each coupling's :class:`MLP`; by default two of 32 or, if that is
            more, 2 D. (Many narrow couplings fit better than few wide ones.)
        context_dim: width of the context for a conditional flow, 0 for none.
        activation: makes the activation of each MLP.
        residual: whether the hidden layers add their input.
        max_log_scale: the bound of each coupling's log-scale; by default the coupling's own.
        coupling: :class:`AffineCoupling`, :class:`AdditiveCoupling` (NICE), :class:`VolumePreservingCoupling` (GIN) or
            a :class:`Coupling` of your own.
        mask_cycle: the masks, in turn; by default halves and even/odd entries, each with its opposite.
        between: makes a transform of D entries that stands between the couplings, e.g. ``InvertibleLinear`` or
            ``lambda dim: ActNorm(dim).inv``.

    Raises:
        ValueError: ``input_dim < 2``, fewer than two couplings, masks of another length, or masks that leave an entry
            unchanged, an option that the coupling does not have.

    Example:
        >>> import torch
        >>> flow = real_nvp(3, num_couplings=4)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(flow(x), x)  # identity at birth
        True
    """
    input_dim = operator.index(input_dim)
    if input_dim < 2:
        raise ValueError(
            f"expected input_dim >= 2, since a coupling changes one entry given another; got {input_dim}: "
            "in one dimension use pyro.distributions.transforms.Spline(1), or model it jointly with another variable"
        )
    if num_couplings < 2:
        raise ValueError(f"expected num_couplings >= 2, so that every entry is changed; got {num_couplings}")
    if hidden_dims is None:
        hidden_dims = (max(32, 2 * input_dim),) * 2
    if mask_cycle is None:
        pairs = [masks.half] if input_dim < 4 else [masks.half, masks.alternating]
        mask_cycle = [make(input_dim, parity) for make in pairs for parity in (0, 1)]
    shapes = [mask.event_shape for mask in mask_cycle]
    if set(shapes) != {(input_dim,)}:
        raise ValueError(f"expected mask_cycle to hold masks of events of shape ({input_dim},); got {shapes}")
    options = coupling.check_options(max_log_scale=max_log_scale)
    parts: list[Transform] = []
    for mask in islice(cycle(mask_cycle), num_couplings):
        if between is not None and parts:
            parts.append(between(input_dim))
        conditioner = MLP(
            mask.num_kept,
            mask.num_changed * coupling.outputs_per_entry,
            hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
        )
        parts.append(coupling(Mask(mask.b), conditioner, context_dim=context_dim, **options))
    return Compose(parts)


def spline_flow(context_dim: int = 0, hidden_dims: Sequence[int] | None = None) -> Compose:
    """A flow of one entry, where there is nothing to couple: a monotonic spline, the identity at birth."""
    if not context_dim:
        return Compose([identity_spline()])
    spline = ConditionalSpline(context_dim, hidden_dims or (32, 32))
    return Compose([spline, ConditionalAffine(1, context_dim)])
