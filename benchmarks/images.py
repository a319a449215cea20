# SPDX-License-Identifier: Apache-2.0
"""Images: time and memory of a training step beside the peers' multi-scale flows, checkpointing, bits/dim of digits."""

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from pyro_realnvp import (
    ActNorm,
    Bijection,
    Compose,
    Coupling,
    DequantizedFlow,
    Flow,
    Logit,
    bits_per_dim,
    fit,
    image_real_nvp,
    real_nvp,
)

from .image_peers import LevelsPeer, count, normflows_glow, our_glow, resident_peak, torchflows_nvp
from .tables import interleaved, print_table, ratio, verdict

SHAPE, BATCH = (3, 32, 32), 32
DIGITS, LEVELS, ALPHA = (1, 8, 8), 17, 0.05


def our_flow() -> Flow:
    return Flow(image_real_nvp(SHAPE, num_scales=2, hidden_channels=32, num_blocks=2))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "ours, image_real_nvp": our_flow,
    "ours, glow": lambda: Flow(our_glow(SHAPE, 2, 5, count(our_flow()))),
    "normflows, Glow": lambda: normflows_glow(SHAPE, 2, 5, count(our_flow())),
    "torchflows, MultiscaleRealNVP": lambda: torchflows_nvp(SHAPE, 2),
}


def training_step(model: nn.Module) -> Callable[[], None]:
    """A function that takes one Adam step on a fixed batch of real images."""
    x = torch.randn(BATCH, *SHAPE)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        loss = -(model() if isinstance(model, Flow) else model).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def print_peak(name: str, num_steps: int) -> None:
    """Builds a contender, takes ``num_steps`` steps and prints the peak of this process's resident memory in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = training_step(MAKERS[name]())
    for _ in range(num_steps):
        step()
    print(resident_peak())


def memory(name: str) -> str:
    """The MiB that three training steps add to the peak of building alone, each measured in a process of its own."""
    code = f"from {__name__} import print_peak; print_peak({name!r}, {{}})"
    calls = [[sys.executable, "-c", code.format(num_steps)] for num_steps in (0, 3)]
    built, stepped = (float(subprocess.run(c, check=True, stdout=subprocess.PIPE, text=True).stdout) for c in calls)
    return f"{stepped - built:.0f}"


def training_steps() -> None:
    torch.manual_seed(0)
    models = {name: make() for name, make in MAKERS.items()}
    steps = {name: training_step(model) for name, model in models.items()}
    times = interleaved(steps, rounds=20)
    ours, *_ = steps
    rows = []
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        value = ratio(times[ours], times[name])
        numbers = [count(models[name]), f"{counter.get_total_flops() / 1e9:.1f}", memory(name)]
        milliseconds = f"{statistics.median(times[name]):.1f}"
        target = None if name.startswith("ours") else 0.7
        rows.append([name, *numbers, milliseconds, f"{value:.2f}", *verdict(value, target)])
    header = ["", "parameters", "GFLOP", "MiB", "ms", "ours / it", "target", ""]
    print_table(f"a training step with Adam: images {SHAPE}, batch {BATCH}, 2 scales, 10 couplings", header, rows)


def held_for_backward(flow: Flow, x: Tensor) -> int:
    """The bytes that autograd keeps for the backward pass, without the parameters, the buffers and x."""
    known = {t.untyped_storage().data_ptr() for t in [x, *flow.parameters(), *flow.buffers()]}
    # The tensors are kept alive, since the address of a freed one could be used again and would be counted once.
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = flow().log_prob(x).mean()
    loss.backward()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)


def both_passes(flow: Flow, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        flow.zero_grad()
        flow().log_prob(x).mean().backward()

    return step


def checkpointing() -> None:
    """Three ways to keep what the backward pass needs: images, then 32 couplings of vectors and twice as many."""
    torch.manual_seed(0)
    images = {"num_scales": 2, "num_couplings": 10}
    compare_checkpoints(lambda on: image_real_nvp(SHAPE, **images, checkpoint=on), torch.randn(16, *SHAPE))
    for depth in (32, 64):

        def stack(on: bool | str, depth: int = depth) -> Compose:
            return Compose(real_nvp(64, num_couplings=depth, hidden_dims=(128, 128)).parts, checkpoint=on)

        compare_checkpoints(stack, torch.randn(1024, 64))


def compare_checkpoints(make: Callable[[bool | str], Bijection], x: Tensor) -> None:
    flows = {f"checkpoint={on!r}": Flow(make(on)) for on in (False, True, "inverse")}
    plain = next(iter(flows.values()))
    for name, p in plain.named_parameters():  # the last layers start at zero, and then all gradients before them are 0
        if "conditioner.last" in name:
            nn.init.normal_(p, std=0.03)
    for module in plain.modules():
        if isinstance(module, ActNorm):
            module.initialize(torch.randn(1000, *(n or 1 for n in module.event_shape)))
    for flow in flows.values():
        flow.load_state_dict(plain.state_dict())
    times = interleaved({name: both_passes(flow, x) for name, flow in flows.items()}, rounds=5)
    first = next(iter(flows))
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    sizes = {name: held_for_backward(flow, x) for name, flow in flows.items()}
    rows = []
    for (name, flow), target in zip(flows.items(), (None, 0.25, 0.25)):
        pairs = zip(plain.parameters(), flow.parameters())
        difference = max(float((p.grad - q.grad).abs().max()) for p, q in pairs) / largest
        share, slower = sizes[name] / sizes[first], ratio(times[name], times[first])
        milliseconds = f"{statistics.median(times[name]):.0f}"
        rows.append([name, f"{sizes[name] / 2**20:.1f}", f"{share:.3f}", *verdict(share, target), milliseconds])
        rows[-1] += [f"{slower:.2f}", f"{difference:.1e}"]
    header = ["", "MiB held", "/ without", "target", "", "ms", "/ without", "error of the gradients"]
    couplings = sum(isinstance(module, Coupling) for module in plain.modules())
    print_table(f"forward and backward of {couplings} couplings, batch {tuple(x.shape)}", header, rows)


def digits_flow() -> tuple[DequantizedFlow, dict]:
    """Our model of the digits, and the options of `fit`."""
    flow = Flow(Compose([image_real_nvp(DIGITS, hidden_channels=32), Logit(ALPHA).inv]))
    return DequantizedFlow(flow, levels=LEVELS), {"num_steps": 1000, "lr": 2e-3, "batch_size": 128}


def fitted_gaussian(x: Tensor) -> nn.Module:
    """A Gaussian with the mean and the full covariance of the training images, each dequantized 200 times."""
    peer = LevelsPeer(nn.Module(), LEVELS, ALPHA)
    scaled = (x + torch.rand(200, *x.shape)) / LEVELS
    y = peer.logit(scaled).double().flatten(2).flatten(0, 1)
    gaussian = MultivariateNormal(y.mean(0), y.T.cov())
    peer.flow.log_prob = lambda y: gaussian.log_prob(y.double().flatten(1))
    return peer


def fit_normflows(x: Tensor, held_out: Tensor, options: dict, lr: float, seconds: float, target: int):
    """normflows' Glow, trained by our `fit` with the same options, for as many steps as fit into the given seconds."""
    model = LevelsPeer(normflows_glow(DIGITS, 2, 5, target), LEVELS, ALPHA)
    batches = BatchSampler(RandomSampler(x), options["batch_size"], drop_last=True)
    # For a model that is not ours, `fit` rejects integer tensors, and float tensors with constant columns such as the
    # corners of the digits. It does not check batches from a loader for constant columns.
    batches = DataLoader(TensorDataset(x.float()), sampler=batches, batch_size=None)
    options = {**options, "lr": lr, "validation": held_out.float(), "progress": False}
    trial = fit(copy.deepcopy(model), batches, **{**options, "num_steps": 50})
    options["num_steps"] = int(50 * seconds / trial.seconds)
    return model, fit(model, batches, **options)


@torch.no_grad()
def score(model: nn.Module, x: Tensor) -> list[float]:
    """Bits/dim by the bound with one sample (the mean of 20 draws) and by the bound with 32 samples."""
    model.eval()
    one = torch.stack([model(num_samples=1).log_prob(x) for _ in range(20)])
    many = torch.cat([model(num_samples=32).log_prob(rows) for rows in x.split(120)])
    return [float(bits_per_dim(bound.mean(), DIGITS)) for bound in (one, many)]


def digits() -> None:
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().images).long()[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, held_out, train = images[order].split([360, 140, len(images) - 500])
    flow, options = digits_flow()
    history = fit(flow, train, validation=held_out, progress=False, **options)
    runs = [fit_normflows(train, held_out, options, lr, history.seconds, count(flow)) for lr in (2e-3, 5e-3)]
    peer, peer_history = min(runs, key=lambda run: run[1].best_loss)
    started = time.perf_counter()
    gaussian = fitted_gaussian(torch.cat([train, held_out]))
    seconds = time.perf_counter() - started
    contenders = {
        "Gaussian, full covariance": (gaussian, 64 + 64 * 65 // 2, seconds, "-"),
        "normflows, Glow": (peer, count(peer), peer_history.seconds, peer_history.best_step),
        "ours, image_real_nvp": (flow, count(flow), history.seconds, history.best_step),
    }
    rows, best = [], None
    for name, (model, parameters, seconds, step) in contenders.items():
        one, many = score(model, test)
        judged = verdict(one, round(best, 4)) if model is flow else ("", "")
        best = one if best is None else min(best, one)
        rows.append([name, f"{one:.4f}", *judged, f"{many:.4f}", parameters, f"{seconds:.0f}", step])
    header = ["", "bits/dim", "target", "", "32 samples", "parameters", "seconds", "best step"]
    print_table(f"digits of 8 x 8 pixels and {LEVELS} levels, {len(test)} test images", header, rows)


def main() -> None:
    training_steps()
    checkpointing()
    digits()
