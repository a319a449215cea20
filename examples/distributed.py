# SPDX-License-Identifier: Apache-2.0
"""
Many processes
==============

The same script runs in one process or in many: ``torchrun --nproc-per-node 4 examples/distributed.py``. Each process
gets its share of every batch, the gradients are averaged, and all processes end with the same weights. A run that was
killed continues from its checkpoint, bit for bit.
"""

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from torch import distributed

from pyro_realnvp import ActNorm, Flow, fit, plots, real_nvp

parser = argparse.ArgumentParser(description="Fit one flow with many processes (torchrun), from an array on the disk.")
parser.add_argument("--num-steps", type=int, default=1000)
parser.add_argument("--out", type=Path, help="folder for the pictures; by default they are shown")
parser.add_argument("--checkpoint", type=Path, help="file from which a killed run goes on")
args, _ = parser.parse_known_args()

# %%
# Processes
# ---------
# torchrun starts the script several times and tells each process its rank. The script only has to join the process
# group, as below; ``fit`` does the rest by itself. With GPUs the backend is ``"nccl"`` and each process takes one GPU.
many = "RANK" in os.environ
rank = int(os.environ.get("RANK", 0))
device = torch.device("cpu")
if many:
    on_gpus = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    if on_gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
pyro.set_rng_seed(rank)  # each process has its own noise; all start with the weights of the first

# %%
# Data that stay on the disk
# --------------------------
# The data are a spiral of 200,000 points in a file. The memory-mapped array is never read as a whole: each step reads
# the rows of its batch, and each process only its share of them.
folder = args.out or Path.cwd()
folder.mkdir(parents=True, exist_ok=True)
path = folder / "spiral.npy"
if rank == 0:
    random = np.random.default_rng(0)
    angle = 3 * np.pi * np.sqrt(random.uniform(0.05, 1, size=200_000))
    spiral = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) / 4
    np.save(path, (spiral + 0.1 * random.normal(size=spiral.shape)).astype(np.float32))
if many:
    distributed.barrier()
x = np.load(path, mmap_mode="r")

# %%
# Training
# --------
# All processes together share the batch of 1024, so the result does not depend on their number. The first process shows
# the progress bar and writes the checkpoints.
flow = Flow(real_nvp(2, between=lambda dim: ActNorm(dim).inv))
history = fit(
    flow,
    x,
    num_steps=args.num_steps,
    batch_size=1024,
    lr=1e-2,
    validation=0.02,
    seed=0,
    device=device,
    checkpoint=args.checkpoint,
)

# %%
# The result
# ----------
if rank == 0:
    processes = distributed.get_world_size() if many else 1
    print(f"{processes} process(es), {len(history.loss)} steps, {history.seconds:.1f} s")
    print(f"held-out negative log-likelihood: {history.best_loss:.3f} nats, at step {history.best_step}")
    fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    shown = torch.from_numpy(np.array(x[:5000]))
    plots.plot_density(flow.cpu(), shown, max_points=0, ax=axes[0])
    plots.plot_samples(flow, shown, axes=axes[1:3])
    plots.plot_loss(history, ax=axes[3])
    if args.out:
        fig.savefig(args.out / "distributed.png", dpi=120)
        print(f"picture in {args.out.resolve()}")
    else:
        plt.show()
    del x
    path.unlink()

if many:
    distributed.destroy_process_group()
