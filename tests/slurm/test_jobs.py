"""What users do with jobs on a cluster: several processes a node, evaluation afterwards, cancel, sweeps, mistakes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.launch import cli
from nearfar.launch.slurm import control, queue, records
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.disk.metrics import read_metrics

Launch = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.long
def test_two_by_two_ranks_agree_with_one_process(
    cluster: Any, launch: Launch, reference: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """To 1e-4 of the loss in every step, in float32; without drop-path, of which every rank draws its own.

    A signal while Python starts, which would end a process without handlers, does nothing.
    """
    plain = "backbone.drop_path=0"
    words = ("--nodes", "2", "--tasks-per-node", "2", plain)
    run = launch(*words, name="two by two", runs="a folder, with spaces", pace=0.1)
    run.wait("its start", lambda status: status.state == "running")
    subprocess.run(["scancel", "--signal=USR2", run.job], check=True)  # while Python starts: heard by nobody
    run.reach(3)
    with pytest.raises(AssertionError):  # the same run twice
        launch(*words, name="two by two", runs="a folder, with spaces")
    assert f"already has job {run.job} (train, RUNNING) in the queue" in " ".join(capsys.readouterr().err.split())
    assert len(run.finish().attempts) == 1
    assert losses(run.run) == pytest.approx(losses(reference(1, plain)), rel=1e-4)


@pytest.mark.long
def test_evaluation_waits_through_a_requeue(
    cluster: Any, launch: Launch, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(f"data.val={others}", "--then", "eval=knn,linear", name="scored", pace=0.1)
    scoring = records.latest_job(run.run, "eval")
    assert scoring is not None
    run.reach(3)
    (lost, _) = run.interrupted(lambda: subprocess.run(["scancel", "--signal=USR2", run.job], check=True))
    assert lost == 0
    assert queue.entries([scoring.job])[scoring.job].reason.startswith("Dependency")
    assert run.status.evaluation == "pending"
    run.finish()
    assert run.wait("scores", lambda status: status.evaluation == "finished").state == "finished"
    assert {"knn", "linear"} == {
        score["task"] for score in json.loads((run.run / "results.json").read_text())["scores"]
    }
    assert (run.run / "report.html").exists()
    capsys.readouterr()
    assert cli.main(["launch", "logs", str(run.run), "-f"]) == 0
    output = capsys.readouterr().out
    assert "goes back to the queue" in output and "Continuing from step" in output
    assert cli.main(["launch", "status", str(run.run)]) == 0
    output = capsys.readouterr().out
    assert "state       finished" in output and "attempts    2" in output and "step        60 of 60" in output


@pytest.mark.long
def test_finetuning_is_requeued_and_scored_like_pretraining(
    cluster: Any, launch: Launch, reference: Callable[..., Path], same: Callable[..., None], others: Path
) -> None:
    """Two ranks, a SIGUSR2, an evaluation that waits: the bits and the score of the run that nobody disturbed."""
    words = ("--nodes", "2", f"data.val={others}", "--then", "eval=knn")
    run = launch(*words, name="classes", pace=0.1, verb="finetune")
    run.reach(3)
    (lost, _) = run.interrupted(lambda: subprocess.run(["scancel", "--signal=USR2", run.job], check=True))
    assert lost == 0 and run.status.job.verb == "finetune"
    run.finish()
    assert run.wait("scores", lambda status: status.evaluation == "finished").state == "finished"
    undisturbed = reference(2, f"data.val={others}", verb="finetune")
    same(run.run, undisturbed)

    def score(folder: Path, task: str) -> float:
        scores = json.loads((folder / "results.json").read_text())["scores"]
        return float(next(each["percent"] for each in scores if each["task"] == task))

    assert score(run.run, "finetune") == score(undisturbed, "finetune")
    assert score(run.run, "knn") > 0 and (run.run / "report.html").exists()


def test_a_run_whose_code_raises_fails_once_and_says_why(
    cluster: Any, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = "import os\nif step == 4 and os.environ['SLURM_PROCID'] == '1': raise KeyError('planted')"
    run = launch("--nodes", "1", "--tasks-per-node", "2", name="raises", code=planted)
    status = run.wait("failure", lambda status: status.state == "failed")
    assert "rank 1" in status.why and "KeyError: 'planted'" in status.why
    assert len(status.attempts) == 1
    assert queue.entries([run.job])[run.job].state == "FAILED"
    assert cli.main(["launch", "status", str(run.run)]) == 0
    assert "planted" in capsys.readouterr().out


def test_cancel_ends_a_run_for_good_and_resubmit_continues_it(
    cluster: Any, launch: Launch, reference: Callable[[int], Path], same: Callable[..., None]
) -> None:
    run = launch("--nodes", "1", name="cancelled", pace=0.1)
    run.reach(3)
    first = run.job
    assert cli.main(["launch", "cancel", str(run.run)]) == 0
    status = run.wait("its end", lambda status: status.state == "cancelled")
    assert queue.entries([first])[first].state == "CANCELLED"
    assert len(status.attempts) == 1 and records.saved_step(run.run) >= 3, "TERM saves before KILL comes"
    assert cli.main(["launch", "cancel", str(run.run)]) == 2

    assert cli.main(["launch", "resubmit", str(run.run), "--hours", "2"]) == 0
    assert run.job != first
    run.finish()
    same(run.run, reference(1))


@pytest.mark.long
def test_a_sweep_is_an_array_of_which_one_element_requeues_alone(
    cluster: Any, launch: Launch, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = launch(
        f"data.val={others}", "--sweep", "optim.lr=1e-3,2e-3", "--parallel", "2", "--then", "eval=knn",
        name="sweep", pace=0.1,
    )  # fmt: skip
    one, two = (type(sweep)(run) for run in control.run_folders(sweep.run))
    assert [each.run.name for each in (one, two)] == ["lr=1e-3", "lr=2e-3"]
    array, _, _ = one.job.partition("_")
    assert [one.job, two.job] == [f"{array}_0", f"{array}_1"]
    two.reach(3)
    two.interrupted(lambda: subprocess.run(["scancel", "--signal=USR2", two.job], check=True))
    for each, attempts in ((one, 1), (two, 2)):
        assert len(each.finish().attempts) == attempts
        each.wait("scores", lambda status: status.evaluation == "finished")
    assert losses(one.run)[-1] != losses(two.run)[-1]
    capsys.readouterr()
    assert cli.main(["launch", "status", str(sweep.run)]) == 0
    assert "2 runs: 2 finished; evaluations: 2 finished" in capsys.readouterr().out
    assert cli.main(["report", str(sweep.run)]) == 0
    output = capsys.readouterr().out
    assert "lr" in output and "k-NN" in output and (sweep.run / "report.html").exists()


def test_what_squeue_forgot_sacct_still_knows(accounting_cluster: Any, tmp_path: Path) -> None:
    for script in ("true", "exit 3"):
        submit = ["sbatch", "--wait", "-J", "accounted", "-o", "/dev/null", "--wrap", script]
        subprocess.run(submit, cwd=tmp_path, check=False, capture_output=True, timeout=60)
    for _ in range(200):  # accounts are written every few seconds
        found = queue._accounted(["1", "2", "3"])
        if {seen.state for seen in found.values()} == {"COMPLETED", "FAILED"}:
            break
    assert found["1"].state == "COMPLETED" and found["2"].state == "FAILED" and found["1"].nodes == "node1"
    assert "3" not in found


@pytest.mark.long
def test_the_tasks_of_a_step_share_an_extraction_which_one_process_scores(
    cluster: Any, pictures: Path, others: Path, tmp_path: Path
) -> None:
    """What docs/cluster.md says to do where one GPU is too slow: the features of both data sets by two tasks of srun,
    to the bits of one process, and scores from them.
    """
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    run = config.load(None, ["name=r", "views.global_crops_size=32", "views.local_crops_size=16", "eval.size=32"])
    network = create("vit_tiny_patch8", img_size=32, embed_dim=64, depth=1, num_heads=2)
    checkpoint.export(weights, network, {"run": run.model_dump(mode="json"), "step": 1})
    nearfar = [sys.executable, "-m", "nearfar.launch.cli"]
    features = [*nearfar, "features", str(weights), "--device", "cpu", "--workers", "0"]
    # The made-up nodes have names that lead nowhere.
    meeting = ["env", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    tasks = ["srun", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", *meeting, *features]
    for command, images, store in ((tasks, pictures, "train"), (tasks, others, "val"), (features, pictures, "alone")):
        subprocess.run([*command, str(images), str(tmp_path / store)], check=True, timeout=60)
    shared, alone = (np.load(tmp_path / store / "features.npy") for store in ("train", "alone"))
    assert shared.shape == (40, 64) and np.array_equal(shared, alone)
    scored = [*nearfar, "eval", "knn", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    subprocess.run([*scored, "--out", str(tmp_path / "results.json")], check=True, timeout=300)
    (score,) = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert score["task"] == "knn" and 0 <= score["percent"] <= 100
