"""Runs that differ in their seed only are one row: mean and spread, for people and for papers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from nearfar.eval import results
from nearfar.eval.pages.compare import compare, runs_in
from nearfar.eval.pages.comparison_page import write_comparison
from nearfar.eval.pages.seeds import by_seed, latex, markdown, repeated_seeds
from nearfar.eval.results import DataName, Score

LGP, PLAIN = (60.0, 62.5, 64.0), (50.0, 53.0)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for kind, lgp, scores in (("a_lgp", True, LGP), ("plain&", False, PLAIN)):
        for seed, percent in enumerate(scores):
            name = f"{kind}-seed{seed}"
            run = tmp_path / name
            run.mkdir()
            settings = {"name": name, "folder": str(tmp_path), "train": {"seed": seed}, "backbone": {"lgp": lgp}}
            settings["data"] = {"path": f"{tmp_path}/{name}/data/train.beton"}  # drawn for each seed, as by the demo
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
            (run / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": 1.0}) + "\n")
            data = DataName("val", "val", 10)
            results.add(run / "results.json", Score("trained", "knn", percent, "w", data, data, {}))
    return runs_in(tmp_path)


def test_seeds_are_grouped_with_mean_and_sample_deviation(runs: list[Path]) -> None:
    groups = by_seed(compare(runs))
    assert [(group.name, len(group.rows)) for group in groups] == [("a_lgp", 3), ("plain&", 2)]
    for group, scores in zip(groups, (LGP, PLAIN), strict=True):
        assert group.scores["knn"].mean == pytest.approx(statistics.mean(scores))
        assert group.scores["knn"].deviation == pytest.approx(statistics.stdev(scores))


def test_markdown_can_be_pasted(runs: list[Path]) -> None:
    lines = markdown(compare(runs)).splitlines()
    assert lines[:4] == [
        "| | k-NN top-1 | runs |", "|---|---|---|", "| a_lgp | **62.2 \u00b1 2.0** | 3 |",
        "| plain& | 51.5 \u00b1 2.1 | 2 |",
    ]  # fmt: skip
    assert "mean and standard deviation" in lines[-1]


def test_latex_can_be_pasted(runs: list[Path]) -> None:
    text = latex(compare(runs))
    assert r"a\_lgp & \textbf{62.2 $\pm$ 2.0} & 3 \\" in text and r"plain\& & 51.5 $\pm$ 2.1 & 2 \\" in text
    assert text.count(r"\begin{tabular}{lcr}") == text.count(r"\end{tabular}") == 1


def test_a_score_of_fewer_images_is_marked_and_never_the_best(runs: list[Path]) -> None:
    """An online score, of a run that was not scored, may be higher only since it is of fewer images."""
    for run in runs[3:]:
        (run / "results.json").unlink()
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": 10, "knn_top1": 90.0}) + "\n")
    found = compare(runs)
    assert "| a_lgp | **62.2 \u00b1 2.0** | 3 |" in markdown(found)
    assert "| plain& | 90.0 \u00b1 0.0* | 2 |" in markdown(found) and r"& 90.0 $\pm$ 0.0* &" in latex(found)
    page = write_comparison(runs, runs[0].parent / "report.html").read_text()
    assert "<td>90.0 \u00b1 0.0*</td>" in page and '<td class="best">62.2 \u00b1 2.0</td>' in page


def test_one_run_has_no_spread_and_nothing_to_beat(runs: list[Path]) -> None:
    text = markdown(compare(runs[:1]))
    assert "| a_lgp-seed0 | 60.0 | 1 |" in text and "**" not in text


def test_runs_of_one_seed_are_not_taken_for_independent_ones(runs: list[Path]) -> None:
    assert repeated_seeds(by_seed(compare(runs))) == []
    (runs[1] / "config.yaml").write_text((runs[1] / "config.yaml").read_text().replace("seed: 1", "seed: 0"))
    (note,) = repeated_seeds(by_seed(compare(runs)))
    assert note.startswith("Runs of a_lgp share a seed") and note in markdown(compare(runs))


def test_the_page_has_both_tables(runs: list[Path], tmp_path: Path) -> None:
    page = write_comparison(runs, tmp_path / "report.html").read_text()
    assert "5 runs, 2 when runs that differ only in their seed count as one" in page
    assert '<td class="best">62.2 \u00b1 2.0</td><td>3</td>' in page and "a_lgp-seed2" in page
    assert page.index("Over seeds") < page.index("Every run")
