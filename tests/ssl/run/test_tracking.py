"""Weights & Biases: one run for one folder, nothing lost at a continuation, and no trouble of its own for training."""

from __future__ import annotations

import importlib.util
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nearfar.ssl.errors import UserError
from nearfar.ssl.run import tracking
from nearfar.ssl.run.run_log import RunLog


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given = given
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.settings: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))
        self.finished = False
        self.broken = False

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics.append((name, options))

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise OSError("broken pipe")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeModule:
    """The calls of the package `wandb` that are used, with its argument names."""

    def __init__(self, unreachable: bool = False) -> None:
        self.runs: list[FakeRun] = []
        self.unreachable = unreachable
        self.holds_id = False
        self.Settings = lambda **given: given
        self.Image = lambda pixels: ("image", pixels.shape)

    def teardown(self) -> None:
        self.holds_id = False

    def init(
        self, *, project: str, name: str, id: str, resume: str, dir: str, mode: str | None, settings: dict[str, Any]
    ) -> FakeRun:
        if self.holds_id:
            raise RuntimeError(f"run ID {id} is in use")
        if self.unreachable and mode is None:
            self.holds_id = True  # as wandb 0.31 does after a start that failed
            raise RuntimeError("Failed to get resume status:\n  connection refused")
        run = FakeRun(project=project, name=name, id=id, resume=resume, dir=dir, mode=mode, settings=settings)
        self.runs.append(run)
        return run


def installed(monkeypatch: pytest.MonkeyPatch, module: FakeModule) -> FakeModule:
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return module


def logged_run(folder: Path, start: int, steps: range, output: StringIO) -> None:
    with RunLog(folder, 9, start, Console(file=output, width=400), track="wandb") as log:
        log.settings({"name": "r", "optim": {"lr": 0.1, "betas": [1, 2]}})
        for step in steps:
            log.record(step, {"loss": float(step), "note": "no number"})


def test_a_continued_run_continues_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 3 with a checkpoint of step 2: step 3 is logged again, and none is lost."""
    module, output = installed(monkeypatch, FakeModule()), StringIO()
    logged_run(tmp_path, 0, range(1, 4), output)
    logged_run(tmp_path, 2, range(3, 6), output)
    first, second = module.runs
    assert first.given["id"] == second.given["id"] == (tmp_path / "wandb-run-id.txt").read_text().strip()
    assert second.given["resume"] == "allow" and second.given["dir"] == str(tmp_path)
    assert [line["step"] for run in module.runs for line in run.logged] == [1, 2, 3, 3, 4, 5]
    assert first.logged[2] == second.logged[0] == {"step": 3, "loss": 3.0}
    assert ("*", {"step_metric": "step"}) in second.metrics  # W&B's own counter would drop the second step 3
    assert first.settings == {"optim.lr": 0.1, "optim.betas": "[1, 2]"} and first.finished and second.finished
    assert output.getvalue() == "" and not list(tmp_path.glob("events*"))


def test_another_folder_is_another_run_and_an_unusable_id_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = installed(monkeypatch, FakeModule())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        logged_run(tmp_path / name, 0, range(1), StringIO())
    (tmp_path / "two" / "wandb-run-id.txt").write_text("../../else where")
    logged_run(tmp_path / "two", 0, range(1), StringIO())
    ids = [run.given["id"] for run in module.runs]
    assert len(set(ids)) == 3 and all(found.isalnum() for found in ids)


def test_a_finished_run_is_not_opened_again_and_a_late_score_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = installed(monkeypatch, FakeModule())
    logged_run(tmp_path, 9, range(0), StringIO())
    assert module.runs == []
    logged_run(tmp_path, 9, range(9, 10), StringIO())
    assert module.runs[0].logged == [{"step": 9, "loss": 9.0}]


def test_pictures_go_there_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = installed(monkeypatch, FakeModule())
    with RunLog(tmp_path, 9, 0, Console(file=StringIO()), track="wandb") as log:
        log.picture("views", 0, np.zeros((4, 6, 3), np.uint8))
    assert module.runs[0].logged == [{"step": 0, "views": ("image", (4, 6, 3))}]


def test_a_service_that_does_not_answer_leaves_the_numbers_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, output = installed(monkeypatch, FakeModule(unreachable=True)), StringIO()
    logged_run(tmp_path, 0, range(1, 3), output)
    (run,) = module.runs
    assert run.given["mode"] == "offline" and [line["step"] for line in run.logged] == [1, 2]
    assert run.given["settings"]["init_timeout"] == tracking.PATIENCE  # and not for ever
    assert "does not answer (Failed to get resume status: connection refused)" in output.getvalue()
    assert "wandb sync" in output.getvalue() and "wandb sync" in (tmp_path / "run.log").read_text()


def test_a_service_that_breaks_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, output = installed(monkeypatch, FakeModule()), StringIO()
    with RunLog(tmp_path, 9, 0, Console(file=output, width=400), track="wandb") as log:
        log.record(1, {"loss": 1.0})
        module.runs[0].broken = True
        log.record(2, {"loss": 2.0})
        log.record(3, {"loss": 3.0})
    assert output.getvalue().count("Weights & Biases failed (broken pipe)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_missing_package_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package wandb, which is not installed: pip install wandb"):
        tracking.check("wandb")
    tracking.check("tensorboard")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb (pip install nearfar[wandb])")
def test_the_package_itself_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        with RunLog(tmp_path, 9, start, Console(file=StringIO()), track="wandb") as log:
            log.settings({"optim": {"lr": 0.1}})
            log.picture("views", 0, np.zeros((4, 6, 3), np.uint8))
            log.record(start + 1, {"loss": 2.5})
    run_id = (tmp_path / "wandb-run-id.txt").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
