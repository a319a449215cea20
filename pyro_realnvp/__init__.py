# SPDX-License-Identifier: Apache-2.0
"""RealNVP normalizing flows for Pyro."""

from . import masks
from .bijection import Bijection, Conditioned, Inverse
from .checks import Report, check_bijection
from .compose import Compose, FactorOut
from .conditioners import MLP, ConvResNet
from .coupling import AdditiveCoupling, AffineCoupling, VolumePreservingCoupling
from .dequantization import Dequantized, DequantizedFlow, bits_per_dim, interpolate
from .distributions import Base, Flow, FlowDistribution
from .elementwise import Logit, Standardize
from .flows import real_nvp
from .image_flows import glow, image_real_nvp, latent_scales
from .linear import InvertibleLinear
from .masks import Mask
from .normalization import ActNorm, BatchNorm
from .reshape import Permute, Squeeze
from .training import History, fit

__version__ = "0.1.0"
