# SPDX-License-Identifier: Apache-2.0
"""The normals at which a guide can start."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bijections.linear import LowRankAffine, TriangularAffine, triangular_root

LARGEST_FULL = 100
"""Dimensions up to which a normal has a full covariance; beyond, it has more entries than data usually tell."""


@dataclass
class FullNormal:
    """A normal with a lower triangular factor of its covariance."""

    loc: Tensor
    scale_tril: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        return self.loc + noise @ self.scale_tril.mT

    def log_det(self) -> Tensor:
        return self.scale_tril.diagonal().log().sum()

    def at(self, loc: Tensor) -> "FullNormal":
        return FullNormal(loc, self.scale_tril)

    def shrunk(self, factor: float) -> "FullNormal":
        return FullNormal(self.loc, factor * self.scale_tril)

    def diagonal(self) -> "FullNormal":
        """The best diagonal normal, which has the deviations of each coordinate given all others."""
        return FullNormal(self.loc, torch.linalg.inv(self.scale_tril).square().sum(0).rsqrt().diag())

    def bijection(self, full: bool) -> TriangularAffine:
        """The affine map from standard normal noise to the draws; a diagonal one unless `full`."""
        tril = self.scale_tril if full else self.diagonal().scale_tril
        return TriangularAffine(len(self.loc), full=full).to(tril).start_at(self.loc, tril)


@dataclass
class LowRankNormal:
    r"""A normal whose covariance has the factor :math:`\operatorname{diag}(s) (1 + V \operatorname{diag}(r - 1) V^T)`.

    The columns of V are orthonormal directions, and r are the deviations along them in units of s.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretches: Tensor

    @property
    def scale_tril(self) -> Tensor:
        """The lower triangular factor of the covariance."""
        return triangular_root((self.draw(torch.eye(len(self.loc)).to(self.loc)) - self.loc).mT)

    def draw(self, noise: Tensor) -> Tensor:
        along = noise @ self.directions
        return self.loc + self.scale * (noise + (along * (self.stretches - 1)) @ self.directions.mT)

    def log_det(self) -> Tensor:
        return self.scale.log().sum() + self.stretches.log().sum()

    def at(self, loc: Tensor) -> "LowRankNormal":
        return LowRankNormal(loc, self.scale, self.directions, self.stretches)

    def shrunk(self, factor: float) -> "LowRankNormal":
        return LowRankNormal(self.loc, factor * self.scale, self.directions, self.stretches)

    def diagonal(self) -> "LowRankNormal":
        """The normal without the directions: the deviations of each coordinate given all others."""
        return LowRankNormal(self.loc, self.scale, self.directions, torch.ones_like(self.stretches))

    def bijection(self, full: bool) -> LowRankAffine | TriangularAffine:
        """The affine map from standard normal noise to the draws; with a full matrix that is learned if `full`."""
        if full:
            return FullNormal(self.loc, self.scale_tril).bijection(full=True)
        affine = LowRankAffine(len(self.loc), rank=len(self.stretches)).to(self.loc)
        return affine.start_at(self.loc, self.scale, self.directions, self.stretches)


Normal = FullNormal | LowRankNormal


def isotropic(loc: Tensor, scale: float) -> Normal:
    """A normal with the same deviation in all directions."""
    dim = len(loc)
    if dim <= LARGEST_FULL:
        return FullNormal(loc, scale * torch.eye(dim).to(loc))
    return LowRankNormal(loc, scale * torch.ones_like(loc), loc.new_zeros(dim, 0), loc.new_zeros(0))
