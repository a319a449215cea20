# SPDX-License-Identifier: Apache-2.0
"""RealNVP normalizing flows for Pyro."""

from . import masks
from .bijection import Bijection, Conditioned, Inverse
from .checks import Report, check_bijection
from .compose import Compose
from .conditioners import MLP
from .coupling import AdditiveCoupling, AffineCoupling, VolumePreservingCoupling
from .distributions import Base, Flow, FlowDistribution
from .elementwise import Standardize
from .flows import real_nvp
from .linear import InvertibleLinear
from .masks import Mask
from .normalization import ActNorm, BatchNorm
from .reshape import Permute
from .training import History, fit

__version__ = "0.1.0"
