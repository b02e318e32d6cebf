"""Status from the queue and the run folder together; what `nearfar launch` refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nearfar.launch import cli
from nearfar.launch.slurm import control, queue, records
from nearfar.launch.slurm.queue import Seen
from nearfar.launch.slurm.records import Done, Job
from nearfar.ssl import config

JOB = Job(job="5", kind="train", name="mine", home=Path("h"), config=Path("c"))
FINISHED, FAILED = Done(state="finished", job="5"), Done(state="failed", job="5", why="planted")


@pytest.mark.parametrize(
    ("job", "seen", "done", "state", "why"),
    [
        (JOB, Seen("RUNNING", "mine"), None, "running", ""),
        (JOB, Seen("PENDING", "mine", reason="Resources"), None, "pending", "Resources"),
        # a result of an attempt before means nothing while the job may run again
        (JOB, Seen("PENDING", "mine", reason="BeginTime"), FINISHED, "pending", "BeginTime"),
        (JOB, Seen("COMPLETED", "mine"), FINISHED, "finished", ""),
        (JOB, Seen("FAILED", "mine"), FAILED, "failed", "planted"),
        (JOB, Seen("TIMEOUT", "mine"), None, "timeout", "it ended without a word: see the log"),
        (JOB, None, FINISHED, "finished", ""),
        (JOB, None, None, "unknown", "SLURM has forgotten the job"),
        (JOB, Seen("RUNNING", "another's"), FINISHED, "finished", ""),
        (JOB, Seen("COMPLETED", ""), None, "completed", "it ended without a word"),
        (JOB, None, Done(state="finished", job="4"), "unknown", "SLURM has forgotten"),
        (JOB.model_copy(update={"cancelled": True}), Seen("COMPLETING", "mine"), None, "completing", ""),
        (JOB.model_copy(update={"cancelled": True}), Seen("CANCELLED", "mine"), None, "cancelled", ""),
        (JOB.model_copy(update={"cancelled": True}), None, FINISHED, "finished", ""),
        (None, None, FINISHED, "finished", ""),
        (None, None, None, "not submitted", ""),
    ],
)
def test_state(job: Job | None, seen: Seen | None, done: Done | None, state: str, why: str) -> None:
    found = control.combined(job, seen, done, "")
    assert found[0] == state and found[1].startswith(why) and bool(found[1]) == bool(why)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was submitted, of which SLURM knows what `queue` says; no SLURM is asked."""
    run = tmp_path / "runs" / "mine"
    home = run / "cluster" / "now"
    with records.locked(run):
        records.record(run, JOB.model_copy(update={"home": home, "config": home / "mine.yaml"}))
    (run / "metrics.jsonl").write_text('{"step": 20, "epoch": 2, "loss": 3.25, "time": 1}\n{"step": 21}\n')
    (run / "config.yaml").write_text(config.to_yaml(config.load(None, ["name=mine", "train.epochs=10"])))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(queue, "look", lambda ids: {"5": Seen("RUNNING", "mine", "node1")})
    return run


def test_status_of_one_and_of_several(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with records.locked(run):
        records.begin(run, "5", 0, 3)
        records.begin(run, "5", 1, 3)
    assert cli.main(["launch", "status", str(run)]) == 0
    said = capsys.readouterr().out
    for line in (
        "state       running",
        "attempts    2, 42 steps done again",
        "step        20 of 100",
        "loss        3.25",
    ):
        assert line in said
    assert str(run / "cluster" / "now" / "log" / "5_0_log.out") in said
    other = run.parent / "other"
    with records.locked(other):
        records.record(other, JOB.model_copy(update={"job": "6"}))
    records.settle(other, "train", Done(state="failed", job="6", why="planted"))
    assert cli.main(["launch", "status", str(run.parent)]) == 0
    said = capsys.readouterr().out
    assert "running" in said and "20/100" in said and "failed" in said and "planted" in said


def test_logs(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["launch", "logs", str(run)]) == 2
    assert "has not said anything yet" in capsys.readouterr().err
    log = run / "cluster" / "now" / "log" / "5_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    looks = iter([True, True, False])

    def look(ids: object) -> dict[str, Seen]:
        """The job says something more and then ends, between two looks at the queue."""
        if going := next(looks):
            with log.open("a") as handle:
                handle.write("more\n")
        return {"5": Seen("RUNNING" if going else "COMPLETED", "mine")}

    monkeypatch.setattr(queue, "look", look)
    monkeypatch.setattr(control, "POLL", 0.0)
    assert cli.main(["launch", "logs", str(run), "-f"]) == 0
    assert capsys.readouterr().out == "one\nmore\nmore\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["status", "nowhere"], "There is no run folder nowhere"),
        (["status", "."], "Nothing in . was submitted"),
        (["logs", "empty"], "Nothing in empty was submitted"),
    ],
)
def test_folders_without_jobs(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["launch", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"path": "pictures"}}))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.path=none", "--cpu"], "data.path="),
        (["data.path=''", "--cpu"], "data.path is not set"),
        (["train.device=cuda", "--cpu"], "contradict"),
        (["train.device=cpu", "--gpus-per-node", "2"], "contradict"),
        (["train.batch_size=10", "--cpu", "--tasks-per-node", "4"], "does not divide into 4 processes (1 nodes x 4)"),
        (["--cpu", "--then", "eval=knn"], "set data.val="),
        (["--cpu", "--then", "knn"], "--then knn: write eval="),
        (["--cpu", "--then", "eval=color"], "any of knn, linear, segment"),
        (["--cpu", "--parallel", "2"], "--parallel is the number of runs of a --sweep"),
        (["--nodes", "2"], "say --gpus-per-node N, or --cpu"),
        (["--cpu", "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    here: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "mine.yaml", *words, "--cluster", "slurm", "--dry-run"]) == 2
    assert told in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_dry_run_prints_scripts_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings may stand on either side of the flags."""
    words = ["train.epochs=3", "--nodes", "2", "--gpus-per-node", "8", "data.val=pictures", "--then", "eval=knn"]
    before = sorted(here.rglob("*"))
    assert cli.main(["launch", "mine.yaml", *words, "--cluster", "slurm", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 x 8 processes" in said and "4 images a step each" in said
    assert said.count("#!/bin/bash") == 2 and "--dependency=afterok:JOB" in said and "USR2@300" in said
    assert f"{here}/runs/mine/cluster/STAMP/log" in said
    sweep = ["--cpu", "--sweep", "optim.lr=1e-3,1e-4", "--parallel", "1", "--dry-run"]
    assert cli.main(["launch", "mine.yaml", *sweep]) == 0
    assert "--array=0-1%1" in capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


def test_a_cluster_that_is_none(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert cli.main(["launch", "mine.yaml", "--cpu", "--cluster", "slurm"]) == 2
    assert "SLURM is not installed on this machine" in capsys.readouterr().err


def test_help_of_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["status"], ["cancel"], ["logs"], ["resubmit"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["launch", *words, "--help"])
        assert caught.value.code == 0 and "usage: nearfar launch" in capsys.readouterr().out
