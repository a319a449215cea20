# SPDX-License-Identifier: Apache-2.0
"""What our guides share."""

import copy
import itertools
from collections.abc import Callable

import pyro
from torch import nn

from ..bijections.memo import forget_param_store


class GuideBase:
    """What our guides share: the model as it was given, parameters of their own in Pyro's store, copies and states."""

    is_warm = False
    """Whether it starts near the posterior, where the path derivative of the ELBO is the less noisy one."""

    draws_all_at_once = False
    """Whether ``get_transform()`` takes one draw of ``get_base_dist()`` to all latents."""

    def mark_trained(self) -> None:
        """Called by :func:`fit_guide` when it has finished."""

    def __init__(self, model: Callable, **options):
        super().__init__(model, **options)
        self._plain_model = (model,)  # not a submodule
        self._store_name = _new_name(self)

    @property
    def plain_model(self) -> Callable:
        """The model, as it was given."""
        if self._plain_model is None:
            raise RuntimeError("the guide was unpickled without its model: pass model=")
        return self._plain_model[0]

    def build(self, *args, **kwargs) -> "GuideBase":
        """Looks at the model and makes the parameters; returns itself. Takes what the model takes."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        try:
            self.make_parameters(args, kwargs)
        except BaseException:
            self.prototype_trace = None  # it is not built
            raise

    def make_parameters(self, args: tuple, kwargs: dict) -> None:
        """Makes the guide's submodules, with the prototype at hand."""
        raise NotImplementedError

    def own(self, name: str) -> nn.Module:
        """A submodule, registered with Pyro under a name of its own.

        Under the class's name Pyro would give a second guide the parameters of the first.
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
        # Pyro's own drops the model from the guide itself, and the model, often a closure, cannot be pickled.
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
