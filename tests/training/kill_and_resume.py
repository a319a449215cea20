# SPDX-License-Identifier: Apache-2.0
"""Kills a training 20 times with SIGKILL at random moments, resumes it each time, and compares the result with that of
an uninterrupted training.

It prints the number of kills, the number of different steps at which they happened, and whether the results are equal.
"""

import os
import random
import signal
import sys
import time

import helpers
import torch
import torch._dynamo  # so that no child spends its time on importing it

from pyro_realnvp import saving


def train(path):
    history = helpers.train(path, num_steps=2000, validate_every=100)[1]
    return history.loss, history.best_loss


def wait_for_some_checkpoints(path):
    seen, number, deadline = set(), random.randint(1, 8), time.monotonic() + 20
    while len(seen) < number and time.monotonic() < deadline:
        seen.add(os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.02))


if __name__ == "__main__":
    path = sys.argv[1]
    torch.set_num_threads(1)
    steps, kills = set(), 0
    while kills < 20:  # each child is a fork, so it need not import anything again
        child = os.fork()
        if not child:
            train(path)
            os._exit(0)
        wait_for_some_checkpoints(path)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        found = saving.read(path, "the state of a training") if os.path.exists(path) else None
        steps.add(len(found["parts"]["training"]["history"]["loss"]) if found else 0)
    resumed = train(path)
    os.remove(path)
    print(kills, len(steps), resumed == train(path))
