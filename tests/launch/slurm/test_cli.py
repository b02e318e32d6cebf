"""`nearfar launch VERB`: what each verb that trains becomes as a job, and what is refused before it is in a queue."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nearfar.launch import cli, finetune
from nearfar.launch.slurm import job, queue, records
from nearfar.launch.slurm.job_process import JobProcess
from nearfar.launch.slurm.queue import QueueEntry
from nearfar.launch.slurm.records import SubmissionRecord
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.finetune_settings import FinetuneRun, recorded_in
from nearfar.ssl.settings.run import Run

CLASSIFIER = {
    "augment": {"size": 16, "scale": [0.6, 1.0]},
    "backbone": {"name": "vit_tiny_patch8", "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path": 0.1},
    "classifier": {"mixup": 0.8},
    "train": {"epochs": 2, "batch_size": 8, "device": "cpu", "precision": "fp32", "threads": 1, "log_every_steps": 1},
    "eval": {"size": 16, "resize": 16, "every_epochs": 0},
    "data": {"workers": 0},
}


@pytest.fixture
def labeled(here: Path) -> Path:
    """classes.yaml, a recipe of `nearfar finetune`, and pictures/ with two classes of 20 images: 5 steps an epoch.
    others/ has as many to be scored on."""
    rng = np.random.default_rng(0)
    for k in range(80):
        file = here / ("pictures", "others")[k // 40] / ("cat", "dog")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file)
    (here / "classes.yaml").write_text(yaml.safe_dump(CLASSIFIER))
    return here


WORDS = ["launch", "finetune", "classes.yaml", "data.path=pictures", "data.val=others", "--cpu"]


def test_a_job_of_finetuning_trains_scores_and_reports(labeled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--cluster", "debug", "--then", "eval=knn"]) == 0
    run = labeled / "runs" / "classes"
    done = records.read_ending(run)
    assert done is not None and (done.state, done.step, done.steps) == ("finished", 10, 10)
    scores = {score["task"]: score for score in json.loads((run / "results.json").read_text())["scores"]}
    assert set(scores) == {"finetune", "knn"} and scores["finetune"]["step"] == 10
    assert checkpoint.load_classifier(run).classes == ["cat", "dog"]
    page = (run / "report.html").read_text()  # that of a classifier, after the evaluation too
    assert "Top-1 on data.val" in page and "Frozen features" in page and "k-NN top-1" in page


@pytest.mark.parametrize("sbatch", [9], indirect=True)
def test_the_job_says_which_verb_it_continues(
    labeled: Path, sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted, shown and submitted again."""
    weights = labeled / "start.safetensors"
    checkpoint.export(weights, create("vit_tiny_patch8", img_size=16, embed_dim=24, depth=2, num_heads=2), {"step": 1})
    assert cli.main([*WORDS, "--from", "start.safetensors", "--cluster", "slurm", "--then", "eval=knn"]) == 0
    run = labeled / "runs" / "classes"
    training, scoring = records.jobs(run)
    assert (training.kind, training.verb, scoring.kind, scoring.tasks) == ("train", "finetune", "eval", ["knn"])
    settings = recorded_in(training.config)
    assert isinstance(settings, FinetuneRun) and settings.classifier.mixup == 0.8
    assert (settings.backbone.weights, settings.backbone.embed_dim) == (str(weights), 24)
    assert (settings.data.path, settings.train.device) == (str(labeled / "pictures"), "cpu")
    assert "--dependency=afterok:1" in Path(f"{sbatch}.2").read_text()
    capsys.readouterr()
    monkeypatch.setattr(queue, "entries", lambda ids: {"1": QueueEntry("PENDING", "classes")})
    assert cli.main(["launch", "status", str(run)]) == 0
    assert "1 (classes), runs nearfar finetune" in capsys.readouterr().out
    monkeypatch.setattr(queue, "entries", lambda ids: {})
    assert cli.main(["launch", "resubmit", str(run), "--hours", "2"]) == 0
    again = records.latest_job(run, "train")
    assert again is not None and (again.job, again.verb) == ("3", "finetune") and again.config != training.config
    assert recorded_in(again.config) == settings and "--time=120" in Path(f"{sbatch}.3").read_text()


def a_submission(run: FinetuneRun, folder: Path) -> str:
    """Its settings as `nearfar launch` writes them; their file."""
    settings = folder / "settings" / f"{run.name}.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text(config.to_yaml(run))
    SubmissionRecord(resources=Resources(cpu=True), runs=[run.path]).write(folder)
    (run.path / "cluster").mkdir(parents=True)
    return str(settings)


def test_an_interrupted_job_goes_on_to_the_same_bits(
    labeled: Path, same_runs: Callable[[Path, Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["data.path=pictures", "data.val=others", "train.world_size=1"]
    assert cli.main(["finetune", "classes.yaml", *data, "folder=whole"]) == 0
    run = finetune_settings.load(Path("classes.yaml"), [*data, "folder=parts"])
    settings = a_submission(run, labeled / "submission")
    with monkeypatch.context() as patched:
        count = iter(range(99))
        patched.setattr(finetune.StopFlag, "__call__", lambda _: next(count) == 3)
        with pytest.raises(SystemExit):
            job.train_job(settings, str(run.path))
    stopped = records.read_ending(run.path)
    assert stopped is not None and stopped.state == "stopped" and 0 < stopped.step < 10
    job.train_job(settings, str(run.path))
    assert [attempt.step for attempt in records.attempts(run.path)] == [0, stopped.step]
    same_runs(run.path, Path("whole/classes"), 10)


def test_a_job_that_is_stopped_before_its_score_is_not_done(labeled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are there, and what a user waits for is not: the next attempt adds it."""
    run = finetune_settings.load(Path("classes.yaml"), ["data.path=pictures", "data.val=others", "train.world_size=1"])
    settings = a_submission(run, labeled / "submission")
    with monkeypatch.context() as patched:
        patched.setattr(finetune.Scoring, "__call__", lambda *_: None)
        with pytest.raises(SystemExit):
            job.train_job(settings, str(run.path))
    stopped = records.read_ending(run.path)
    assert stopped is not None and (stopped.state, stopped.step, stopped.steps) == ("stopped", 10, 10)
    assert not (run.path / "results.json").exists()
    job.train_job(settings, str(run.path))
    done = records.read_ending(run.path)
    assert done is not None and done.state == "finished" and (run.path / "results.json").exists()


@pytest.mark.parametrize("sbatch", [9], indirect=True)
def test_adapt_and_distill_are_submitted_with_what_their_verbs_fill_in(labeled: Path, sbatch: Path) -> None:
    weights = labeled / "start.safetensors"
    checkpoint.export(
        weights, create("vit_tiny_patch8", img_size=16, embed_dim=24, depth=2, num_heads=2), {"step": 1, "run": {}}
    )
    small = ["views.global_crops_size=16", "views.local_crops_size=8", "--cpu", "--cluster", "slurm"]
    assert cli.main(["launch", "adapt", "start.safetensors", "pictures", *small]) == 0
    assert cli.main(["launch", "distill", "start.safetensors", "data.path=pictures", *small]) == 0
    runs = {
        name: recorded_in(records.jobs(labeled / "runs" / name)[0].config) for name in ("adapt-pictures", "distilled")
    }
    adapted, distilled = runs.values()
    assert isinstance(adapted, Run) and isinstance(distilled, Run)
    assert (adapted.backbone.weights, adapted.backbone.embed_dim) == (str(weights), 24)
    assert adapted.loss.anchor_weight == 1 and adapted.optim.freeze_backbone_epochs == 1
    assert distilled.distill.teacher == str(weights) and distilled.backbone.weights is None


def test_sweeps_of_finetuning(labeled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--sweep", "classifier.mixup=0,0.8", "train.epochs=3", "--dry-run", "--cluster"]
    assert cli.main([*WORDS, *sweep, "local"]) == 0
    output = capsys.readouterr().out
    for name in ("mixup=0", "mixup=0.8"):
        assert f"runs/classes/{name}: finetune on pictures, cpu" in output
    assert output.count("3 epochs") == 2
    assert cli.main([*WORDS, *sweep, "slurm"]) == 0
    assert "--array=0-1" in capsys.readouterr().out and not (labeled / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "finetune_cifar10"], "nearfar launch finetune finetune_cifar10"),
        (["launch", "classes.yaml"], "nearfar launch finetune classes.yaml"),
        (["launch", "finetune", "cifar10"], "nearfar launch pretrain cifar10"),
        (["launch", "finetun", "classes.yaml"], "did you mean finetune?"),
        (["launch", "adapt", "backbone.weights=x", "data.path=pictures"], "The weights and the images come first"),
        (["launch", "finetune", "classes.yaml"], "data.path is not set"),
        (["launch", "finetune", "classes.yaml", "data.path=none"], "data.path="),
        (["launch", "finetune", "classes.yaml", "data.path=pictures", "--then", "eval=knn"], "set data.val="),
        (["launch", "finetune", "classes.yaml", "data.path=pictures", "name=old"], "holds a run of nearfar pretrain"),
        (["launch", "finetune", "classes.yaml", "data.path=pictures", "--from", "none"], "none"),
        (
            ["launch", "finetune", "classes.yaml", "data.path=pictures", "train.batch_size=6", "--tasks-per-node", "2"],
            "mix pairs of images",
        ),
    ],
)
def test_wrong_combinations_are_one_paragraph_and_write_nothing(
    labeled: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = labeled / "runs" / "old"
    (old / "checkpoints" / "step-000000001").mkdir(parents=True)
    (old / "config.yaml").write_text(config.to_yaml(config.load(None, ["name=old", "data.path=pictures"])))
    before = sorted(labeled.rglob("*"))
    assert cli.main([*words, "--cpu", "--cluster", "slurm", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("nearfar: ") and error.count("\n") == 1
    assert sorted(labeled.rglob("*")) == before


def test_usr2_before_the_score_leads_back_to_the_queue(labeled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    monkeypatch.setattr(queue, "requeue", lambda number, **_: requests.append(number))
    monkeypatch.setattr(queue, "seconds_left", lambda number: None)
    process = JobProcess("7", 0, 1, 0, "localhost", labeled / "result.pkl")
    monkeypatch.setattr(JobProcess, "this", staticmethod(lambda: process))
    run = finetune_settings.load(Path("classes.yaml"), ["data.path=pictures", "data.val=others", "train.world_size=1"])
    settings = a_submission(run, labeled / "submission")

    def stopped(*_: Any) -> None:
        signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(finetune.Scoring, "__call__", stopped)
    with pytest.raises(SystemExit) as caught:
        job.train_job(settings, str(run.path))
    assert caught.value.code == 0 and requests == ["7"] and records.read_ending(run.path) is None
