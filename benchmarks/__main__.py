# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks`` prints all tables; ``python -m benchmarks speed moons`` some of them."""

import importlib
import os
import sys
import time

import pyro
import torch

NAMES = ["birth", "evaluations", "speed", "training", "moons", "time_to", "tabular", "classes", "patches"]
NAMES += ["images", "guides", "sampling"]

names = sys.argv[1:] or NAMES
if not set(names) <= set(NAMES):
    sys.exit(f"expected names out of {', '.join(NAMES)}; got {' '.join(names)}")
# One thread: on cores that other processes use too, the times of multi-threaded matrix products vary tenfold.
torch.set_num_threads(1)
print(f"torch {torch.__version__}, Pyro {pyro.__version__}, 1 thread on {os.cpu_count()} cores", flush=True)
for name in names:
    started = time.perf_counter()
    importlib.import_module(f"{__package__}.{name}").main()
    print(f"({name}: {time.perf_counter() - started:.0f} s)", flush=True)
