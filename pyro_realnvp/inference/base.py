# SPDX-License-Identifier: Apache-2.0
"""The base class of the guides of this package."""

import copy
import itertools
from collections.abc import Callable

import pyro
from torch import nn

from ..bijections.memo import forget_param_store


class GuideBase:
    """A mixin for Pyro's guides, with what the guides of this package share.

    A guide keeps its model as the caller passed it, has its own parameters in Pyro's store, and can be copied, pickled
    and loaded from a state. A subclass lists this class before the Pyro guide and implements :meth:`make_parameters`.

    Args:
        model: the Pyro model.
        options: passed on to the Pyro guide.
    """

    is_warm = False
    """Whether the guide starts near the posterior, where the path derivative of the ELBO has the lower variance."""

    draws_all_at_once = False
    """Whether ``get_transform()`` maps one draw of ``get_base_dist()`` to all latents."""

    def mark_trained(self) -> None:
        """Is called by :func:`fit_guide` when the training ends. A subclass may override it."""

    def __init__(self, model: Callable, **options):
        super().__init__(model, **options)
        self._plain_model = (model,)  # a tuple, so that a model that is a module does not become a submodule
        self._store_name = _new_name(self)

    @property
    def plain_model(self) -> Callable:
        """The model as the caller passed it, without the handlers that some of Pyro's guides wrap around it."""
        if self._plain_model is None:
            raise RuntimeError("the guide was unpickled and has lost its model: pass model=")
        return self._plain_model[0]

    def build(self, *args, **kwargs) -> "GuideBase":
        """Traces the model once, makes the guide's parameters and returns the guide.

        Args:
            args, kwargs: the model's arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        try:
            self.make_parameters(args, kwargs)
        except BaseException:
            self.prototype_trace = None  # so that a guide without parameters does not count as built
            raise

    def make_parameters(self, args: tuple, kwargs: dict) -> None:
        """Makes the guide's parameters and submodules. The model's trace is in ``self.prototype_trace``.

        Args:
            args, kwargs: the positional and the keyword arguments of the model.
        """
        raise NotImplementedError

    def own(self, name: str) -> nn.Module:
        """A submodule of the guide, registered in Pyro's parameter store under the guide's own name.

        Under the name of the class, Pyro would give a second guide the parameters of the first.
        """
        self._check_built()
        module = self._modules[name]
        if self._pyro_context.active:
            pyro.module(f"{self._store_name}.{name}", module)
        return module

    def _check_built(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("the guide is not built: call guide.build(*args) with the model's arguments")

    def load_state_dict(self, state_dict, *args, **kwargs):
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide is not built, so it has no parameters to load into: call guide.build(*args) first, "
                "with the model's arguments"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self):
        # The model is left out of the state, since it is often a closure and cannot be pickled. Pyro's method would
        # delete it from the guide that is being pickled, too, so this method does not call Pyro's.
        forget_param_store(self)
        return vars(self) | dict.fromkeys(_UNPICKLED)

    def __setstate__(self, state):
        super().__setstate__(state | {"_store_name": _new_name(self)})

    def __deepcopy__(self, memo):
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone.__dict__.update({name: self.__dict__[name] for name in _UNPICKLED if name in self.__dict__})
        clone.master = None
        return clone


_UNPICKLED = ("_model", "_plain_model", "master", "_init_flow_fn")
_count = itertools.count()


def _new_name(guide: GuideBase) -> str:
    return f"{type(guide).__name__}_{next(_count)}"
