# SPDX-License-Identifier: Apache-2.0
"""The masks of couplings, and the functions that make them, such as ``masks.half(4)``, ``masks.checkerboard(3)``."""

from .bijections.masks import Mask, alternating, channelwise, checkerboard, half, random

__all__ = ["Mask", "alternating", "channelwise", "checkerboard", "half", "random"]
