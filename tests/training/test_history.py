# SPDX-License-Identifier: Apache-2.0
import pyro_realnvp as rn


def test_a_history_prints_as_one_line():
    history = rn.History([2.0] * 100, [50, 100], [1.5, 1.75], best_step=50, best_loss=1.5, seconds=3.0)
    assert str(history) == repr(history) == "History(100 steps in 3.0 s, finished; best loss 1.500 at step 50)"
    history.stopped, history.skipped_steps, history.restores = "diverged", 40, 3
    assert repr(history).endswith("step 50; 40 steps skipped, best weights restored 3 times)")
    assert repr(rn.History()) == "History(0 steps in 0.0 s, finished)"
