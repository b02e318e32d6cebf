"""The demo, small: everything it promises is written, and a second call only shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.results import HEADLINES, SUBJECTS
from nearfar.launch import demo
from nearfar.launch.cli import main
from nearfar.launch.scoring.score import ScoreOptions, Subject, score, sources
from nearfar.ssl.disk.metrics import read_metrics

SMALL = ["train.epochs=1", "train.batch_size=32", "train.threads=1", "data.workers=0", "eval.knn_every_epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN", 160)
        patch.setattr(demo, "VAL", 80)
        patch.setattr(demo, "HEAD_STEPS", 40)
        assert main(["demo", f"folder={folder}", *SMALL]) == 0
    return folder / "demo"


def test_it_scores_trained_untrained_and_pixels_in_percent(run: Path) -> None:
    scores = results.read(run / "results.json")
    assert {(each.subject, each.task) for each in scores} == {
        (name, task) for name in SUBJECTS if name != "start" for task in HEADLINES
    }
    right = [each.percent * 80 / 100 for each in scores if each.task in ("knn", "linear")]  # of 80 images
    assert all(0 < count < 80 and count == pytest.approx(round(count), abs=1e-4) for count in right)
    weights = {each.detail["features"]["checkpoint"] for each in scores if each.detail and each.subject != "pixels"}
    assert len(weights) == 2


def test_it_leaves_a_whole_run_and_its_report(run: Path) -> None:
    for file in ("teacher.safetensors", "views.png", "figures.json", "run.log"):
        assert (run / file).stat().st_size > 0
    page = (run / "report.html").read_text()
    # 6 queries with 2 x 5 neighbors, 6 masks of 3, 6 attentions of 2, 6 token pictures of 3, the views
    assert page.count("data:image/") == 6 * 17 + 6 * 3 + 6 * 2 + 6 * 3 + 1 and 'class="missing"' not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert list(run.glob("events.out.tfevents.*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["head"]["batch_norm"] is True  # derived, and written
    scores = [line for line in read_metrics(run / "metrics.jsonl") if "knn_top1" in line]
    assert [line["step"] for line in scores] == [5]


def test_a_second_call_computes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("nearfar.launch.scoring.score.evaluate", never)
    monkeypatch.setattr("nearfar.launch.scoring.score.evaluate_pixels", never)
    monkeypatch.setattr("nearfar.launch.demo.make_scenes", never)
    monkeypatch.setattr(demo, "HEAD_STEPS", 40)
    weights = (run / "teacher.safetensors").read_bytes()
    assert main(["demo", f"folder={run.parent}", *SMALL]) == 0
    assert (run / "teacher.safetensors").read_bytes() == weights


def test_the_scores_of_other_weights_are_computed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verb finds data and sizes in the run, and `--baselines` adds the other rows."""
    out = run.parent / "again.json"
    assert main(["eval", "knn", str(run), "--out", str(out)]) == 0
    (again,) = results.read(out)
    assert again in results.read(run / "results.json")
    assert "trained" in capsys.readouterr().out


def test_features_and_export_read_the_run(run: Path) -> None:
    store, file = run.parent / "features", run.parent / "backbone.safetensors"
    (val,) = (run / "data").glob("val.*")  # a .beton where FFCV is installed
    assert main(["features", str(run), str(val), str(store)]) == 0
    assert json.loads((store / "manifest.json").read_text())["shape"] == [80, 96]
    assert main(["export", str(run), str(file)]) == 0
    assert main(["features", str(file), str(val), str(run.parent / "same")]) == 0
    assert (store / "features.npy").read_bytes() == (run.parent / "same" / "features.npy").read_bytes()


@pytest.mark.long
def test_scores_do_not_depend_on_the_processes_that_share_the_work(run: Path, tmp_path: Path) -> None:
    """With two threads the three rows are computed in two processes of one thread, else one after the other."""
    subject = Subject.of(run)
    data = sources(subject.run, None, None)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            options = ScoreOptions(True, tmp_path / f"{threads}.json")
            found.append(score(subject, *data, tasks=("knn", "linear"), options=options, console=Console(quiet=True)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
