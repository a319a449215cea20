# SPDX-License-Identifier: Apache-2.0
import torch

from pyro_realnvp.training import snapshots


def test_the_average_is_torchs_own():
    """The average is updated once in several steps, with the decay that belongs to that number of steps."""
    for time_constant, every in ((1, 1), (5, 1), (20, 5), (200, 25), (1e5, 25)):
        average = snapshots.Average([torch.nn.Parameter(torch.zeros(2))], time_constant)
        assert isinstance(average.model, torch.optim.swa_utils.AveragedModel)
        assert average.every == every
    p = torch.nn.Parameter(torch.zeros(2))
    average = snapshots.Average([p], 20)
    average.update()
    with torch.no_grad():
        p.fill_(1.0)
    average.update()
    with average.in_place():
        torch.testing.assert_close(p.detach(), torch.full((2,), 5 / 20))
    assert p.tolist() == [1.0, 1.0]
