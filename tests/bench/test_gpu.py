"""bench/gpu.py without a GPU: it says so, a section that fails, hangs or is cut loses only itself, and sections run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("gpu")


@pytest.fixture(scope="module")
def parts(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("gpu_sections")


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), *options], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without CUDA")
def test_without_a_gpu_a_paragraph_says_so(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "torch sees none here" in done.stderr and "--device cpu --quick" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout and not (tmp_path / "out").exists()


def test_an_unknown_section_is_named() -> None:
    done = command("--device", "cpu", "--only", "knn", "stepp")
    assert done.returncode == 2 and "no section stepp. The sections are machine, tests, step," in done.stderr


def test_sections_run_and_are_written(tmp_path: Path) -> None:
    done = command("--device", "cpu", "--quick", "--only", "machine", "features", "knn", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    everything = json.loads((tmp_path / "gpu.json").read_text())
    assert list(everything["sections"]) == ["machine", "features", "knn"] and everything["waiting"] == []
    for section in everything["sections"].values():
        assert section["outcome"] == "done" and all(
            value > 0 for row in section["answer"]["rows"] for value in row.values() if isinstance(value, float)
        )
    page = (tmp_path / "gpu.md").read_text()
    assert "No section failed." in page and "## Nearest neighbors" in page and page in done.stdout


def test_every_section_is_a_command_that_exists_and_all_fit_into_nine_minutes(bench: Any, parts: Any) -> None:
    for device, quick in (("cuda", False), ("cpu", True)):
        chosen = bench.sections(argparse.Namespace(device=device, quick=quick))
        assert len({section.name for section in chosen}) == len(chosen) > 8
        for section in chosen:
            script, *rest = section.command
            assert (bench.ROOT / script).exists() and "{out}" in rest
            assert script != "bench/gpu_sections.py" or rest[0] in parts.SECTIONS


def test_steps_are_measured_in_the_precision_that_a_run_takes_here(bench: Any, tmp_path: Path) -> None:
    """Which is bf16 where it is good and fp16 where not, as train.precision=auto says; the rehearsal's is float32."""
    for section in bench.step_sections(argparse.Namespace(device="cuda", quick=False)):
        assert section.command[section.command.index("--precision") + 1] == "auto"
    (section, *_) = bench.step_sections(argparse.Namespace(device="cpu", quick=True))
    found = bench.run(section, 120, dict(os.environ), tmp_path)
    assert found.outcome == "done", found.output
    assert {row["precision"] for row in found.answer["rows"]} == {"float32"} == {found.answer["precision"]}
    page = bench.markdown([(section, found)], [], [])
    assert "K = 64, float32, CPU" in page and "| precision |" in page


def fake(bench: Any, code: str, batch: int = 0) -> Any:
    return bench.Section("fake", "a fake section", ["-c", code, "{out}", "{batch}"], 10, batch)


WRITES = "import json, os, sys, time; json.dump({'rows': [{'a': 1}]}, open(sys.argv[1], 'w'));"


@pytest.mark.parametrize(
    ("code", "seconds", "outcome", "rows"),
    [
        (WRITES, 30, "done", [{"a": 1}]),
        (WRITES + "print('broke here'); sys.exit(3)", 30, "failed: exit status 3", [{"a": 1}]),
        (WRITES + "os.abort()", 30, "failed: exit status -6", [{"a": 1}]),
        (WRITES + "time.sleep(600)", 1.5, "failed: not done after 2 s", [{"a": 1}]),
        ("pass", 30, "failed: it left no numbers", []),
    ],
    ids=["done", "fails", "crashes", "hangs", "silent"],
)
def test_a_section_loses_only_itself(
    bench: Any, tmp_path: Path, code: str, seconds: float, outcome: str, rows: list[dict[str, int]]
) -> None:
    section = fake(bench, code)
    found = bench.run(section, seconds, dict(os.environ), tmp_path)
    assert found.outcome == outcome and found.answer.get("rows", []) == rows
    page = bench.markdown([(section, found)], ["later"], ["triton"])
    assert ("Failed: a fake section" in page) == (outcome != "done") and "Not run (yet): later." in page
    assert "triton (the kernels" in page and ("| 1 |" in page) == bool(rows)
    assert ("broke here" in page) == ("broke here" in code)


def test_the_processes_of_a_section_end_with_it(bench: Any, tmp_path: Path) -> None:
    """One that hangs has a child that writes; after the section was ended, nothing writes any more."""
    child = f"import time\nfor i in range(10**6): open({str(tmp_path / 'alive')!r}, 'a').write('x'); time.sleep(.01)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    assert "not done" in bench.run(fake(bench, code), 2, dict(os.environ), tmp_path).outcome
    size = (tmp_path / "alive").stat().st_size
    subprocess.run([sys.executable, "-c", "import time; time.sleep(.3)"], check=True)
    assert size > 0 and (tmp_path / "alive").stat().st_size == size


def test_the_batch_is_halved_until_it_fits(bench: Any, tmp_path: Path) -> None:
    code = (
        "import json, sys; batch = int(sys.argv[2])\n"
        "if batch > 20: sys.exit('torch.OutOfMemoryError: CUDA out of memory.')\n"
        "json.dump({'rows': [{'batch': batch}]}, open(sys.argv[1], 'w'))"
    )
    found = bench.run(fake(bench, code, 64), 60, dict(os.environ), tmp_path)
    assert found.outcome == "done" and found.answer["rows"] == [{"batch": 16}]


def test_nearfar_imports_from_the_checkout_without_being_installed(bench: Any, tmp_path: Path) -> None:
    """-S leaves out what is installed; the standard library's ssl stays what it is."""
    code = "import ssl; ssl.SSLContext; import nearfar.ssl.errors, nearfar.eval; print(nearfar.ssl.errors.__file__)"
    environment = os.environ | {"PYTHONPATH": str(bench.import_path(tmp_path))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == bench.ROOT / "ssl" / "errors.py"


def test_outcomes_of_pytest_are_counted_and_a_missing_package_is_named(parts: Any) -> None:
    report = """<testsuites><testsuite><testcase name="good"/><testcase name="bad"><failure message="1 != 2">...
    </failure></testcase><testcase name="left out"><skipped message="no CUDA device"/></testcase><testcase
    name=""><error message="collection failure">E   ModuleNotFoundError: No module named 'hypothesis'</error></testcase>
    </testsuite></testsuites>"""
    counts, notes = parts.outcomes("tests/test_x.py", ET.fromstring(report))
    assert counts == {"passed": 1, "failed": 1, "skipped": 2}
    assert notes == [
        "tests/test_x.py, bad: 1 != 2",
        "tests/test_x.py: 1 skipped: no CUDA device",
        "tests/test_x.py: 1 skipped: it needs hypothesis",
    ]


def test_every_file_with_a_test_for_a_gpu_is_found(parts: Any) -> None:
    names = {file.name for file in parts.test_files()}
    assert {"test_step.py", "test_kernels.py", "test_evaluation.py", "test_gaug.py", "test_device_crops.py"} <= names
