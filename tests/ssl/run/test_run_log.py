"""What a run says: on a narrow terminal, in run.log, and for TensorBoard."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nearfar.ssl.errors import UserError
from nearfar.ssl.run import run_log
from nearfar.ssl.run.run_log import RunLog

NUMBERS = "loss 3.123  1234 img/s  waits 12 %  entropy 0.99"


def test_a_terminal_of_80_columns_keeps_the_time_left_and_the_log_the_losses(tmp_path: Path) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with RunLog(tmp_path, 200_000, 0, console, every=0.0) as log:
        for step in range(1, 5):
            log.progress(step, NUMBERS)
    last = [part for part in re.split(r"[\r\n]|\x1b\[[0-9;?]*[a-zA-Z]", screen.getvalue()) if "loss" in part][-1]
    assert len(last) <= 80 and "4/200000" in last and "loss 3.123" in last
    assert re.search(r"(\d+:\d\d:\d\d|-:--:--) left", last)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 4 and all(NUMBERS in line for line in lines)
    assert "step 1/200000" not in screen.getvalue()  # the bar says it


def test_without_a_terminal_the_same_lines_are_printed(tmp_path: Path) -> None:
    output = StringIO()
    with RunLog(tmp_path, 9, 0, Console(file=output, width=80), every=100.0) as log:
        for step in range(1, 10):
            log.progress(step, NUMBERS)
    assert [line.split()[1] for line in output.getvalue().splitlines()] == ["1/9", "9/9"]


def test_a_finished_run_makes_a_file_for_tensorboard_only_for_a_score(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, 9, Console(file=StringIO())) as log:
        log.settings({"name": "r"})
    assert not list(tmp_path.glob("events*"))
    with RunLog(tmp_path, 9, 9, Console(file=StringIO())) as log:
        log.record(9, {"knn_top1": 50.0})
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("knn_top1")[0].value == 50.0


def test_the_end_is_told_from_the_speed_after_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten first steps in 1000 s, in which the run is also compiled, and then a step a second."""
    clock = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_log.time, "time", lambda: 1_000_000_000.0)
    monkeypatch.setattr(run_log.time, "localtime", lambda seconds: run_log.time.gmtime(seconds))
    output = StringIO()
    with RunLog(tmp_path, 4000, 0, Console(file=output, width=200)) as log:
        for step, now in ((10, 1000.0), (20, 1010.0), (3970, 4960.0)):
            clock[0] = now
            log.progress(step, NUMBERS)
    first, second, last = output.getvalue().splitlines()
    assert first.endswith("110:50:00 left, ends about 2001-09-13 16:36")
    assert second.endswith("1:06:20 left, ends about 02:53")
    assert last.endswith("  0:30 left")


def test_tensorboard_gets_numbers_pictures_and_settings(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, 0, Console(file=StringIO())) as log:
        log.settings({"name": "r", "optim": {"lr": 0.1, "betas": [1, 2]}, "loss": {"koleo_weight": None}})
        log.picture("views", 0, np.zeros((4, 6, 3), np.uint8))
        log.record(3, {"loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 2.5}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["views"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in plugin and b"[1, 2]" in plugin


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.log").mkdir()
    with pytest.raises(UserError, match="log of the run cannot be written"):
        RunLog(tmp_path, 9, 0, Console(file=StringIO()))
