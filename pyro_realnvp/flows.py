# SPDX-License-Identifier: Apache-2.0
"""Ready-made bijections from base to data."""

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
from .bijections.splines import Spline


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
    r"""A RealNVP flow from base to data: :math:`y = (f_n \circ \dots \circ f_1)(x)`, where each :math:`f_i` is an
    affine coupling (Dinh et al. 2017, eqs. 4-8). A new flow is the identity.

    The result goes into a :class:`Flow` or a :class:`~pyro.distributions.TransformedDistribution`. The function itself
    can be passed to Pyro's guide, as in ``AutoNormalizingFlow(model, real_nvp)``.

    Args:
        input_dim: the number of entries D, at least 2.
        num_couplings: the number of couplings, at least 2.
        hidden_dims: the widths of the hidden layers of each coupling's :class:`MLP`; by default two layers of
            max(32, 2 D). (Many narrow couplings fit better than few wide ones.)
        context_dim: the width of the context of a conditional flow, 0 for none.
        activation: a function without arguments that makes the activation of each MLP.
        residual: whether each hidden layer after the first adds its input; their widths must then be equal.
        max_log_scale: the bound of each coupling's log-scale; by default the coupling's own.
        coupling: :class:`AffineCoupling`, :class:`AdditiveCoupling` (NICE), :class:`VolumePreservingCoupling` (GIN),
            :class:`SplineCoupling` (neural spline flow) or a :class:`Coupling` of your own.
        mask_cycle: the masks b, which the couplings use in turn; by default halves and even/odd entries, each followed
            by its opposite.
        between: a function of D that makes the transform between each two couplings, e.g. ``InvertibleLinear`` or
            ``lambda dim: ActNorm(dim).inv``.

    Raises:
        ValueError: ``input_dim`` or ``num_couplings`` is less than 2, the masks have another length or leave an entry
            unchanged, or the coupling does not have one of the options.

    Example:
        >>> import torch
        >>> flow = real_nvp(3, num_couplings=4)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(flow(x), x)  # a new flow is the identity
        True
    """
    input_dim = operator.index(input_dim)
    if input_dim < 2:
        raise ValueError(
            f"expected input_dim >= 2, since a coupling changes one entry given another; got {input_dim}: "
            "in one dimension use Compose([Spline(1)]), or model it jointly with another variable"
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
    """A flow of one entry, which has no other entry to be coupled with: a monotonic spline, at first the identity.

    With a context, an affine map that depends on the context, too, follows the spline.

    Args:
        context_dim: the width of the context, 0 for none.
        hidden_dims: the widths of the hidden layers that read the context.
    """
    spline = Spline(1, context_dim=context_dim, hidden_dims=hidden_dims or (32, 32))
    return Compose([spline, ConditionalAffine(1, context_dim)] if context_dim else [spline])
