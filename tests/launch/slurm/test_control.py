"""Status from the queue and the run folder together; what `nearfar launch` refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.launch import cli
from nearfar.launch.slurm import checks, control, queue, records, status, submission
from nearfar.launch.slurm.queue import QueueEntry
from nearfar.launch.slurm.records import AttemptEnd, Ending, Job
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import config
from nearfar.ssl.errors import UserError

JOB = Job(job="5", kind="train", name="mine", submission=Path("h"), config=Path("c"))
FINISHED, FAILED = Ending(state="finished", job="5"), Ending(state="failed", job="5", why="planted")


@pytest.mark.parametrize(
    ("job", "entry", "ending", "state", "why"),
    [
        (JOB, QueueEntry("RUNNING", "mine"), None, "running", ""),
        (JOB, QueueEntry("PENDING", "mine", reason="Resources"), None, "pending", "Resources"),
        # a result of an attempt before means nothing while the job may run again
        (JOB, QueueEntry("PENDING", "mine", reason="BeginTime"), FINISHED, "pending", "BeginTime"),
        (JOB, QueueEntry("COMPLETED", "mine"), FINISHED, "finished", ""),
        (JOB, QueueEntry("FAILED", "mine"), FAILED, "failed", "planted"),
        (JOB, QueueEntry("TIMEOUT", "mine"), None, "timeout", "its time limit ended it before it could save"),
        (JOB, QueueEntry("OUT_OF_MEMORY", "mine"), None, "out_of_memory", "it ran out of memory (--mem-gb)"),
        (JOB, None, FINISHED, "finished", ""),
        (JOB, None, None, "unknown", "SLURM has forgotten the job"),
        (JOB, QueueEntry("RUNNING", "another's"), FINISHED, "finished", ""),
        (JOB, QueueEntry("COMPLETED", ""), None, "completed", "it left no record of why"),
        (JOB, None, Ending(state="finished", job="4"), "unknown", "SLURM has forgotten"),
        (JOB.model_copy(update={"cancelled": True}), QueueEntry("COMPLETING", "mine"), None, "completing", ""),
        (JOB.model_copy(update={"cancelled": True}), QueueEntry("CANCELLED", "mine"), None, "cancelled", ""),
        (JOB.model_copy(update={"cancelled": True}), None, FINISHED, "finished", ""),
        (None, None, FINISHED, "finished", ""),
        (None, None, None, "not submitted", ""),
    ],
)
def test_state(job: Job | None, entry: QueueEntry | None, ending: Ending | None, state: str, why: str) -> None:
    found = status.combined(job, entry, ending, None, "")
    assert found[0] == state and found[1].startswith(why) and bool(found[1]) == bool(why)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was submitted, of which SLURM knows what `queue` says; no SLURM is asked."""
    run = tmp_path / "runs" / "mine"
    home = run / "cluster" / "now"
    with records.locked(run):
        records.record_jobs(run, JOB.model_copy(update={"submission": home, "config": home / "mine.yaml"}))
    (run / "metrics.jsonl").write_text('{"step": 20, "epoch": 2, "loss": 3.25, "time": 1}\n{"step": 21}\n')
    (run / "config.yaml").write_text(config.to_yaml(config.load(None, ["name=mine", "train.epochs=10"])))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(queue, "entries", lambda ids: {"5": QueueEntry("RUNNING", "mine", "node1")})
    return run


def test_status_of_one_and_of_several(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with records.locked(run):
        records.begin_attempt(run, "5", 0, 3)
        records.begin_attempt(run, "5", 1, 3)
    assert cli.main(["launch", "status", str(run)]) == 0
    output = capsys.readouterr().out
    for line in (
        "state       running",
        "attempts    2, 42 steps done again",
        "step        20 of 100",
        "loss        3.25",
    ):
        assert line in output
    assert str(run / "cluster" / "now" / "log" / "5_0_log.out") in output
    other = run.parent / "other"
    with records.locked(other):
        records.record_jobs(other, JOB.model_copy(update={"job": "6"}))
    records.write_ending(other, "train", Ending(state="failed", job="6", why="planted"))
    assert cli.main(["launch", "status", str(run.parent)]) == 0
    output = capsys.readouterr().out
    assert "running" in output and "20/100" in output and "failed" in output and "planted" in output


def test_logs(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["launch", "logs", str(run)]) == 2
    assert "has written no log yet" in capsys.readouterr().err
    log = run / "cluster" / "now" / "log" / "5_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    looks = iter([True, True, False])

    def entries(ids: object) -> dict[str, QueueEntry]:
        """The job says something more and then ends, between two looks at the queue."""
        if going := next(looks):
            with log.open("a") as handle:
                handle.write("more\n")
        return {"5": QueueEntry("RUNNING" if going else "COMPLETED", "mine")}

    monkeypatch.setattr(queue, "entries", entries)
    monkeypatch.setattr(control, "POLL", 0.0)
    assert cli.main(["launch", "logs", str(run), "-f"]) == 0
    assert capsys.readouterr().out == "one\nmore\nmore\n"


def test_a_followed_log_ends_with_its_reader(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nearfar launch logs -f RUN | head`, of a job that runs on and writes nothing more."""
    log = run / "cluster" / "now" / "log" / "5_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    reader, writer = os.pipe()
    looks: list[object] = []

    def entries(ids: object) -> dict[str, QueueEntry]:
        looks.append(ids)
        if len(looks) == 3:
            os.close(reader)
        assert len(looks) < 9
        return {"5": QueueEntry("RUNNING", "mine")}

    monkeypatch.setattr(queue, "entries", entries)
    monkeypatch.setattr(control, "POLL", 0.0)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        control.logs(run, follow=True)
    assert len(looks) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "nowhere"], "There is no run folder nowhere"),
        (["status", "."], "Nothing in . was submitted"),
        (["logs", "empty"], "Nothing in empty was submitted"),
    ],
)
def test_folders_without_jobs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["launch", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.path=none", "--cpu"], "data.path="),
        (["data.path=''", "--cpu"], "data.path is not set"),
        (["train.device=cuda", "--cpu"], "contradict"),
        (["train.device=cpu", "--gpus-per-node", "2"], "contradict"),
        (
            ["train.batch_size=10", "--cpu", "--tasks-per-node", "4"],
            "split evenly over 4 processes (1 nodes x 4)",
        ),
        (["--cpu", "--then", "eval=knn"], "set data.val="),
        (["--cpu", "--then", "knn"], "--then knn: write eval="),
        (["--cpu", "--then", "eval=color"], "any of knn, whitened, linear, logistic, fewshot, segment"),
        (["--cpu", "--parallel", "2"], "--parallel is the number of runs of a --sweep"),
        (["--nodes", "2"], "Say --gpus-per-node 8"),
        (["--cpu", "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "mine.yaml", *words, "--cluster", "slurm", "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_dry_run_prints_scripts_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings may stand on either side of the flags."""
    words = ["train.epochs=3", "--nodes", "2", "--gpus-per-node", "8", "data.val=pictures", "--then", "eval=knn"]
    before = sorted(here.rglob("*"))
    assert cli.main(["launch", "mine.yaml", *words, "--cluster", "slurm", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "2 x 8 processes" in output and "4 images a step each" in output
    assert output.count("#!/bin/bash") == 2 and "--dependency=afterok:JOB" in output and "USR2@300" in output
    assert f"{here}/runs/mine/cluster/STAMP/log" in output
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


def test_local_dry_run_trains_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    words = ["--cpu", "--tasks-per-node", "2", "train.epochs=3", "--dry-run", "--cluster"]
    for cluster in ("local", "debug"):
        assert cli.main(["launch", "mine.yaml", *words, cluster]) == 0
        output = capsys.readouterr().out
        assert "runs/mine: pretrain on pictures, cpu, 2 processes (as set), 3 epochs" in output
        assert "Nothing was started" in output
    assert sorted(here.rglob("*")) == before


SUBMIT = ["launch", "mine.yaml", "--cpu", "--cluster", "slurm"]


@pytest.mark.parametrize("sbatch", [0], indirect=True)
def test_a_refused_submission_leaves_no_folder(here: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(SUBMIT) == 2
    assert "SLURM refused the job" in capsys.readouterr().err
    assert cli.main([*SUBMIT, "--sweep", "optim.lr=1e-3,2e-3"]) == 2
    assert not list((here / "runs").glob("*"))


@pytest.mark.parametrize("sbatch", [1], indirect=True)
def test_a_refused_evaluation_leaves_the_training_and_says_both(
    here: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SUBMIT, "data.val=pictures", "--then", "eval=knn"]) == 2
    output = capsys.readouterr()
    assert "job 1: mine" in output.out
    assert "The training was accepted as job 1" in output.err and "its evaluation was refused" in output.err
    (found,) = status.statuses([here / "runs" / "mine"])
    assert found.job is not None and found.job.job == "1" and found.evaluation == "failed" and "planted" in found.why


@pytest.mark.parametrize("sbatch", [9], indirect=True)
def test_resubmit_keeps_what_each_submission_asked_for(
    here: Path, sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["--sweep", "optim.lr=1e-3,2e-3", "--parallel", "1", "data.val=pictures", "--then", "eval=knn"]
    assert cli.main([*SUBMIT, "folder=runs/a", *sweep, "--nodes", "2", "--hours", "3", "--tries", "7"]) == 0
    assert cli.main([*SUBMIT, "folder=runs/a", "name=single", "--hours", "5"]) == 0
    (single,) = (here / "runs" / "a" / "single" / "cluster").glob("2*")
    (single / "code" / "of its own").touch()
    assert cli.main(["launch", "resubmit", "runs/a"]) == 0
    first, scores, last = (Path(f"{sbatch}.{number}").read_text() for number in (4, 5, 6))
    if "--array" not in first:  # which submission comes first does not matter
        first, scores, last = (Path(f"{sbatch}.{number}").read_text() for number in (5, 6, 4))
    for line in ("--nodes=2", "--time=180", "--array=0-1%1"):
        assert line in first
    assert "aftercorr" in scores and "--array=0-1%1" in scores
    assert "--nodes=1" in last and "--time=300" in last and "--array" not in last
    newest = max((here / "runs" / "a" / "single" / "cluster").glob("2*"))
    assert (newest / "code" / "of its own").exists()
    assert len(sbatch.read_text().splitlines()) == 6


def test_settings_behind_sweep_are_no_sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cpu", "--dry-run", "--sweep", "optim.lr=1e-3,1e-4", "train.epochs=3", "views.ratio=[0.7, 1.4]"]
    assert cli.main(["launch", "mine.yaml", "--cluster", "local", *words]) == 0
    output = capsys.readouterr().out
    assert output.count("3 epochs") == 2 and "runs/mine/lr=1e-3: " in output and "runs/mine/lr=1e-4: " in output


def test_what_a_fork_leaves_is_named_by_an_absolute_path(here: Path) -> None:
    (here / "runs" / "old" / "checkpoints" / "step-000000010").mkdir(parents=True)
    run = config.load(None, ["name=mine", "data.path=pictures", "train.start_from=runs/old@10"])
    placed = submission.for_cluster(checks.placed(run, Resources(cpu=True)), Resources(cpu=True))
    assert placed.train.start_from == str(here / "runs" / "old@10") and placed.train.device == "cpu"
    missing = run.model_copy(update={"train": run.train.model_copy(update={"start_from": "runs/old@20"})})
    with pytest.raises(UserError, match="has no checkpoint of step 20"):
        checks.placed(missing, Resources(cpu=True))


def test_weights_are_named_by_an_absolute_path(here: Path) -> None:
    (here / "dino.pth").touch()
    run = config.load(None, ["name=mine", "data.path=pictures", "backbone.weights=dino.pth"])
    placed = submission.for_cluster(checks.placed(run, Resources(cpu=True)), Resources(cpu=True))
    assert placed.backbone.weights == str(here / "dino.pth") and placed.data.path == str(here / "pictures")
    missing = run.model_copy(update={"backbone": run.backbone.model_copy(update={"weights": "none.pth"})})
    with pytest.raises(UserError, match=r"backbone\.weights=.*none\.pth does not exist"):
        checks.placed(missing, Resources(cpu=True))


def test_logs_end_with_the_rank_that_knows_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = run / "cluster" / "now" / "log"
    logs.mkdir(parents=True)
    (logs / "5_0_log.out").write_text("waiting\n")
    (logs / "5_3_log.out").write_text("first\n" + "line\n" * 100 + "KeyError: planted\n")
    records.write_ending(run, "train", Ending(state="failed", job="5", rank=3, why="rank 3: KeyError: planted"))
    assert cli.main(["launch", "logs", str(run)]) == 0
    output = capsys.readouterr().out
    assert (
        output.startswith("waiting\n\n== rank 3") and output.endswith("KeyError: planted\n") and "first" not in output
    )


def test_why_comes_from_the_record_of_the_attempt(run: Path) -> None:
    with records.locked(run):
        records.begin_attempt(run, "5", 0, 3)
        records.end_attempt(run, AttemptEnd(job="5", restart=0, why="rank 1 on node2 was killed", infrastructure=True))
    begun, over = records.attempts(run), records.attempt_ends(run)
    job = records.latest_job(run, "train")
    last = status.last_end(job, begun, over)
    assert status.combined(job, QueueEntry("FAILED", "mine"), None, last, "")[1] == "rank 1 on node2 was killed"
    records.begin_attempt(run, "5", 1, 3)  # the next attempt goes on: the word is no longer about the present
    assert status.last_end(job, records.attempts(run), records.attempt_ends(run)) is None


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 runs of a sweep with long names."""
    queued = {}
    for k in range(64):
        run = tmp_path / "runs" / "sweep" / f"lr={k}e-4_teacher_momentum=0.99_drop_path=0.1"
        with records.locked(run):
            home = run.parent / "cluster" / "now"
            records.record_jobs(run, Job(job=f"9_{k}", kind="train", name="sweep", submission=home, config=home / "c"))
            records.begin_attempt(run, f"9_{k}", 0, 3)
        (run / "metrics.jsonl").write_text('{"step": 20000, "epoch": 2, "loss": 10.25, "time": 1}\n' * 100)
        (run / "config.yaml").write_text(config.to_yaml(config.load(None, ["name=mine", "train.epochs=100"])))
        state = QueueEntry("RUNNING", "sweep", f"gpu-node-[{k}-{k + 1}]", "", 3600.0 * k)
        queued[f"9_{k}"] = state if k % 2 else QueueEntry("PENDING", "sweep", "", "Resources")
    monkeypatch.setattr(queue, "entries", lambda ids: {number: queued[number] for number in ids})
    return tmp_path / "runs" / "sweep"


def test_64_runs_are_readable_at_80_columns(
    many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["launch", "status", str(many)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["run", "state", "step", "loss", "last", "left", "nodes"]
    assert "20000/1000000" in lines[1] and lines[-1] == "64 runs: 32 pending, 32 running"
    assert any("gpu-node-[1-2]" in line and " 1h00m " in line for line in lines)


def test_status_for_programs(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "status", str(many), "--json"]) == 0
    found = {entry["job"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert len(found) == 64
    one = found["9_1"]
    assert (one["state"], one["step"], one["steps"], one["seconds_left"]) == ("running", 20000, 1000000, 3600.0)
    assert (
        one["nodes"] == "gpu-node-[1-2]" and one["seconds_since_last_step"] > 0 and found["9_2"]["why"] == "Resources"
    )


def test_status_imports_no_torch() -> None:
    code = "import sys, nearfar.launch.slurm.cli, nearfar.launch.slurm.control, nearfar.launch.slurm.status; "
    code += "print([name for name in ('torch', 'timm', 'submitit', 'numpy') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
