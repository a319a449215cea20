# SPDX-License-Identifier: Apache-2.0
"""Booleans and indices that belong to the state of a module, and are no buffers."""

from collections.abc import Callable

from torch import Tensor, nn


class Constants(nn.Module):
    """A base class of modules that hold booleans or indices as plain attributes, which move with the module.

    Tools that average weights may average all buffers too (:class:`torch.optim.swa_utils.AveragedModel`), which fails
    for booleans, and rounds indices to others. So these tensors are no buffers. One of them, which a subclass names, is
    saved and loaded; the subclass derives the others from it.
    """

    constant: str
    """The name of the tensor that the ``state_dict`` holds."""

    def derive(self) -> None:
        """Derives from the constant what else the module holds. It runs again after a state was loaded."""

    def get_extra_state(self) -> Tensor:
        return getattr(self, self.constant)

    def set_extra_state(self, state: Tensor) -> None:
        own = self.get_extra_state()
        if (state.shape, state.dtype) != (own.shape, own.dtype):
            raise RuntimeError(
                f"{type(self).__name__} expected a state with {self.constant} of shape {tuple(own.shape)} and "
                f"{own.dtype}; got {tuple(state.shape)} and {state.dtype}: build the module as it was when it was saved"
            )
        own.copy_(state)
        self.derive()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constants":
        super()._apply(fn, recurse)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        vars(self).update((name, fn(value)) for name, value in tensors.items())
        return self
