"""Runs that differ in their seed only are one group: mean and spread."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from nearfar.eval.pages.compare import compare
from nearfar.eval.pages.comparison_page import write_comparison
from nearfar.eval.pages.paper_tables import latex, markdown
from nearfar.eval.pages.seeds import by_seed, repeated_seeds


def test_seeds_are_grouped_with_mean_and_sample_deviation(runs: list[Path]) -> None:
    groups = by_seed(compare(runs))
    assert [(group.name, len(group.rows)) for group in groups] == [("a_lgp", 3), ("plain&", 2)]
    for group, scores in zip(groups, ((60.0, 62.5, 64.0), (50.0, 53.0)), strict=True):
        assert group.scores["knn"].mean == pytest.approx(statistics.mean(scores))
        assert group.scores["knn"].deviation == pytest.approx(statistics.stdev(scores))


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
