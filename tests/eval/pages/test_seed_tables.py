"""Tables over seeds hold means and sample deviations; a change is taken run by run."""

from __future__ import annotations

import statistics
from pathlib import Path

from nearfar.eval.pages.compare import compare
from nearfar.eval.pages.seed_tables import detail_tables, score_table
from nearfar.eval.pages.seeds import by_seed


def shown(values: list[float], digits: int = 1) -> str:
    return f"{statistics.mean(values):.{digits}f} \u00b1 {statistics.stdev(values):.{digits}f}"


def test_every_perturbation_has_its_mean_and_its_change_over_seeds(runs_with_details: list[Path]) -> None:
    """The changes' spread is that of the differences: the seeds here differ by more than what a perturbation costs."""
    robustness, _ = detail_tables(by_seed(compare(runs_with_details)))
    assert robustness.heads == ["test images", "a_lgp", "plain&"]
    assert robustness.rows == [
        ["clean", shown([60, 62, 64]), shown([50, 53])],
        [
            "patch shuffle",
            f"{shown([40, 43, 43])} ({shown([-20, -19, -21])})",
            f"{shown([50, 53.5])} (+0.2 \u00b1 0.4)",
        ],
        ["band shuffle", f"{shown([59, 61, 63])} (-1.0 \u00b1 0.0)", "\u2013"],
        ["runs", "3", "2"],
    ]


def test_position_is_told_by_row_and_column_over_the_runs_that_have_it(runs_with_details: list[Path]) -> None:
    _, position = detail_tables(by_seed(compare(runs_with_details)))
    assert position.rows == [
        ["row", shown([0.5, 0.6, 0.7], 3), "0.800"],
        ["column", "0.250 \u00b1 0.000", "0.250"],
        ["runs", "3", "1"],
    ]


def test_a_group_that_is_not_scored_has_no_column_and_none_no_table(runs_with_details: list[Path]) -> None:
    (runs_with_details[3] / "results.json").unlink()
    _, position = detail_tables(by_seed(compare(runs_with_details)))
    assert position.heads == ["patch tokens", "a_lgp"]
    for run in runs_with_details:
        (run / "results.json").unlink(missing_ok=True)
    assert detail_tables(by_seed(compare(runs_with_details))) == []


def test_the_best_mean_of_each_score_is_marked(runs_with_details: list[Path]) -> None:
    table = score_table(compare(runs_with_details))
    assert table.heads == ["", "k-NN top-1", "patch-shuffled k-NN", "position R2", "runs"]
    assert table.rows[0] == ["a_lgp", shown([60, 62.5, 64]), shown([40, 43, 43]), "40.0 \u00b1 0.0", "3"]
    assert table.best == {(0, 1), (1, 2), (0, 3), (1, 3)}
