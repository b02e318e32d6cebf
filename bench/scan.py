"""The selective scan, forward and forward + backward, against the plain step-by-step form. Ratios of one run.

    OMP_NUM_THREADS=1 python bench/scan.py [--batch 8 --width 384 --state 16 --length 197 --rounds 5 --device cpu]

plain: decays and inputs of all steps first, then one step after the other by indexing, as the papers' reference does.
unbind: the same without indexing, whose backward pass writes a full-size gradient for every step.
Rounds alternate between the variants and the minimum counts. Peak memory is what one forward + backward pass adds in a
fresh process (CPU: resident set; CUDA: torch's allocator), inputs not included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar.ssl.backbones.scan import choose_scan, selective_scan
from nearfar.ssl.errors import UserError


def plain(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    decay, drive = _discretized(x, dt, a, b)
    state, out = torch.zeros_like(decay[:, :, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, :, t] * state + drive[:, :, t]
        out.append(torch.einsum("bdn,bn->bd", state, c[:, t]))
    return torch.stack(out, 1) + x * d


def unbind(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    decay, drive = _discretized(x, dt, a, b)
    state, out = torch.zeros_like(decay[:, :, 0]), []
    for step, push, read in zip(decay.unbind(2), drive.unbind(2), c.unbind(1), strict=True):
        state = step * state + push
        out.append(torch.einsum("bdn,bn->bd", state, read))
    return torch.stack(out, 1) + x * d


def _discretized(x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, D, L, N) each."""
    decay = torch.exp(torch.einsum("bld,dn->bdln", dt, a))
    return decay, torch.einsum("bld,bln,bld->bdln", dt, b, x)


def ours(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, scan="torch")


def triton(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, scan="triton")


def kernel(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, scan="mamba")


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "unbind": unbind,
    "ours": ours,
    "triton": triton,
    "mamba": kernel,
}


def leaves(args: argparse.Namespace) -> list[Tensor]:
    torch.manual_seed(0)
    batch, length, width, n = args.batch, args.length, args.width, args.state
    dt = torch.empty(batch, length, width).uniform_(-6.9, -2.3).exp()  # Vim's initial range, .001 to .1
    a = -torch.arange(1, n + 1.0).repeat(width, 1)
    x, b, c = torch.randn(batch, length, width), torch.randn(batch, length, n), torch.randn(batch, length, n)
    return [v.to(args.device).requires_grad_() for v in (x, dt, a, b, c, torch.ones(width))]


def run(variant: str, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with `backward` the gradients of all inputs."""
    with torch.set_grad_enabled(backward):
        y = VARIANTS[variant](*inputs)
    gradients = list(torch.autograd.grad(y, inputs, torch.ones_like(y) * inputs[0].detach())) if backward else []
    if y.is_cuda:
        torch.cuda.synchronize()
    return [y.detach(), *gradients]


def seconds(variant: str, inputs: list[Tensor], backward: bool) -> float:
    begun = time.perf_counter()
    run(variant, inputs, backward)
    return time.perf_counter() - begun


def measure_peak(variant: str, args: argparse.Namespace, queue: Any) -> None:
    """In a process of its own: MiB that one pass adds, after a small one has loaded the libraries."""
    small = argparse.Namespace(**{**vars(args), "batch": 1, "length": 2, "width": 8})
    run(variant, leaves(small), True)
    inputs = leaves(args)
    if args.device == "cuda":
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(variant, inputs, True)
        queue.put((torch.cuda.max_memory_allocated() - allocated) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
    before = _resident("VmRSS")
    run(variant, inputs, True)
    queue.put(_resident("VmHWM") - before)


def _resident(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak(variant: str, args: argparse.Namespace) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_peak, args=(variant, args, queue))
    process.start()
    found = float(queue.get())
    process.join()
    return found


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load average {load:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("width", 384), ("state", 16), ("length", 197), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    variants = ["plain", "unbind", "ours"]
    for kernels in ("triton", "mamba"):
        try:
            variants.append(choose_scan(kernels, args.device))
        except UserError as error:
            print(f"without {kernels}: {error}")

    print(f"selective scan, batch {args.batch}, D {args.width}, N {args.state}, L {args.length}, float32")
    print(f"{machine(args.device)}; torch {torch.__version__}")
    inputs = leaves(args)
    exact = run("plain", inputs, True)
    worst = {
        variant: max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(run(variant, inputs, True), exact, strict=True)
        )
        for variant in variants
    }
    del exact
    times: dict[tuple[str, bool], float] = {}
    for _ in range(args.rounds):
        for variant in variants:
            for backward in (False, True):
                spent = seconds(variant, inputs, backward)
                times[variant, backward] = min(spent, times.get((variant, backward), spent))
    print("variant   forward ms   forward+backward ms   plain / this   peak MiB   largest relative difference to plain")
    for variant in variants:
        forward, both = times[variant, False] * 1e3, times[variant, True] * 1e3
        ratio = times["plain", True] * 1e3 / both
        memory = peak(variant, args)
        print(f"{variant:7} {forward:12.1f} {both:21.1f} {ratio:13.1f}x {memory:10.1f} {worst[variant]:20.1e}")


if __name__ == "__main__":
    main()
