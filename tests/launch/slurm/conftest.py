"""A folder with a recipe and pictures, and a SLURM that is none: what the tests of `nearfar launch` share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nearfar.launch.slurm import job, queue, records, requeue


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"path": "pictures"}}))
    return tmp_path


FAKE_SBATCH = """#!/bin/sh
echo "$@" >> {log}
[ "$(wc -l < {log})" -gt {accepted} ] && echo "sbatch: error: Batch job submission failed: planted" >&2 && exit 1
cp "$1" {log}.$(wc -l < {log})
echo "Submitted batch job $(wc -l < {log})"
"""


@pytest.fixture
def sbatch(here: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A SLURM whose sbatch accepts so many jobs and refuses the next ones; the log of its calls."""
    folder, log = here / "bin", here / "sbatch.log"
    folder.mkdir()
    scripts = {"sbatch": FAKE_SBATCH.format(log=log, accepted=request.param), "srun": "", "squeue": "", "sacct": ""}
    for name, script in scripts.items():
        (folder / name).write_text(script or "#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with records.locked(tmp_path):
        return tmp_path


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of SLURM; nothing waits for the end."""
    calls: list[str] = []
    monkeypatch.setattr(queue, "requeue", lambda number, **_: calls.append(f"requeue {number}"))
    monkeypatch.setattr(queue, "preempted", lambda number: False)
    for module in (job, requeue):
        monkeypatch.setattr(module, "wait_for_the_end", lambda *_: calls.append("waited"))
    return calls
