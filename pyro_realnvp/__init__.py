# SPDX-License-Identifier: Apache-2.0
"""RealNVP normalizing flows for Pyro."""

from . import masks
from .bases import Base, MixtureBase
from .bijections.bijection import Bijection, Conditioned, Inverse
from .bijections.checking import Report, check_bijection
from .bijections.compose import Compose
from .bijections.conditioners import MLP, ConvResNet
from .bijections.coupling import AdditiveCoupling, AffineCoupling, Coupling, VolumePreservingCoupling
from .bijections.elementwise import Logit, Standardize, Unbound
from .bijections.factor_out import FactorOut
from .bijections.linear import ConditionalAffine, InvertibleLinear, LowRankAffine, TriangularAffine
from .bijections.masks import Mask
from .bijections.normalization import ActNorm, BatchNorm
from .bijections.reshape import Permute, Squeeze
from .bijections.splines import Spline, SplineCoupling
from .classifier import RealNVPClassifier
from .distributions import Flow, FlowDistribution
from .estimator import RealNVPDensity
from .flows import real_nvp
from .images.dequantization import Dequantized, DequantizedFlow, bits_per_dim, interpolate
from .images.multi_scale import glow, image_real_nvp, latent_scales
from .inference.amortized import AmortizedRealNVP
from .inference.diagnosis import Diagnosis, diagnose
from .inference.guides import AutoRealNVP
from .inference.nuts import neutra
from .inference.posterior import PosteriorSamples
from .inference.sampling import sample_posterior
from .inference.variational import fit_guide
from .outliers import RealNVPOutlierDetector
from .saving import load, save
from .training.history import History
from .training.maximum_likelihood import fit

__version__ = "0.1.0"
