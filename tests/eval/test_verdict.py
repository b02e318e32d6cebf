"""What scores mean: better, or not better than chance allows, and what to try."""

from __future__ import annotations

import pytest

from nearfar.eval.results import DataName, Score
from nearfar.eval.verdict import verdict


def table(images: int = 1000, **percents: float) -> dict[str, dict[str, Score]]:
    data = DataName("val", "val", images)
    return {
        subject: {"knn": Score(subject, "knn", percent, "w", data, data, {}, 500)}
        for subject, percent in percents.items()
    }


SICK = [{"step": 500.0, "epoch": 10.0, "rankme": 6.5, "feature_std": 0.43}]
WELL = [{"step": 500.0, "rankme": 60.0, "feature_std": 0.97}]


def test_the_run_of_the_issue_is_told_what_is_wrong_and_what_to_try() -> None:
    """k-NN 25.3, untrained 24.7, pixels 41.6, RankMe 6.5 and feature std .43: nobody said a word."""
    got = verdict(table(trained=25.3, untrained=24.7, pixels=41.6), SICK, {"train.epochs": 10})
    assert got is not None and not got.good
    for words in ("no better than untrained and than raw pixels", "25.3 %", "24.7 %", "41.6 %", "6.5", "0.43"):
        assert words in got.finding
    assert "train.epochs=60" in got.advice and "loss.koleo_weight=0.1" in got.advice


def test_what_paid_off_is_said_with_the_gains() -> None:
    got = verdict(table(trained=64.6, untrained=30.6, pixels=40.0), WELL, {})
    assert got is not None and got.good and got.advice == ""
    assert "+34.0 over untrained, +24.6 over raw pixels" in got.finding


def test_the_scores_that_do_not_decide_are_told_besides() -> None:
    given = table(trained=64.6, pixels=40.0)
    for subject, percent in (("trained", 80.0), ("pixels", 17.4)):
        knn = given[subject]["knn"]
        given[subject]["linear"] = Score(subject, "linear", percent, "w", knn.train, knn.val, {}, 500)
    got = verdict(given, WELL, {})
    assert got is not None and got.others == "Besides, linear top-1 80.0 % (raw pixels 17.4 %)."
    assert got.others in got.text and "linear" not in got.finding


@pytest.mark.parametrize(("images", "good"), [(100, False), (10_000, True)])
def test_a_difference_that_luck_can_make_is_none(images: int, good: bool) -> None:
    got = verdict(table(images, trained=35.0, untrained=30.0), WELL, {})
    assert got is not None and got.good == good


def test_settings_that_are_there_are_not_advised_again() -> None:
    got = verdict(table(trained=25.0, untrained=25.0), SICK, {"loss.koleo_weight": 0.1, "head.batch_norm": True})
    fresh = verdict(table(trained=25.0, untrained=25.0), SICK, {})
    assert fresh is not None and "koleo" in fresh.advice and "batch_norm" in fresh.advice
    assert got is not None and "koleo" not in got.advice and "batch_norm" not in got.advice


def test_without_baselines_only_a_collapse_is_known() -> None:
    healthy = verdict(table(trained=25.0), WELL, {})
    assert healthy is not None and healthy.good and "--baselines" in healthy.advice
    collapsed = verdict(table(trained=25.0), SICK, {})
    assert collapsed is not None and not collapsed.good and "vary little" in collapsed.finding
    assert verdict({}, SICK, {}) is None
