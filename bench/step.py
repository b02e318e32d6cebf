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
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.parallel import device, distributed
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.settings.defaults import resolve

VALUES = {"lr": 1e-6, "weight_decay": 0.04, "teacher_momentum": 0.996, "teacher_temp": 0.04}
IDEAS = {"LGP": ("lgp",), "LGP + GAug + PRR": ("lgp", "gaug", "prr")}
COMPILED = ", compiled"  # after a name: its blocks by torch.compile
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


def views_of(asked: StepOptions, target: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, asked.crops[0]), (asked.local_crops, asked.crops[1]))
    return [torch.randn((v, asked.batch, 3, s, s), generator=generator).to(target) for v, s in sizes if v]


def settings_of(name: str, asked: StepOptions) -> list[str]:
    name = name.removesuffix(COMPILED)
    model = asked.model.replace("vit_", "vim_") if name == "Vim" else asked.model
    return [
        f"backbone.name={model}", f"head.prototypes={asked.prototypes}", "head.batch_norm=false",
        f"views.global_crops_size={asked.crops[0]}", f"views.local_crops_size={asked.crops[1]}",
        f"views.local_crops_number={asked.local_crops}", f"train.batch_size={asked.batch * distributed.count()}",
        *(f"backbone.{idea}=true" for idea in IDEAS.get(name, ())),
    ]  # fmt: skip


def step_of(name: str, asked: StepOptions, compute: Compute) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    views = views_of(asked, compute.device)
    if name == "dino":
        torch.manual_seed(0)
        step, _ = dino_step(f"{asked.model}_224", asked.prototypes, compute.device, compute.autocast)
        flat = [view for group in views for view in group]
        return lambda: step(flat)
    stepper = stepper_of(name, asked, compute)
    return lambda: stepper(views, VALUES, votes=lambda: (0.0, 0.0)).report.read().loss


def stepper_of(name: str, asked: StepOptions, compute: Compute) -> Stepper:
    """Ours, by the name it has in the table."""
    run = resolve(config.load(None, settings_of(name, asked)), 100_000, world_size=distributed.count())[0]
    learner = build_dino_learner(run).to(compute.device)
    if distributed.count() > 1:
        share_batch_norm(learner)
    if name.endswith(COMPILED):
        if why := compiler_missing(compute.device):
            raise SystemExit(f"{name}: {why}.")
        torch._dynamo.config.recompile_limit = 64  # a run has one network, and here are several in a process
        for backbone in (learner.student.backbone, learner.teacher.backbone):
            compile_backbone(backbone, compute.device)
    return Stepper(learner, adamw(learner.student), 3.0, compute.autocast)


def choose_compute(asked: StepOptions) -> Compute:
    torch.set_num_threads(asked.threads)
    compute = device.choose(asked.device, asked.precision, 10**6)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    return compute


def products(name: str, asked: StepOptions) -> float:
    """GFLOP of the matrix products and convolutions in a step, counted on a CPU in float32 by attention written out."""
    compute = Compute(torch.device("cpu"), nullcontext, "float32")
    one = asked._replace(batch=2, prototypes=64)
    counted = []
    name = name.removesuffix(COMPILED)
    plain = "LGP" if name in IDEAS else name
    for each in (one, one._replace(prototypes=128), one._replace(batch=4)):
        step = step_of(plain, each, compute)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        counted.append(counter.get_total_flops() / 1e9)
    once, wider, twice = counted
    image, prototype = (twice - once) / 2, (wider - once) / 64 / 2  # of an image; of a prototype and an image
    return asked.batch * (image + prototype * (asked.prototypes - 64)) + once - 2 * image


def peak_flops(compute: Compute) -> float:
    """FLOP/s of one large matrix product in the precision of the step, the best of several."""
    n = 8192 if compute.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if "bf16" in compute.precision else torch.float32
    a, b = (torch.randn(n, n, device=compute.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def peak_alone(name: str, asked: StepOptions, answers: Any) -> None:
    """Peak resident memory of a process that takes two steps and nothing else."""
    step = step_of(name, asked, choose_compute(asked))
    for _ in range(2):
        step()
    answers.put(resident())


def resident() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # On Linux getrusage's number is inherited from the process that started this one.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak_memory(name: str, asked: StepOptions) -> float:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=peak_alone, args=(name, asked, answers))
    process.start()
    found = float(answers.get(timeout=3600))
    process.join()
    return found


def measure(
    names: list[str], asked: StepOptions, compute: Compute, rounds: int, steps: int, memory: bool
) -> list[Measurement]:
    """Steps that take turns: `steps` of each a round, after two that do not count."""
    cuda = compute.device.type == "cuda"
    taking: dict[str, Callable[[], float]] = {}
    peaks = dict.fromkeys(names, float("nan"))
    for name in names:
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taking[name] = step_of(name, asked, compute)
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
        peaks = {name: peak_memory(name, asked) for name in names}
    return [Measurement(name, seconds[name], products(name, asked), peaks[name]) for name in names]


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
        "--only", nargs="+", default=NAMES, choices=[*NAMES, *(name + COMPILED for name in NAMES[1:])], metavar="NAME",
        help=f"of {', '.join(NAMES)}; all but the first also as 'NAME{COMPILED}'. Ratios are against the first",
    )  # fmt: skip
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    asked = StepOptions(
        options.model, options.batch, tuple(options.crops), options.local_crops, options.prototypes, options.device,
        options.precision, options.threads,
    )  # fmt: skip
    ranks = distributed.from_environment()
    with distributed.joined(ranks):
        compute = choose_compute(asked)
        peak = peak_flops(compute)
        steps = options.steps or (10 if compute.device.type == "cuda" else 1)
        found = measure(options.only, asked, compute, options.rounds, steps, not options.no_memory)
        if not ranks.first:
            return
        table = rows(found, asked.batch * ranks.size, peak)
        name = torch.cuda.get_device_name() if compute.device.type == "cuda" else f"CPU, {asked.threads} thread(s)"
        print(
            f"{asked.model}, {asked.batch} images a rank, {ranks.size} rank(s), 2x{asked.crops[0]} + "
            f"{asked.local_crops}x{asked.crops[1]}, K = {asked.prototypes:,}, {compute.precision}, {name}, torch "
            f"{torch.__version__}; one large product reaches {peak / 1e9:.0f} GFLOP/s; {options.rounds} rounds of "
            f"{steps} step(s)\n\n{markdown(table)}"
        )
        if options.json:
            about = asked._asdict() | {"ranks": ranks.size, "precision": compute.precision, "machine": name}
            about |= {"torch": torch.__version__, "peak_flops": peak, "rounds": options.rounds, "steps": steps}
            options.json.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
