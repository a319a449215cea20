# SPDX-License-Identifier: Apache-2.0
"""Whether chains have converged, from the ranks of their draws (Vehtari et al. 2021)."""

import math

import torch
from pyro.ops import stats
from torch import Tensor

_FEWEST_GROUPS, _LARGEST_GROUP = 16, 16


def r_hat(draws: Tensor) -> Tensor:
    r"""Rank-normalised split :math:`\hat R` of each entry: the larger one of the values for its draws and for their
    distances from the median (Vehtari et al. 2021, section 4). It is 1 if all chains agree, and nan for constants.

    The halves of a short chain differ by chance, even if hundreds of such chains give good means. So from 32 chains on,
    they are compared in groups, as in the nested :math:`\hat R` (Margossian et al. 2024): in at least 16 groups of
    equally many chains, at most 16. Up to 1.01, each half of a group is then worth 50 independent draws or more.

    Args:
        draws: the draws by chain, ``(C, N) + shape``, with N at least 4.

    Returns:
        ``shape``.
    """
    halves = _halves(_group(draws)).transpose(1, 2)  # (groups, 2, chains of a group, N // 2, entries)
    halves = halves.flatten(2, 3).flatten(0, 1)
    median = halves.flatten(0, 1).median(0).values
    bulk, tails = (stats.gelman_rubin(_scores(values)) for values in (halves, (halves - median).abs()))
    return _unless_constant(draws, torch.maximum(bulk, tails))


def effective_sample_size(draws: Tensor) -> Tensor:
    """The number of independent draws that the draws of each entry are worth for its mean: that of the normal scores of
    their ranks (bulk-ESS; Vehtari et al. 2021, section 4), at most S log10 S of S draws as in Stan, nan for constants.

    Args:
        draws: the draws by chain, ``(C, N) + shape``, with N at least 4.

    Returns:
        ``shape``.
    """
    halves = _halves(draws.flatten(2).unsqueeze(1) if draws.dim() > 2 else draws[:, None, :, None]).flatten(0, 2)
    total = halves.shape[0] * halves.shape[1]
    # Chains that swing from one side to the other are worth more draws than they have. Noise may take it too far.
    time = (total / stats.effective_sample_size(_scores(halves))).clamp(min=1 / math.log10(total))
    return _unless_constant(draws, total / time)


def _group(draws: Tensor) -> Tensor:
    """The draws with one axis of entries, in groups of chains, ``(groups, chains, N, entries)``."""
    number = len(draws)
    sizes = [m for m in range(1, _LARGEST_GROUP + 1) if number % m == 0 and number >= m * _FEWEST_GROUPS]
    return draws.reshape(-1, max(sizes, default=1), draws.shape[1], draws[0, 0].numel())


def _halves(groups: Tensor) -> Tensor:
    """The first and the last half of each chain, ``(groups, chains, 2, N // 2, entries)``."""
    half = groups.shape[2] // 2
    return torch.stack([groups[:, :, :half], groups[:, :, -half:]], 2)


def _scores(values: Tensor) -> Tensor:
    """The normal scores of the ranks of all values of an entry, ``(chains, draws, entries)`` (the paper, eq. 14)."""
    flat = values.flatten(0, 1).T.contiguous()
    ordered = flat.sort().values
    # The rank of equal values is the mean of their ranks.
    ranks = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1).double() / 2
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[1] + 0.25))
    return scores.T.reshape(values.shape)


def _unless_constant(draws: Tensor, result: Tensor) -> Tensor:
    flat = draws.flatten(0, 1)
    return torch.where((flat == flat[0]).all(0), torch.nan, result.reshape(flat.shape[1:]))
