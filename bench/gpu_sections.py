"""The sections of bench/gpu.py, each a process: python bench/gpu_sections.py NAME --device cuda --out NUMBERS.json.

Times are the least of several rounds, with the device waited for at the end of each round only. Images are noise and
networks are freshly drawn: speed needs no data sets. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


class Answer:
    """Rows and remarks, on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"about": "", "rows": [], "notes": []}

    def about(self, text: str) -> None:
        self.content["about"] = text
        self._write()

    def row(self, **values: Any) -> None:
        self.content["rows"].append(values)
        self._write()

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self._write()

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


class Target:
    """The device, and how long work takes on it."""

    def __init__(self, name: str, quick: bool) -> None:
        self.device, self.quick = torch.device(name), quick
        self.cuda = name == "cuda"
        self.rounds, self.each = (1, 1) if quick else (5, 10)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], warm: int = 2) -> float:
        for _ in range(warm):
            work()
        best = float("inf")
        for _ in range(self.rounds):
            self.wait()
            begun = time.perf_counter()
            for _ in range(self.each):
                work()
            self.wait()
            best = min(best, (time.perf_counter() - begun) / self.each)
        return 1e3 * best

    def peak_mib(self, work: Callable[[], Any]) -> float | None:
        """What one call adds to the device's memory at its peak; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- machine and tests -------------------------------------------------------------------------------------------


def machine(target: Target, answer: Answer) -> None:
    name = torch.cuda.get_device_name() if target.cuda else "CPU"
    answer.about(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores.")
    if target.cuda:
        free, whole = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        answer.row(what="memory, GiB", value=whole / 2**30)
        answer.row(what="memory that is free, GiB", value=free / 2**30)
        answer.row(what="compute capability", value=f"{major}.{minor}")
    n = 256 if target.quick else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=target.device, dtype=dtype) for _ in range(2))
        took = target.milliseconds(lambda a=a, b=b: a @ b)
        answer.row(what=f"product of {n} x {n}, {dtype}, TFLOP/s", value=2 * n**3 / took / 1e9)
    x = torch.empty(2**20 if target.quick else 2**30, dtype=torch.uint8, device=target.device)
    y = torch.empty_like(x)
    answer.row(
        what="copy on the device, read and written, GB/s",
        value=2 * len(x) / target.milliseconds(lambda: y.copy_(x)) / 1e6,
    )


def test_files() -> list[Path]:
    """Files of tests for a GPU."""
    marked = (file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text())
    return sorted({*marked, *(ROOT / "tests" / "gpu").glob("test_*.py")})


def tests(target: Target, answer: Answer) -> None:
    """A process a file: an illegal access to the device's memory breaks every later call of its process."""
    if importlib.util.find_spec("pytest") is None:
        answer.note("pytest is not installed: no test ran.")
        return
    files = test_files() if target.cuda else [file for file in test_files() if file.parent.name == "gpu"]
    answer.about(f"Tests marked `cuda`, {len(files)} files." if target.cuda else "The tests of tests/gpu, on the CPU.")
    with ThreadPoolExecutor(4 if target.cuda else 1) as pool, tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{number}.xml" for number in range(len(files))]
        marker = "cuda" if target.cuda else "not cuda"
        for row, notes in pool.map(test_file, files, reports, repeat(marker)):
            answer.row(**row)
            for note in notes:
                answer.note(note)
    if any(row["failed"] for row in answer.content["rows"]):
        sys.exit(1)


def test_file(file: Path, report: Path, marker: str) -> tuple[dict[str, Any], list[str]]:
    """What became of one file's tests, and a remark for each that failed and for every reason to skip."""
    name, began = str(file.relative_to(ROOT)), time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", marker, f"--junit-xml={report}", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if not report.exists():
        tail = " ".join((done.stdout + done.stderr).split())[-300:]
        return {"file": name, "passed": 0, "failed": 1, "skipped": 0, "s": seconds}, [f"{name} broke: {tail}"]
    counts, notes = outcomes(name, ET.parse(report).getroot())
    return {"file": name, **counts, "s": seconds}, notes


def outcomes(name: str, root: ET.Element) -> tuple[dict[str, int], list[str]]:
    """Of pytest's XML: how many passed, failed and were skipped; remarks. A module that is not installed skips."""
    failed, notes, skips = 0, list[str](), Counter[str]()
    cases = list(root.iter("testcase"))
    for case in cases:
        for bad in (*case.iter("failure"), *case.iter("error")):
            reason = f"{bad.get('message') or ''} {bad.text or ''}"
            if "No module named" in reason:
                skips["it needs " + reason.split("No module named")[1].split("'")[1]] += 1
            else:
                failed += 1
                notes.append(f"{name}, {case.get('name')}: {' '.join(str(bad.get('message')).split())[:300]}")
        for skipped in case.iter("skipped"):
            skips[" ".join(str(skipped.get("message")).split())[:200]] += 1
    notes += [f"{name}: {count} skipped: {reason}" for reason, count in skips.items()]
    return {"passed": len(cases) - failed - skips.total(), "failed": failed, "skipped": skips.total()}, notes


# --- kernels -----------------------------------------------------------------------------------------------------


def scan(target: Target, answer: Answer) -> None:
    import scan as bench  # bench/scan.py

    from nearfar.ssl.backbones.scan import choose_scan
    from nearfar.ssl.errors import UserError

    sizes = {"batch": 2, "length": 17, "width": 8} if target.quick else {"batch": 64, "length": 197, "width": 384}
    args = argparse.Namespace(device=target.device.type, state=16, **sizes)
    answer.about(f"Batch {args.batch}, D {args.width}, N 16, L {args.length}; forward and backward.")
    variants = ["unbind", "ours"]
    for kernels in ("triton", "mamba"):
        try:
            variants.append(choose_scan(kernels, target.device.type))
        except UserError as error:
            answer.note(f"Without {kernels}: {error}")
    exact = bench.run("unbind", bench.leaves(args), True)
    slow = None
    for variant in variants:
        for dtype in (torch.float32, torch.bfloat16) if variant == "triton" else (torch.float32,):
            # x, B and C as autocast gives them; dt, A and D stay float32
            leaves = [v.detach().to(dtype) if i in (0, 3, 4) else v.detach() for i, v in enumerate(bench.leaves(args))]
            inputs = [v.requires_grad_() for v in leaves]
            found = bench.run(variant, inputs, True)
            difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
            took = target.milliseconds(lambda v=variant, inputs=inputs: bench.run(v, inputs, True), warm=1)
            slow = slow or took
            answer.row(
                scan=variant, type=str(dtype).removeprefix("torch."), ms=took, speedup=slow / took,
                forward_ms=target.milliseconds(lambda v=variant, inputs=inputs: bench.run(v, inputs, False), warm=1),
                peak_MiB=target.peak_mib(lambda v=variant, inputs=inputs: bench.run(v, inputs, True)),
                difference=difference,
            )  # fmt: skip


def attention(target: Target, answer: Answer) -> None:
    """The routes of GAug at several lengths: the rule `attention.reads_tables` is reasoned, and this measures it."""
    from nearfar.ssl.backbones.attention import (
        LONG,
        _flex,
        attend,
        compiled_once,
        cuda_compiler_missing,
        flex_windows,
        reads_tables,
        window_bias,
    )

    if why := cuda_compiler_missing() if target.cuda else "it has no gradients on a CPU":
        answer.note(f"Without FlexAttention: {why}.")
    answer.about(f"bfloat16, forward and backward, ms; 6 heads of 64; the rule now changes over at {LONG} tokens.")
    for side in (4,) if target.quick else (14, 20, 28, 32):
        tokens = side * side + 1
        batch = 1 if target.quick else max(1, 64 * 197 // tokens)
        q, k, v = (torch.randn(batch, 6, tokens, 64, device=target.device).bfloat16().requires_grad_() for _ in "qkv")
        rows, columns = (
            torch.rand(batch, 6, side * side, side, device=target.device, requires_grad=True) for _ in range(2)
        )

        def both(forward: Callable[[], Tensor], given: list[Tensor]) -> None:
            out = forward()
            torch.autograd.grad(out, given, torch.ones_like(out))

        routes: dict[str, Callable[[], Any]] = {
            "no window": lambda q=q, k=k, v=v: both(lambda: attend(q, k, v), [q, k, v]),
            "written out": lambda q=q, k=k, v=v, rows=rows, columns=columns, n=tokens: both(
                lambda: attend(q, k, v, window_bias(rows, columns, n).to(q.dtype)), [q, k, v, rows, columns]
            ),
        }
        if not why:
            routes["tables"] = lambda q=q, k=k, v=v, rows=rows, columns=columns: both(
                lambda: flex_windows(compiled_once(_flex()), q, k, v, rows, columns), [q, k, v, rows, columns]
            )
        taken = "tables" if reads_tables(tokens, 64, target.device.type) else "written out"
        row = {"tokens": tokens, "batch": batch, "the rule takes": taken}
        for name, work in routes.items():
            row |= {f"{name}, ms": target.milliseconds(work), f"{name}, MiB": target.peak_mib(work)}
        answer.row(**row)


def batch_of_noise(target: Target, batch: int) -> Any:
    """A `Batch` of DINO's views, uint8, as a loader hands it over: in pinned memory where there is a GPU."""
    from nearfar.ssl.data.loaders.base import Batch
    from nearfar.ssl.data.views import plan_views
    from nearfar.ssl.settings.run import ViewSettings

    settings = ViewSettings(global_crops_size=32, local_crops_size=16) if target.quick else ViewSettings()
    index, rng = np.arange(batch), np.random.default_rng(0)
    sizes = ((2, settings.global_crops_size), (settings.local_crops_number, settings.local_crops_size))
    groups = [torch.from_numpy(rng.integers(0, 256, (v, batch, 3, s, s), np.uint8)) for v, s in sizes]
    made = Batch(groups, plan_views(settings, 0, 0, index, np.full((batch, 2), 256)), index, None, 0, 0)
    return made.pin_memory() if target.cuda else made


def colors(target: Target, answer: Answer) -> None:
    import step as bench  # bench/step.py

    from nearfar.ssl.data.transforms.colors import color, color_by_kernels, color_of, color_views
    from nearfar.ssl.data.transforms.normalize import normalize
    from nearfar.ssl.learning.prefetch import Prefetch, side_stream

    batch = 2 if target.quick else 64
    noise = batch_of_noise(target, batch)
    there = [group.to(target.device).flatten(0, 1) for group in noise.groups]
    plans = [color_of(noise.plan, part) for part in (slice(2), slice(2, None))]
    ways: dict[str, Any] = {"torch's operations": color}
    if target.cuda and importlib.util.find_spec("triton"):
        ways["Triton's kernels"] = color_by_kernels
    answer.about(f"{batch} images a batch, 10 views each; the steps are ViT-S/16 without ideas." * (not target.quick))
    for name, way in ways.items():
        took = target.milliseconds(lambda way=way: [way(x, plan) for x, plan in zip(there, plans, strict=True)])
        answer.row(what=f"colors by {name}", ms=took)

    model, side, small = ("vit_tiny_patch16", 32, 16) if target.quick else ("vit_small_patch16", 224, 96)
    options = bench.StepOptions(
        model, batch, (side, small), 8, 64 if target.quick else 65536, target.device.type, "auto", 1
    )
    compute = bench.choose_compute(options)
    stepper = bench.stepper_of("plain", options, compute)
    given = bench.views_of(options, target.device)

    def views(each: Any) -> list[Tensor]:
        return [normalize(group) for group in color_views(each, target.device)]

    ahead = Prefetch(lambda: noise, views, side_stream(target.device))

    def prefetched() -> None:
        stepper(ahead.take()[1], bench.VALUES)
        ahead.begin()

    steps: dict[str, Callable[[], Any]] = {
        "a step on views that are there": lambda: stepper(given, bench.VALUES),
        "copies, colors, step in turn": lambda: stepper(views(noise), bench.VALUES),
        "copies and colors ahead, on a side stream": prefetched,
    }
    for name, work in steps.items():
        took = target.milliseconds(work, warm=3)
        answer.row(what=name, ms=took, img_per_s=1e3 * batch / took)


# --- data and evaluation -----------------------------------------------------------------------------------------


def write_images(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375, smooth with some noise: about as many bytes as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)


def loader(target: Target, answer: Answer) -> None:
    from nearfar.ssl.data import libjpeg, open_loader, open_source
    from nearfar.ssl.data.loaders.base import LoaderOptions
    from nearfar.ssl.data.transforms.colors import color_views
    from nearfar.ssl.settings.run import ViewSettings

    workers = 0 if target.quick else min(16, os.cpu_count() or 1)
    count, batch = (8, 4) if target.quick else (512, 64)
    options = LoaderOptions(batch_size=batch, epochs=1000, workers=workers)
    answer.about(f"2x224 + 8x96 views of 500 x 375 JPEGs, batch {batch}, {workers} workers; colors on {target.device}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_images(folder / "images", count)
        kinds = {"folder": folder / "images", "device": folder / "images"}
        if libjpeg.available():
            from nearfar.ssl.data.beton_writer import write_beton

            write_beton(open_source(folder / "images"), folder / "images.beton")
            kinds["ffcv"] = folder / "images.beton"
        else:
            answer.note("FFCV is not installed: without its loader.")
        for kind, path in kinds.items():
            made = open_loader(open_source(path), ViewSettings(), options, loader=kind, device=target.device)
            stream = iter(made)
            for _ in range(1 if target.quick else 8):  # starts workers, compiles
                color_views(next(stream), target.device)
            target.wait()
            begun, images, seconds = time.perf_counter(), 0, 0.1 if target.quick else 6
            while time.perf_counter() - begun < seconds:
                color_views(next(stream), target.device)
                images += batch
            target.wait()
            took = time.perf_counter() - begun
            answer.row(loader=made.title, img_per_s=images / took)
            del stream  # ends its workers


def features(target: Target, answer: Answer) -> None:
    from nearfar.eval.features.extraction import Forward, Reading, extract, manifest_of
    from nearfar.eval.features.images import Decoding
    from nearfar.ssl.backbones import create
    from nearfar.ssl.data import open_source

    side, batch, count = (32, 2, 4) if target.quick else (224, 256, 1024)
    model = create("vit_tiny_patch16" if target.quick else "vit_small_patch16", img_size=side).to(target.device).eval()
    answer.about(f"{'ViT-T' if target.quick else 'ViT-S'}/16 at {side} pixels.")
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), count)
        source = open_source(Path(name))
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=target.device)
        for amp in (True, False):
            reading = Reading(side, amp=amp)
            forward = Forward(model, manifest_of(model, source, reading))
            took = target.milliseconds(lambda forward=forward: forward.on_device(images))
            precision = "bfloat16" if amp else "float32"
            answer.row(what=f"forward alone, {precision}", img_per_s=1e3 * batch / took)
            begun = time.perf_counter()
            extract(model, source, reading, Decoding(batch, workers=0 if target.quick else None))
            took = time.perf_counter() - begun
            answer.row(what=f"from JPEGs, workers started and all, {precision}", img_per_s=count / took)


def knn(target: Target, answer: Answer) -> None:
    from nearfar.eval.neighbors import neighbors

    n, m, k = (500, 20, 5) if target.quick else (640_000, 10_000, 200)
    answer.about(f"{n:,} x 384 in float16, {m:,} queries, k = {k}; exact, with the bits of the CPU.")
    generator = torch.Generator(target.device).manual_seed(0)
    memory, queries = (
        torch.randn(rows, 384, generator=generator, device=target.device).half().cpu().numpy() for rows in (n, m)
    )
    neighbors(memory[: 10 * k], queries[:8], k, device=target.device)  # loads what there is to load
    begun = time.perf_counter()
    neighbors(memory, queries, k, device=target.device)
    answer.row(what="neighbors, from features in host memory", s=time.perf_counter() - begun)
    a, b = (torch.from_numpy(each).to(target.device).float() for each in (memory[: min(n, 65536)], queries))
    took = target.milliseconds(lambda: b @ a.T, warm=1) * n / len(a) / 1e3
    answer.row(what="the float32 products alone", s=took)


SECTIONS: dict[str, Callable[[Target, Answer], None]] = {
    each.__name__: each for each in (machine, tests, scan, attention, colors, loader, features, knn)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    SECTIONS[options.section](Target(options.device, options.quick), Answer(options.out))


if __name__ == "__main__":
    main()
