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
    equally many chains, at most 16, whose first draws are neighbours. Groups then differ if chains remember where they
    were. Up to 1.01, each half of a group is worth 50 independent draws or more.

    Args:
        draws: the draws by chain, ``(C, N) + shape``, with N at least 4.

    Returns:
        ``shape``.
    """
    flat = draws.flatten(2) if draws.dim() > 2 else draws.unsqueeze(2)
    distances = (flat - flat.flatten(0, 1).median(0).values).abs()
    return _unless_constant(draws, torch.maximum(_r_hat_of_ranks(flat), _r_hat_of_ranks(distances)))


def effective_sample_size(draws: Tensor) -> Tensor:
    r"""The number of independent draws that the S draws of each entry are worth for its mean: :math:`S / \tau,\
    \tau = 1 + 2 \sum_t \rho_t`, with the autocorrelations :math:`\rho_t` of the normal scores of the ranks (bulk-ESS;
    Vehtari et al. 2021, section 4). As in Stan it is at most S log10 S. It is nan for constants.

    The autocorrelations are those about the mean of all chains, which count the differences between chains, too. About
    the mean of each chain, as in ArviZ, they are too small if chains are short: by 1 / N, at each lag.

    Args:
        draws: the draws by chain, ``(C, N) + shape``.

    Returns:
        ``shape``.
    """
    number, size = draws.shape[:2]
    scores = _scores(draws.reshape(number, size, -1))
    spectrum = torch.fft.rfft(scores, 2 * size, dim=1).abs().square().mean(0)  # padded, so that no chain is a circle
    covariance = torch.fft.irfft(spectrum, dim=0)[:size]
    # Geyer's sequence: the sums of two neighbours up to the first that is negative, none larger than the one before.
    pairs = (covariance / covariance[0])[: size // 2 * 2].unflatten(0, (-1, 2))
    sums = pairs.sum(1)
    is_kept = (sums >= 0).long().cumprod(0)
    following = torch.cat([pairs[:, 0], torch.zeros_like(pairs[:1, 0])]).gather(0, is_kept.sum(0, keepdim=True))[0]
    time = -1 + 2 * (is_kept * sums.cummin(0).values).sum(0) + following.clamp(min=0.0)
    # Chains that swing from one side to the other are worth more draws than they have, and noise may take it too far.
    total = number * size
    return _unless_constant(draws, total / time.clamp(min=1 / math.log10(total)))


def _r_hat_of_ranks(values: Tensor) -> Tensor:
    """Split R-hat of the normal scores of ``(C, N, entries)``, with groups of chains as chains."""
    number = len(values)
    sizes = [m for m in range(1, _LARGEST_GROUP + 1) if number % m == 0 and number >= m * _FEWEST_GROUPS]
    size = max(sizes, default=1)
    if size > 1:
        order = values[:, 0].argsort(0).unsqueeze(1)
        values = values[:, 1:].gather(0, order.expand_as(values[:, 1:]))  # the first draw has made the groups
    half = values.shape[1] // 2
    scores = _scores(torch.cat([values[:, :half], values[:, -half:]]))
    # The first halves of all groups, followed by their last halves.
    return stats.gelman_rubin(scores.unflatten(0, (-1, size)).flatten(1, 2))


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
