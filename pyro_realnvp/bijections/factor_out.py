# SPDX-License-Identifier: Apache-2.0
"""The factoring out of entries: a part of the event becomes latent early, and a bijection transforms the rest."""

from torch import Tensor
from torch.distributions import constraints

from .bijection import Bijection
from .masks import Mask
from .shapes import broadcast_batch, of_entries


class FactorOut(Bijection):
    r""":math:`y_b = x_b,\quad y_{1-b} = f(x_{1-b}),\quad
    \log|\det \partial y / \partial x| = \log|\det \partial f / \partial x_{1-b}|` (Dinh et al. 2017, section 3.6,
    eqs. 13-14).

    The direction from data to latent is forward: the entries with b = 1 are factored out as latent values, and f
    transforms the entries that go on.

    Args:
        mask: the :class:`Mask`, of vectors or of images, that says which entries are factored out (b = 1) and which
            go on (b = 0).
        bijection: the bijection f, which maps events to events of the same shape.

    Shapes:
        Events that fit the mask to the same shape. The log-determinant, in nats, is shaped like the batch.

    Raises:
        TypeError: the mask is not a :class:`Mask`, or f is not a :class:`Bijection`.
        ValueError: f does not fit the entries that go on, or is not defined on all real numbers and onto them.

    Example:
        >>> import torch
        >>> from pyro_realnvp import masks, real_nvp
        >>> f = FactorOut(masks.half(4), real_nvp(2))
        >>> f(torch.ones(4))
        tensor([1., 1., 1., 1.], grad_fn=<...>)
    """

    def __init__(self, mask: Mask, bijection: Bijection):
        if not isinstance(mask, Mask) or not isinstance(bijection, Bijection):
            raise TypeError(
                f"expected a Mask and a Bijection; got {type(mask).__name__} and {type(bijection).__name__}"
            )
        super().__init__(mask.event_shape, context_dim=bijection.context_dim)
        if bijection.domain.event_dim != mask.event_dim or bijection.event_shape[0] not in (None, mask.num_changed):
            raise ValueError(
                f"expected a bijection of the {mask.num_changed} entries that go on, with {mask.event_dim} event axes; "
                f"got one of event shape {bijection.event_shape}: build it for these entries"
            )
        if any(of_entries(space) is not constraints.real for space in (bijection.domain, bijection.codomain)):
            raise ValueError(
                f"expected a bijection of real numbers; got one from {bijection.domain} to {bijection.codomain}: put "
                "such a map before or after the layers, or use CatTransform"
            )
        self.mask = mask
        self.bijection = bijection

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        leaving, x = self.mask.split(broadcast_batch(x, context, self.mask.event_dim))
        y, ladj = self.bijection.forward_and_ladj(x, context)
        return self.mask.join(leaving, y), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        leaving, y = self.mask.split(broadcast_batch(y, context, self.mask.event_dim))
        x, ladj = self.bijection.inverse_and_ladj(y, context)
        return self.mask.join(leaving, x), ladj

    def changed_entries(self, changed: Tensor, *, forward: bool = True) -> Tensor:
        leaving, rest = self.mask.split(changed)
        return self.mask.join(leaving, self.bijection.changed_entries(rest, forward=forward))

    def _kinds(self):
        return super()._kinds() + self.bijection._kinds()
