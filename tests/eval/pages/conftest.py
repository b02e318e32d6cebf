"""Runs to compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nearfar.eval import results
from nearfar.eval.pages.compare import runs_in
from nearfar.eval.results import DataName, Score

KNN = {"a_lgp": (60.0, 62.5, 64.0), "plain&": (50.0, 53.0)}  # of each seed


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds with LGP and two without, in `KNN`'s order, each with a k-NN score."""
    for kind, scores in KNN.items():
        for seed, percent in enumerate(scores):
            name = f"{kind}-seed{seed}"
            run = tmp_path / name
            run.mkdir()
            settings = {
                "name": name,
                "folder": str(tmp_path),
                "train": {"seed": seed},
                "backbone": {"lgp": kind == "a_lgp"},
                "data": {"path": f"{tmp_path}/{name}/data/train.beton"},  # drawn for each seed, as by the demo
            }
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
            (run / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": 1.0}) + "\n")
            _add_score(run, "knn", percent)
    return runs_in(tmp_path)


@pytest.fixture
def runs_with_details(runs: list[Path]) -> list[Path]:
    """`runs` with robustness and position too; the last one, without LGP, has no score of position."""
    for at, run in enumerate(runs):
        clean, shuffled = [(60.0, 40.0), (62.0, 43.0), (64.0, 43.0), (50.0, 50.0), (53.0, 53.5)][at]
        table = {"clean": (clean, 0.0), "patch shuffle": (shuffled, clean - shuffled)}
        if at < 3:
            table["band shuffle"] = (clean - 1, 1.0)
        rows = {name: {"top1": top1, "drop": drop} for name, (top1, drop) in table.items()}
        _add_score(run, "robustness", shuffled, {"table": rows})
        if run != runs[-1]:
            _add_score(run, "position", 40.0, {"row": 0.5 + 0.1 * at, "column": 0.25})
    return runs


def _add_score(run: Path, task: str, percent: float, detail: dict[str, object] | None = None) -> None:
    data = DataName("val", "val", 10)
    results.add(run / "results.json", Score("trained", task, percent, "w", data, data, {}, detail=detail))
