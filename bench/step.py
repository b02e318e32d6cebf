"""A step of training, ours against the same step as facebookresearch/dino performs it (dino_step.py), in one run.

    python bench/step.py [--model vit_small_patch16] [--batch 8] [--rounds 5] [--threads 1] [--device auto]
                         [--precision fp32] [--only dino plain] [--json FILE]
    torchrun --nproc-per-node 2 bench/step.py ...        # several ranks, --batch images each

Given views are on the device already: no images are decoded or colored. The steps take turns within each round, and a
ratio is the median over the rounds of dino's time by ours, beside the smallest and the largest. A step ends when its
loss has reached the host. The share of the peak is that of the matrix products that the step needs, counted without
GAug, whose additions are no products, by what one large product reaches in the same run. Peak memory: on a GPU of the
tensors of a step and its own state; on a CPU of a process that does nothing else (`--no-memory` leaves it out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dino_step import dino_step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nearfar.ssl import config
from nearfar.ssl.learning.compiled import compile_backbone, compiler_missing
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.learner import share_batch_norm
from nearfar.ssl.learning.optim import optimizer_of
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.parallel import device, distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.training.set_up import prepare_learner

VALUES = {"lr": 1e-6, "weight_decay": 0.04, "teacher_momentum": 0.996, "teacher_temp": 0.04}
IDEAS = {"LGP": ("lgp",), "LGP + GAug + PRR": ("lgp", "gaug", "prr")}
COMPILED = ", compiled"  # after a name: its blocks by torch.compile
MUON = ", Muon"  # after a name: its matrices by Muon in place of AdamW
NAMES = ["dino", "plain", *IDEAS, "Vim"]


class StepOptions(NamedTuple):
    model: str
    batch: int  # of a rank
    crops: tuple[int, int]  # sides
    local_crops: int
    prototypes: int
    device: str
    precision: str
    threads: int


class Measurement(NamedTuple):
    name: str
    seconds: list[float]  # of a step, round by round
    gflop: float  # of the products in a step of a rank
    peak_memory: float  # bytes; nan where it was not measured


def views_of(options: StepOptions, target: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, options.crops[0]), (options.local_crops, options.crops[1]))
    return [torch.randn((v, options.batch, 3, s, s), generator=generator).to(target) for v, s in sizes if v]


def settings_of(name: str, options: StepOptions) -> list[str]:
    muon, name = name.endswith(MUON), name.removesuffix(COMPILED).removesuffix(MUON)
    model = options.model.replace("vit_", "vim_") if name == "Vim" else options.model
    return [
        f"backbone.name={model}", f"head.prototypes={options.prototypes}", "head.batch_norm=false",
        f"views.global_crops_size={options.crops[0]}", f"views.local_crops_size={options.crops[1]}",
        f"views.local_crops_number={options.local_crops}", f"train.batch_size={options.batch * distributed.count()}",
        *(f"backbone.{idea}=true" for idea in IDEAS.get(name, ())), *(["optim.name=muon"] if muon else []),
    ]  # fmt: skip


def step_of(name: str, options: StepOptions, compute: Compute) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    views = views_of(options, compute.device)
    if name == "dino":
        torch.manual_seed(0)
        step, _ = dino_step(f"{options.model}_224", options.prototypes, compute.device, compute.autocast, compute.fp16)
        flat = [view for group in views for view in group]
        return lambda: step(flat)
    stepper = stepper_of(name, options, compute)
    return lambda: stepper(views, VALUES, votes=lambda: (0.0, 0.0)).report.read().loss


def stepper_of(name: str, options: StepOptions, compute: Compute) -> Stepper:
    """Ours, by the name it has in the table."""
    run = resolve(config.load(None, settings_of(name, options)), 100_000, world_size=distributed.count())[0]
    learner = build_dino_learner(run)
    prepare_learner(learner, compute, recompute=False)
    if distributed.count() > 1:
        share_batch_norm(learner)
    if name.endswith(COMPILED):
        if why := compiler_missing(compute.device):
            raise SystemExit(f"{name}: {why}.")
        torch._dynamo.config.recompile_limit = 64  # a run has one network, and here are several in a process
        for backbone in (learner.student.backbone, learner.teacher.backbone):
            compile_backbone(backbone, compute.device)
    return Stepper(learner, optimizer_of(run.optim, learner.student), 3.0, compute.autocast)


def choose_compute(options: StepOptions) -> Compute:
    torch.set_num_threads(options.threads)
    compute = device.choose(options.device, options.precision, 10**6)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    return compute


def products(name: str, options: StepOptions) -> float:
    """GFLOP of the matrix products and convolutions in a step, counted on a CPU in float32 by attention written out."""
    compute = Compute(torch.device("cpu"), nullcontext, "float32")
    one = options._replace(batch=2, prototypes=64)
    counted = []
    name = name.removesuffix(COMPILED).removesuffix(MUON)
    plain = "LGP" if name in IDEAS else name
    for each in (one, one._replace(prototypes=128), one._replace(batch=4)):
        step = step_of(plain, each, compute)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        counted.append(counter.get_total_flops() / 1e9)
    once, wider, twice = counted
    image, prototype = (twice - once) / 2, (wider - once) / 64 / 2  # of an image; of a prototype and an image
    return options.batch * (image + prototype * (options.prototypes - 64)) + once - 2 * image


def peak_flops(compute: Compute, n: int) -> float:
    """FLOP/s of one product of n x n matrices in the precision of the step, the best of several."""
    dtype = torch.bfloat16 if compute.bf16 else torch.float16 if compute.fp16 else torch.float32
    a, b = (torch.randn(n, n, device=compute.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def peak_alone(name: str, options: StepOptions, queue: Any) -> None:
    """Peak resident memory of a process that takes two steps and nothing else."""
    step = step_of(name, options, choose_compute(options))
    for _ in range(2):
        step()
    queue.put(resident())


def resident() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # On Linux getrusage's number is inherited from the process that started this one.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak_memory(name: str, options: StepOptions) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_alone, args=(name, options, queue))
    process.start()
    found = float(queue.get(timeout=3600))
    process.join()
    return found


def measure(
    names: list[str], options: StepOptions, compute: Compute, rounds: int, steps: int, memory: bool
) -> list[Measurement]:
    """Steps that take turns: `steps` of each a round, after two that do not count."""
    cuda = compute.device.type == "cuda"
    taking: dict[str, Callable[[], float]] = {}
    peaks = dict.fromkeys(names, float("nan"))
    for name in names:
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taking[name] = step_of(name, options, compute)
        for _ in range(2):
            taking[name]()
        if cuda:
            peaks[name] = torch.cuda.max_memory_allocated() - before
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in taking.items():
            begun = time.perf_counter()
            for _ in range(steps):
                step()
            seconds[name].append((time.perf_counter() - begun) / steps)
    taking.clear()
    if memory and not cuda and distributed.count() == 1:
        peaks = {name: peak_memory(name, options) for name in names}
    return [Measurement(name, seconds[name], products(name, options), peaks[name]) for name in names]


def rows(found: list[Measurement], batch: int, peak: float) -> list[dict[str, Any]]:
    """What is reported of each step; ratios against the first, round by round. `batch`: of all ranks."""
    table = []
    for each in found:
        took = statistics.median(each.seconds)
        ratios = [theirs / ours for theirs, ours in zip(found[0].seconds, each.seconds, strict=True)]
        table.append(
            {
                "step": each.name,
                "seconds": took,
                "img_per_s": batch / took,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "share_of_peak": each.gflop * 1e9 / took / peak,
                "gflop": each.gflop,
                "peak_memory_bytes": None if each.peak_memory != each.peak_memory else each.peak_memory,
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "| step | ms | img/s | times the first | least .. most | share of peak | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in table:
        memory = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['step']} | {1e3 * row['seconds']:.1f} | {row['img_per_s']:.1f} | {row['ratio']:.2f} "
            f"| {row['ratio_least']:.2f} .. {row['ratio_most']:.2f} | {100 * row['share_of_peak']:.0f} % | {memory} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--batch", type=int, default=8, help="images of a step on each rank")
    parser.add_argument("--crops", type=int, nargs=2, default=(224, 96), help="sides of global and local views")
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of each variant in a round (default: 1 on a CPU, 10 on a GPU)"
    )
    parser.add_argument(
        "--only", nargs="+", default=NAMES, metavar="NAME",
        choices=[*NAMES, *(name + after for name in NAMES[1:] for after in (COMPILED, MUON))],
        help=f"of {', '.join(NAMES)}; after all but the first may stand '{COMPILED}' or '{MUON}'. Ratios: to the first",
    )  # fmt: skip
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    options = StepOptions(
        given.model, given.batch, tuple(given.crops), given.local_crops, given.prototypes, given.device,
        given.precision, given.threads,
    )  # fmt: skip
    ranks = distributed.from_environment()
    with distributed.joined(ranks):
        compute = choose_compute(options)
        peak = peak_flops(compute, 8192 if compute.device.type == "cuda" else 2048)
        steps = given.steps or (10 if compute.device.type == "cuda" else 1)
        measured = measure(given.only, options, compute, given.rounds, steps, not given.no_memory)
        if not ranks.first:
            return
        table = [row | {"precision": compute.precision} for row in rows(measured, options.batch * ranks.size, peak)]
        name = torch.cuda.get_device_name() if compute.device.type == "cuda" else f"CPU, {options.threads} thread(s)"
        about = (
            f"{options.model}, {options.batch} images a rank, {ranks.size} rank(s), 2x{options.crops[0]} + "
            f"{options.local_crops}x{options.crops[1]}, K = {options.prototypes:,}, {compute.precision}, {name}, torch "
            f"{torch.__version__}; one large product reaches {peak / 1e9:.0f} GFLOP/s; {given.rounds} rounds of "
            f"{steps} step(s)"
        )
        print(f"{about}\n\n{markdown(table)}")
        if given.json:
            found = options._asdict() | {"ranks": ranks.size, "precision": compute.precision, "machine": name}
            found |= {"torch": torch.__version__, "peak_flops": peak, "rounds": given.rounds, "steps": steps}
            given.json.write_text(json.dumps({"about": about} | found | {"rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
