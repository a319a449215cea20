# SPDX-License-Identifier: Apache-2.0
"""The base class of the guides of this package."""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.params.param_store import param_with_module_name
from pyro.poutine import Trace
from torch import Tensor, nn

from ..bijections.memo import forget_param_store
from ..supports import plain
from .density import LogDensity
from .sites import is_enumerated


class GuideBase:
    """A mixin for Pyro's guides, with what the guides of this package share.

    A guide keeps its model as the caller passed it, has its own parameters in Pyro's store, and can be copied, pickled
    and loaded from a state. A subclass lists this class before the Pyro guide and implements :meth:`make_parameters`.

    Args:
        model: the Pyro model.
        options: passed on to the Pyro guide.
    """

    prototype_trace: Trace | None
    """The trace of the model that the guide was built from; None if it is not built."""

    is_warm = False
    """Whether the guide starts near the posterior, where the path derivative of the ELBO has the lower variance."""

    draws_all_at_once = False
    """Whether the submodule ``transform`` takes one draw of ``get_base_dist()`` to all latents, in the coordinates that
    :meth:`set_coordinates` gives a density."""

    def set_coordinates(self, density: LogDensity) -> None:
        """Gives the log-density of a model the coordinates in which this guide draws all latents at once."""

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Within it, the guide draws in the supports and the coordinates that the model has with these arguments."""
        return nullcontext()

    def mark_trained(self) -> None:
        """Is called by :func:`fit_guide` when the training ends. A subclass may override it."""

    def __init__(self, model: Callable, **options: Any):
        super().__init__(model, **options)
        self._plain_model = (model,)  # a tuple, so that a model that is a module does not become a submodule
        self._store_name = _new_name(self)
        self._given_to_store: dict[str, Tensor] = {}

    @property
    def plain_model(self) -> Callable:
        """The model as the caller passed it, without the handlers that some of Pyro's guides wrap around it."""
        if self._plain_model is None:
            raise RuntimeError(
                "the guide was unpickled and has lost its model: pass model= to fit_guide, diagnose or "
                "sample_posterior, or make it anew from the model, and load its state_dict"
            )
        return self._plain_model[0]

    def keep_model(self, model: Callable) -> None:
        """Takes over the model if the guide has lost its own, as after it was unpickled."""
        if self._plain_model is None:
            self._plain_model = (model,)

    def build(self, *args: Any, **kwargs: Any) -> "GuideBase":
        """Traces the model once, makes the guide's parameters and returns the guide.

        Args:
            args, kwargs: the model's arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any):
        with torch.no_grad():  # A support may depend on parameters, whose graph the prototype would keep.
            super()._setup_prototype(*args, **kwargs)
        try:
            self.make_parameters(args, kwargs)
        except BaseException:
            self.prototype_trace = None  # so that a guide without parameters does not count as built
            raise

    @staticmethod
    def _prototype_hide_fn(msg: dict[str, Any]) -> bool:
        """Hides from the prototype what is no latent. (Pyro's own keeps the sites that are summed over.)"""
        return AutoContinuous._prototype_hide_fn(msg) or is_enumerated(msg)

    def make_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the guide's parameters and submodules. The model's trace is in ``self.prototype_trace``.

        Args:
            args, kwargs: the positional and the keyword arguments of the model.
        """
        raise NotImplementedError

    def own(self, name: str) -> nn.Module:
        """A submodule of the guide, registered in Pyro's parameter store under the guide's own name.

        Under the name of the class, Pyro would give a second guide the parameters of the first. Where the store was
        loaded from a file, the guide takes over the values that it finds there under its own name.
        """
        self._check_built()
        module, prefix = self._modules[name], f"{self._store_name}.{name}"
        store = pyro.get_param_store()
        tensors = {
            param_with_module_name(prefix, name): p
            for name, p in module.named_parameters()
            if isinstance(p, nn.Parameter)  # torch.func.functional_call lends other tensors
        }
        stored, given = dict(store.named_parameters()), self._given_to_store
        # The store may have been loaded or set since, and then holds other tensors. So it does where a parameter of the
        # guide has been replaced, which then counts.
        others = {n: p for n, p in tensors.items() if (stored[n] is not p if n in stored else p.requires_grad)}
        if others:
            self._take_from_store({name: p for name, p in others.items() if given.get(name, p) is p})
        if self._pyro_context.active:
            for name, p in tensors.items():
                if p.requires_grad:  # pyro.module would do the same, and warn of each parameter that does not
                    self._give_to_store(name, p)
            if others:
                self._put_buffers_into_store()
        return module

    def _give_to_store(self, name: str, p: Tensor) -> None:
        store = pyro.get_param_store()
        if name in self._given_to_store and self._given_to_store[name] is not p and name in store:
            del store[name]
        if not p.is_contiguous():  # of which the store would keep a copy
            p.data = p.data.contiguous()
        pyro.param(name, p)
        self._given_to_store[name] = p

    @torch.no_grad()
    def _take_from_store(self, tensors: dict[str, Tensor]) -> None:
        """Copies into tensors of the guide, and into its buffers, what the store holds under their names."""
        store = pyro.get_param_store()
        stored = [name for name in tensors if name in store]
        if not stored:
            return
        for name in stored:
            _copy(name, store[name], tensors[name])
            del store[name]  # so that pyro.module puts the guide's own tensor there
        for name, buffer in self._stored_buffers().items():
            if name in store:
                _copy(name, store[name], buffer)

    @torch.no_grad()
    def _put_buffers_into_store(self) -> None:
        """Writes into the store what the guide has found out about the model and does not learn.

        No trace sees these entries, so no optimizer does. Pyro's files then hold the whole guide. (With
        ``module_local_params`` Pyro keeps nothing of a guide in the store, and a file of its state holds it.)
        """
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        for name, buffer in self._stored_buffers().items():
            value = buffer if buffer.is_floating_point() else buffer.to(torch.get_default_dtype())
            if name in store:
                del store[name]
            store.setdefault(name, value.clone())

    def _stored_buffers(self) -> dict[str, Tensor]:
        learned = {name for name, _ in self.named_parameters()}
        state = super().state_dict(keep_vars=True)
        return {param_with_module_name(self._store_name, k): v for k, v in state.items() if k not in learned}

    def _check_built(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("the guide is not built: call guide.build(*args) with the model's arguments")

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide is not built, so it has no parameters to load into: call guide.build(*args) first, "
                "with the model's arguments"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The model is left out of the state, since it is often a closure and cannot be pickled. Pyro's method would
        # delete it from the guide that is being pickled, too, so this method does not call Pyro's.
        forget_param_store(self.parameters())
        nodes = {} if self.prototype_trace is None else self.prototype_trace.nodes
        for site in nodes.values():
            if site["type"] == "sample":  # Pyro's Uniform keeps its bounds, which may be parameters of the model.
                forget_param_store(v for v in vars(plain(site["fn"])).values() if isinstance(v, Tensor))
        return vars(self) | dict.fromkeys(_UNPICKLED) | {"_given_to_store": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_store_name": _new_name(self)})

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuideBase":
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone.__dict__.update({name: self.__dict__[name] for name in _UNPICKLED if name in self.__dict__})
        clone.master = None
        return clone


_UNPICKLED = ("_model", "_plain_model", "master", "_init_flow_fn", "_arguments", "_unmasked")
_counts: dict[str, Iterator[int]] = defaultdict(itertools.count)


def _new_name(guide: GuideBase) -> str:
    """A name that follows from how many guides of its class were made before, so that a script finds it again."""
    kind = type(guide).__name__
    return f"{kind}_{next(_counts[kind])}"


def quantiles_of(draws: dict[str, Tensor], quantiles: Sequence[float]) -> dict[str, Tensor]:
    """Quantiles of the draws of each site, ``(len(quantiles),) + site shape``."""
    levels = torch.as_tensor(quantiles, dtype=torch.float64)
    return {name: values.quantile(levels.to(values), dim=0) for name, values in draws.items()}


def are_same(arguments: tuple[tuple, dict] | None, others: tuple[tuple, dict]) -> bool:
    """Whether two calls have the same objects as arguments."""
    if arguments is None or arguments[1].keys() != others[1].keys() or len(arguments[0]) != len(others[0]):
        return False
    pairs = [*zip(arguments[0], others[0]), *((arguments[1][name], value) for name, value in others[1].items())]
    return all(one is other for one, other in pairs)


def give_to_a_site(name: str, log_q: Tensor, ladjs: dict[str, Tensor]) -> None:
    """Counts the log-density of a draw of all latents at the first of their sites, and takes it away at a new site.

    The gradient of a draw without rsample needs log p - log q, in which Pyro's Trace_ELBO counts only sites that the
    model has, too.
    """
    first, ladj = next(iter(ladjs.items()))
    num_elements = math.prod(ladj.shape[log_q.dim() :])
    ladjs[first] = ladj - log_q.reshape(log_q.shape + (1,) * (ladj.dim() - log_q.dim())) / num_elements
    taken_away = dist.Delta(torch.zeros_like(log_q), log_density=-log_q)
    pyro.sample(name, taken_away, infer={"is_auxiliary": True})


def _copy(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise RuntimeError(
            f"Pyro's parameter store has {name!r} of the shape {tuple(value.shape)}, and the guide has "
            f"{tuple(target.shape)} there: make the guides in the same order, with the same options and model, as when "
            "the store was saved, or call pyro.clear_param_store()"
        )
    target.copy_(value)
