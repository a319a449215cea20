# SPDX-License-Identifier: Apache-2.0
"""Bits/dim of the whole MNIST data set: ``python -m benchmarks.mnist --data FOLDER --out FOLDER [--model all]``.

The training loop in this file is the same for all contenders. A run saves its state every minute and continues from it
when it is started again; a finished run only prints its result. The file mnist.npz in the data folder holds x_train and
x_test, uint8 of shape (N, 28, 28).
"""

import argparse
import copy
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_realnvp import ActNorm, Compose, DequantizedFlow, Flow, Logit, bits_per_dim, image_real_nvp

from .image_peers import LevelsPeer, count, normflows_glow, our_glow, resident_peak, torchflows_nvp
from .tables import print_table

SHAPE, LEVELS, NUM_SCALES = (1, 28, 28), 256, 2
PUBLISHED = [["published: RealNVP", "1.06"], ["published: Glow", "1.05"]]  # Grathwohl et al. 2019, table 2
MODELS, COMPARED = ["ours", "glow", "normflows", "torchflows"], ["ours", "normflows", "torchflows"]
SAME_RUN = ["model", "alpha", "batch", "lr", "hidden", "blocks", "couplings", "actnorm"]
SECONDS_BETWEEN_SAVES = 60


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mnist", description=__doc__.splitlines()[0])
    data = os.environ.get("PYRO_REALNVP_DATA")
    parser.add_argument("--data", default=data, required=data is None, help="folder; also PYRO_REALNVP_DATA")
    parser.add_argument("--out", required=True, help="folder of the runs' states, one MODEL.pt each")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="ours", help=f"all: {', '.join(COMPARED)}")
    parser.add_argument("--minutes", type=float, help="of training, over all starts; 20 if there is no --steps")
    parser.add_argument("--steps", type=int, help="by default as many as the minutes allow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alpha", type=float, default=0.05, help="of Logit")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=32, help="channels of our networks; the peers' follow")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks of our networks")
    parser.add_argument("--couplings", type=int, default=3, help="of ours before and after each squeeze")
    parser.add_argument("--actnorm", type=int, choices=[0, 1], default=1, help="one before each of our couplings")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.minutes = 20.0
    return args


def build(args: argparse.Namespace) -> nn.Module:
    """The chosen model, a module whose call returns an object with a `log_prob` of integer levels."""
    sizes = {"num_couplings": args.couplings, "hidden_channels": args.hidden, "num_blocks": args.blocks}
    between = partial(ActNorm, event_dim=3) if args.actnorm else None
    ours = image_real_nvp(SHAPE, num_scales=NUM_SCALES, between=between, **sizes)
    per_scale = round((3 * args.couplings + 1) / NUM_SCALES)
    if args.model == "torchflows":
        return LevelsPeer(torchflows_nvp(SHAPE, NUM_SCALES), LEVELS, args.alpha)
    if args.model == "normflows":
        return LevelsPeer(normflows_glow(SHAPE, NUM_SCALES, per_scale, count(ours)), LEVELS, args.alpha)
    bijection = ours if args.model == "ours" else our_glow(SHAPE, NUM_SCALES, per_scale, count(ours))
    return DequantizedFlow(Flow(Compose([bijection, Logit(args.alpha).inv])), levels=LEVELS)


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, fused=True)


def batches(x: Tensor, size: int, step: int) -> Iterator[Tensor]:
    """The batches from the given step on. Their order depends only on the epoch, so a continued run sees the same."""
    per_epoch = len(x) // size
    while True:
        epoch, start = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).to(x.device)
        for rows in order.split(size)[start:per_epoch]:
            yield x[rows]
            step += 1


def learning_rate(lr: float, progress: float) -> float:
    """One cycle: the learning rate rises along a cosine in the first tenth of the run, then falls to zero."""
    height = progress / 0.1 if progress < 0.1 else (1 - progress) / 0.9
    return lr * (1 - math.cos(math.pi * min(max(height, 0.0), 1.0))) / 2


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, lr: float) -> float:
    """Takes a step and returns the bits/dim of the batch. If these or a gradient are not finite, it takes no step and
    returns nan."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    loss = bits_per_dim(model().log_prob(x), SHAPE).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
    bits, norm = torch.stack([loss.detach(), norm]).tolist()
    if not math.isfinite(bits + norm):
        return math.nan
    optimizer.step()
    return bits


def seconds_per_step(model: nn.Module, x: Tensor, args: argparse.Namespace) -> float:
    """The mean time of 20 steps. They train a copy of the model, so that the model itself stays unchanged."""
    trial = copy.deepcopy(model)
    optimizer, rows = adam(trial, args.lr), batches(x, args.batch, 0)
    for k in range(25):
        if k == 5:
            started = time.perf_counter()
        take_step(trial, optimizer, next(rows), 1e-6)
    return (time.perf_counter() - started) / 20


def save(path: Path, run: dict, modules: dict) -> None:
    """Saves the run atomically: a process that is stopped here leaves the previous state intact."""
    unfinished = path.with_suffix(".tmp")
    torch.save(run | {name: module.state_dict() for name, module in modules.items()}, unfinished)
    os.replace(unfinished, path)


def load(path: Path, args: argparse.Namespace) -> dict:
    """The saved run, or an empty dict if there is none."""
    if not path.exists():
        return {}
    run = torch.load(path, map_location=args.device, weights_only=True)
    given = {name: getattr(args, name) for name in SAME_RUN}
    if run["options"] != given or (args.steps is not None and args.steps != run["steps"]):
        sys.exit(f"{path} is of a run with {run['options']} and {run['steps']} steps: choose another --out")
    return run


def train(args: argparse.Namespace, x: Tensor, x_test: Tensor, path: Path) -> dict:
    """Trains the model, or continues its saved run, to the last step or the time limit, and returns the run."""
    run = load(path, args)
    limit = math.inf if args.minutes is None else 60 * args.minutes
    if run and (run["step"] >= run["steps"] or run["seconds"] >= limit) and run["result"]:
        return run
    torch.manual_seed(0)
    model = build(args).to(args.device)
    with torch.no_grad():  # ActNorm is initialized by the first batch; a saved state is loaded over it below
        model().log_prob(next(batches(x, args.batch, 0)))
    if not run:
        steps = args.steps or max(int(0.95 * limit / seconds_per_step(model, x, args)), 100)
        options = {name: getattr(args, name) for name in SAME_RUN}
        run = {"options": options, "step": 0, "steps": steps, "seconds": 0.0, "skipped": 0, "result": None}
    optimizer = adam(model, args.lr)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(0.02 * run["steps"], 1)))
    modules = {"model": model, "average": average, "optimizer": optimizer}
    for name, module in modules.items():
        if name in run:
            module.load_state_dict(run.pop(name))
    print(f"{args.model}: {count(model)} parameters, step {run['step']} of {run['steps']}, {args.device}", flush=True)
    rows, recent = batches(x, args.batch, run["step"]), []
    run["result"] = None
    last = saved = time.perf_counter()
    while run["step"] < run["steps"] and run["seconds"] < limit:
        # The schedule follows steps and time, whichever is further on, so that the learning rate also reaches zero if
        # the machine slows down and the time ends before the steps do.
        lr = learning_rate(args.lr, max(run["step"] / run["steps"], run["seconds"] / limit))
        recent.append(take_step(model, optimizer, next(rows), lr))
        average.update_parameters(model)
        run["skipped"] += math.isnan(recent[-1])
        run["step"] += 1
        now = time.perf_counter()
        run["seconds"] += now - last
        last = now
        if now - saved >= SECONDS_BETWEEN_SAVES:
            save(path, run, modules)
            bits = f"{np.nanmean(recent):.3f} bits/dim"
            print(f"step {run['step']} of {run['steps']}, {run['seconds']:.0f} s, {bits}, lr {lr:.1e}", flush=True)
            saved, recent = now, []
    save(path, run, modules)
    cuda = args.device.startswith("cuda")
    run["result"] = {
        "bits": test_bits(average.module, x_test),
        "parameters": count(model),
        "memory": torch.cuda.max_memory_allocated(args.device) / 2**20 if cuda else resident_peak(),
    }
    save(path, run, modules)
    return run


@torch.no_grad()
def test_bits(model: nn.Module, x: Tensor) -> float:
    """Bits/dim of the bound with one sample."""
    torch.manual_seed(0)
    model.eval()
    bits = [bits_per_dim(model().log_prob(rows), SHAPE).double() for rows in x.split(500)]
    return float(torch.cat(bits).mean())


def print_runs(runs: list[dict]) -> None:
    rows = []
    for run in runs:
        result, seconds = run["result"], run["seconds"]
        steps = f"{run['step']} of {run['steps']}"
        numbers = [result["parameters"], steps, f"{seconds / 60:.1f}", f"{seconds / run['step'] * 1e3:.1f}"]
        name = run["options"]["model"]
        rows.append([name, f"{result['bits']:.4f}", *numbers, f"{result['memory']:.0f}", run["skipped"]])
    header = ["", "bits/dim", "parameters", "steps", "minutes", "ms per step", "peak MiB", "steps skipped"]
    options = ", ".join(f"{name} {run['options'][name]}" for name in ("alpha", "batch", "lr"))
    rows += [[*row, "", "", "", "", "", ""] for row in PUBLISHED]
    print_table(f"MNIST, 10000 test images, uniform dequantization: {options}", header, rows)
    for run in runs:
        if run["step"] < run["steps"]:
            name = run["options"]["model"]
            print(f"{name}: the time was over before the steps; started again with more --minutes, it goes on")


def run_all(args: argparse.Namespace, out: Path) -> None:
    """Runs each model in a process of its own, so that its memory can be measured."""
    given, runs = vars(args), []
    for model in COMPARED:
        options = [f"--{name}={value}" for name, value in (given | {"model": model}).items() if value is not None]
        subprocess.run([sys.executable, "-m", __spec__.name, *options], check=True)
        runs.append(torch.load(out / f"{model}.pt", map_location="cpu"))
        if args.steps is None:  # only the first is limited by time; the others take as many steps as it took
            given = given | {"steps": runs[0]["step"], "minutes": None}
    print_runs(runs)


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.model == "all":
        return run_all(args, out)
    pyro.enable_validation(False)  # the peers check nothing either, and each check would wait for the GPU
    with np.load(Path(args.data) / "mnist.npz") as arrays:
        x, x_test = (torch.as_tensor(arrays[name])[:, None].to(args.device) for name in ("x_train", "x_test"))
    print_runs([train(args, x, x_test, out / f"{args.model}.pt")])


if __name__ == "__main__":
    main()
