"""All that wants a GPU, in one command of at most 9 minutes: every CUDA test, then speed and memory, as one table.

    python bench/gpu.py [--out runs/gpu-bench] [--minutes 9] [--only tests step]
    python bench/gpu.py --device cpu --quick       # a rehearsal of every section at tiny sizes, on any machine

Needs a checkout and torch, numpy, timm (with the torchvision and Pillow that it brings), pydantic, pyyaml and
safetensors; `nearfar` itself need not be installed. What else is missing is skipped and named. Every section is a
process of its own with its own time, so that one that fails or hangs loses itself only, and OUT/gpu.md and OUT/gpu.json
are written after each. The numbers are those of bench/step.py, bench/scan.py and bench/gpu_sections.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ["torch", "numpy", "timm", "torchvision", "PIL", "pydantic", "yaml", "safetensors"]
OPTIONAL = {
    "triton": "the kernels of the scan and the colors, torch.compile",
    "pytest": "every test",
    "rich": "tests that run a whole training",
    "tensorboard": "tests that run a whole training",
    "hypothesis": "tests in files that use it",
    "scipy": "tests in files that use it",
    "psutil": "tests in files that use it",
    "ffcv": "the compiled loader",
    "mamba_ssm": "the scan of mamba-ssm",
}
FAILED = "failed"


class Section(NamedTuple):
    """A part of the table: a command that prints, and leaves `rows` in a JSON file."""

    name: str
    title: str
    command: list[str]  # of Python, the interpreter left out; {out} is where its JSON belongs
    seconds: int  # its share of the time; what a section leaves goes to those after it
    batch: int = 0  # of {batch} in the command, halved while the device's memory does not suffice


class Found(NamedTuple):
    """What became of a section."""

    outcome: str  # "done", or in words why not
    seconds: float
    answer: dict[str, Any]  # its JSON
    output: str  # the end of what it printed


def step_sections(options: argparse.Namespace) -> list[Section]:
    """The table of steps, in parts that cannot take each other along; each against dino's step anew, in the precision
    that a run takes on this device (train.precision=auto)."""
    sizes = ["--rounds", "3", "--steps", "5", "--precision", "auto", "--batch", "{batch}"]
    batch = 64
    if options.quick:
        sizes = ["--model", "vit_tiny_patch16", "--crops", "32", "16", "--local-crops", "2", "--prototypes", "64"]
        sizes += ["--rounds", "1", "--steps", "1", "--precision", "fp32", "--batch", "2"]
        batch = 0
    common = ["bench/step.py", "--device", options.device, *sizes, "--no-memory", "--json", "{out}", "--only", "dino"]
    return [
        Section("step", "a step of DINO, plain", [*common, "plain"], 90, batch),
        Section("step-compiled", "a step of DINO, compiled", [*common, "plain", "plain, compiled"], 100, batch),
        Section("step-ideas", "a step with the ideas", [*common, "LGP", "LGP + GAug + PRR"], 110, batch),
        Section("step-vim", "a step of Vision Mamba", [*common, "Vim"], 110, batch),
    ]


def sections(options: argparse.Namespace) -> list[Section]:
    own = ["--device", options.device, "--out", "{out}", *(["--quick"] if options.quick else [])]

    def part(name: str, title: str, seconds: int) -> Section:
        return Section(name, title, ["bench/gpu_sections.py", name, *own], seconds)

    return [
        part("machine", "the machine", 60),
        part("tests", "tests", 170),
        *step_sections(options),
        part("scan", "selective scan", 60),
        part("attention", "attention with a window, by the number of tokens", 80),
        part("colors", "colors and prefetch", 45),
        part("loader", "loaders with colors on the device", 60),
        part("features", "features for evaluation", 45),
        part("knn", "nearest neighbors", 45),
    ]


def import_path(folder: Path) -> Path:
    """`folder`, filled so that `nearfar` imports from this checkout when it is on PYTHONPATH, as if installed.

    The import name is a namespace in front of the folders: pyproject.toml says which.
    """
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, target in mapping.items():
        link = folder / name.replace(".", "/")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(ROOT / target, target_is_directory=True)
    return folder


def run(section: Section, seconds: float, environment: dict[str, str], out: Path) -> Found:
    """The section, with half the batch where memory does not suffice; ended with all its processes when time is up."""
    began, batch = time.monotonic(), section.batch
    while True:
        answer, log = out / f"{section.name}.json", out / f"{section.name}.log"
        answer.unlink(missing_ok=True)
        given = [argument.replace("{out}", str(answer)).replace("{batch}", str(batch)) for argument in section.command]
        with log.open("w") as printed:
            process = subprocess.Popen(
                [sys.executable, *given], cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(1.0, seconds - (time.monotonic() - began)))
                outcome = "done" if status == 0 else f"{FAILED}: exit status {status}"
            except subprocess.TimeoutExpired:
                outcome = f"{FAILED}: not done after {seconds:.0f} s"
            finally:
                end(process)
        output = log.read_text(errors="replace")
        if outcome != "done" and batch > 1 and "out of memory" in output and time.monotonic() - began < seconds:
            batch //= 2
            continue
        try:  # what a section wrote before it was cut counts
            found = json.loads(answer.read_text())
        except (OSError, ValueError):
            found = {}
            outcome = outcome if outcome != "done" else f"{FAILED}: it left no numbers"
        return Found(outcome, time.monotonic() - began, found, output[-4000:])


def end(process: subprocess.Popen[bytes]) -> None:
    """End a section and every process that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, a column for every key that any of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    lines += [f"| {' | '.join(number(row.get(key)) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def markdown(done: list[tuple[Section, Found]], waiting: list[str], missing: list[str]) -> str:
    """The whole page, of the sections that are done so far."""
    parts = ["# Measured by bench/gpu.py"]
    if missing:
        parts.append("Not installed, so left out: " + "; ".join(f"{name} ({OPTIONAL[name]})" for name in missing) + ".")
    lost = [f"{section.title} ({found.outcome})" for section, found in done if found.outcome != "done"]
    parts.append("Failed: " + "; ".join(lost) + "." if lost else "No section failed.")
    if waiting:
        parts.append("Not run (yet): " + ", ".join(waiting) + ".")
    for section, found in done:
        parts.append(f"## {section.title[0].upper()}{section.title[1:]}")
        if about := found.answer.get("about"):
            parts.append(about)
        if rows := found.answer.get("rows"):
            parts.append(table(rows))
        parts += [f"- {note}" for note in found.answer.get("notes", ())]
        if found.outcome != "done":
            tail = "\n".join(found.output.strip().splitlines()[-12:])
            parts.append(f"{found.outcome}\n\n```\n{tail}\n```")
        parts.append(f"({found.seconds:.0f} s)")
    return "\n\n".join(parts) + "\n"


def write(out: Path, done: list[tuple[Section, Found]], waiting: list[str], missing: list[str]) -> None:
    """gpu.md and gpu.json, each whole at any time."""
    everything = {"missing": missing, "waiting": waiting}
    everything |= {"sections": {section.name: found._asdict() for section, found in done}}
    for name, text in (("gpu.md", markdown(done, waiting, missing)), ("gpu.json", json.dumps(everything, indent=1))):
        fresh = out / f".{name}"
        fresh.write_text(text)
        fresh.replace(out / name)


def refusal(options: argparse.Namespace) -> str:
    """Why nothing can be measured here, in a paragraph; "" if it can."""
    absent = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if absent:
        return (
            f"bench/gpu.py needs {', '.join(absent)}, which this Python ({sys.executable}) does not have. It runs with "
            "torch 2.10 or newer, numpy, timm (which brings torchvision and Pillow), pydantic, pyyaml and safetensors."
        )
    if options.device == "cuda":
        code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode:
            return (
                "bench/gpu.py measures a GPU, and torch sees none here: there is no device, no driver, or torch is a "
                "build for CPUs. To see every section run at tiny sizes without one: python bench/gpu.py --device cpu "
                "--quick."
            )
    return ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-bench", help="folder of gpu.md and gpu.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="names of sections, as in OUT/gpu.json")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if why := refusal(options):
        print(why, file=sys.stderr)
        return 2
    chosen = sections(options)
    names = [section.name for section in chosen]
    if unknown := sorted(set(options.only or ()) - set(names)):
        print(f"There is no section {', '.join(unknown)}. The sections are {', '.join(names)}.", file=sys.stderr)
        return 2
    chosen = [section for section in chosen if not options.only or section.name in options.only]
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends, done = time.monotonic() + 60 * options.minutes, list[tuple[Section, Found]]()
    with tempfile.TemporaryDirectory() as folder:
        path = [str(import_path(Path(folder))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
        for number, section in enumerate(chosen):
            left = ends - time.monotonic()
            if left < 5:
                break
            print(f"{section.title} ...", flush=True)
            share = left * section.seconds / sum(later.seconds for later in chosen[number:])
            done.append((section, run(section, share, environment, out)))
            print(f"  {done[-1][1].outcome}, {done[-1][1].seconds:.0f} s", flush=True)
            write(out, done, [later.name for later in chosen[number + 1 :]], missing)
    print(f"\n{(out / 'gpu.md').read_text()}\nWritten to {out / 'gpu.md'} and {out / 'gpu.json'}.")
    return int(len(done) < len(chosen) or any(found.outcome != "done" for _, found in done))


if __name__ == "__main__":
    sys.exit(main())
