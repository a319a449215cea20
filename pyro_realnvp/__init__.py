# SPDX-License-Identifier: Apache-2.0
"""RealNVP normalizing flows for Pyro."""

from . import masks
from .amortised import AmortizedRealNVP
from .bijection import Bijection, Conditioned, Inverse
from .checkpoints import load, save
from .checks import Report, check_bijection
from .compose import Compose, FactorOut
from .conditioners import MLP, ConvResNet
from .coupling import AdditiveCoupling, AffineCoupling, VolumePreservingCoupling
from .dequantization import Dequantized, DequantizedFlow, bits_per_dim, interpolate
from .diagnosis import Diagnosis, diagnose
from .distributions import Base, Flow, FlowDistribution
from .elementwise import Logit, Standardize
from .estimator import RealNVPDensity
from .flows import real_nvp
from .guides import AutoRealNVP
from .history import History
from .image_flows import glow, image_real_nvp, latent_scales
from .linear import ConditionalAffine, InvertibleLinear, TriangularAffine
from .masks import Mask
from .neutra import PosteriorSamples, neutra
from .normalization import ActNorm, BatchNorm
from .reshape import Permute, Squeeze
from .support import Unbound
from .training import fit
from .variational import fit_guide

__version__ = "0.1.0"
