"""What scores mean: better, or not better than chance allows, and what to try."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from nearfar.eval.pages.verdict import chance_difference, verdict
from nearfar.eval.results import DataName, Score
from nearfar.eval.run_files import flat
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.settings.run import Run


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
    for part in ("worse than raw pixels, and neither", "than untrained", "25.3 %", "24.7 %", "41.6 %", "6.5", "0.43"):
        assert part in got.finding
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
    assert got is not None and got.others == "Other scores: linear top-1 80.0 % (raw pixels 17.4 %)."
    assert got.others in got.text and "linear" not in got.finding


@pytest.mark.parametrize(("images", "good"), [(100, False), (10_000, True)])
def test_a_difference_that_luck_can_make_is_none(images: int, good: bool) -> None:
    got = verdict(table(images, trained=35.0, untrained=30.0), WELL, {})
    assert got is not None and got.good == good


def test_a_gain_within_the_noise_is_called_that() -> None:
    """61.2 % against 59.0 % on 1,000 images was "no better"; two standard errors of the difference are 4.4 points."""
    got = verdict(table(1000, trained=61.2, untrained=30.6, pixels=59.0), WELL, {})
    assert got is not None and not got.good and "no better" not in got.text and "has paid off in part" in got.finding
    assert "better than untrained by 30.6 points" in got.finding
    assert (
        "than raw pixels (+2.2: within the noise of 1,000 images, where up to 4.4 points may be chance)" in got.finding
    )
    assert "About 4,000 test images would tell such a gain from chance." in got.advice
    enough = verdict(table(4000, trained=61.2, untrained=30.6, pixels=59.0), WELL, {})
    assert enough is not None and enough.good


def test_chance_is_what_drawing_images_gives() -> None:
    """Two classifiers of 61.2 and 59.0 %, each on its own 1,000 images, 20,000 times."""
    rng = np.random.default_rng(0)
    one, two = (100 * rng.binomial(1000, share, 20_000) / 1000 for share in (0.612, 0.590))
    assert chance_difference([61.2, 59.0], [1000, 1000]) == pytest.approx(2 * (one - two).std(), rel=0.02)
    assert chance_difference([0.0, 100.0], [10, 10]) == 0


def test_a_loss_and_many_ties_are_told_apart() -> None:
    worse = verdict(table(1000, trained=20.0, untrained=30.0), WELL, {})
    assert (
        worse is not None and "the features are worse than untrained: " in worse.finding and "noise" not in worse.text
    )
    tied = verdict(table(1000, trained=30.0, untrained=30.0, pixels=29.9), WELL, {})
    assert tied is not None and "has not paid off yet" in tied.finding
    assert "neither better nor worse than untrained and than raw pixels (+0.0, +0.1: within the noise" in tied.finding
    assert "test images would tell" not in tied.advice  # hundreds of thousands would


def test_of_miou_no_noise_of_images_is_claimed() -> None:
    given = table(500, trained=20.3, pixels=20.0)
    scores = {subject: {"segment": dataclasses.replace(row["knn"], task="segment")} for subject, row in given.items()}
    got = verdict(scores, WELL, {})
    assert got is not None and "(+0.3: less than 0.5 points)" in got.finding and "images" not in got.advice


def test_settings_that_are_there_are_not_advised_again() -> None:
    got = verdict(table(trained=25.0, untrained=25.0), SICK, {"loss.koleo_weight": 0.1, "head.batch_norm": True})
    fresh = verdict(table(trained=25.0, untrained=25.0), SICK, {})
    assert fresh is not None and "koleo" in fresh.advice and "batch_norm" in fresh.advice
    assert got is not None and "koleo" not in got.advice and "batch_norm" not in got.advice
    healthy = verdict(table(trained=25.0, untrained=25.0), WELL, {"optim.name": "adamw"})
    with_muon = verdict(table(trained=25.0, untrained=25.0), WELL, {"optim.name": "muon"})
    assert healthy is not None and "optim.name=muon" in healthy.advice
    assert with_muon is not None and "muon" not in with_muon.advice


def test_a_run_from_weights_is_not_told_to_move_further_away() -> None:
    """It was advised a higher rate and more training, also where training had destroyed what the weights knew."""
    adapt = {"loss.anchor_weight": 1.0, "optim.backbone_lr_mult": 0.1}
    lost = verdict(table(trained=40.0, start=60.0, untrained=30.0), WELL, adapt)
    assert lost is not None and not lost.good and "worse than the starting weights" in lost.finding
    assert "as they are" in lost.advice and "a lower optim.lr" in lost.advice and "loss.anchor_weight=3;" in lost.advice
    naive = verdict(table(trained=40.0, start=60.0), WELL, {"loss.anchor_weight": 0.0})
    assert naive is not None and "loss.anchor_weight=1 " in naive.advice
    careful = verdict(table(trained=60.5, start=60.0, untrained=30.0), WELL, adapt)
    assert careful is not None and "loss.anchor_weight=0.3" in careful.advice
    assert "backbone_lr_mult=1" in careful.advice and "a higher optim.lr" in careful.advice
    assert "muon" not in careful.advice and "more training" not in careful.advice
    collapsed = verdict(table(trained=25.0, start=60.0), SICK, adapt)
    assert collapsed is not None and "koleo" in collapsed.advice


@pytest.mark.parametrize("run", [Run(), FinetuneRun()])
@pytest.mark.parametrize("metrics", [WELL, SICK])
@pytest.mark.parametrize("others", [{}, {"start": 60.0}, {"start": 20.0}, {"start": 25.0}])
def test_advice_names_settings_that_the_run_has(
    run: Run | FinetuneRun, metrics: list[dict[str, float]], others: dict[str, float]
) -> None:
    """A supervised run was advised crops and an optimizer of pretraining."""
    got = verdict(table(trained=25.0, untrained=25.0, **others), metrics, flat(run.model_dump()))
    assert got is not None and "optim.lr" in got.advice
    known = {setting.key for setting in all_settings(type(run))}
    assert set(re.findall(r"\b[a-z]+\.[a-z_]+", got.advice)) <= known


def test_labels_are_advised_where_a_run_learns_from_labels() -> None:
    scratch, begun = {"classifier.pooling": "cls"}, {"classifier.pooling": "cls", "backbone.weights": "runs/mine"}
    alone = verdict(table(trained=25.0, untrained=25.0), WELL, scratch)
    assert alone is not None and "pretraining first" in alone.advice and "more training than 500" in alone.advice
    lost = verdict(table(trained=25.0, start=60.0), WELL, begun)
    assert lost is not None and "as they are" in lost.advice and "optim.layerwise_decay" in lost.advice
    same = verdict(table(trained=25.0, start=25.0), WELL, begun)
    assert same is not None and "pretraining" not in same.advice and "more labeled images" in same.advice


def test_without_baselines_only_a_collapse_is_known() -> None:
    healthy = verdict(table(trained=25.0), WELL, {})
    assert healthy is not None and healthy.good and "--baselines" in healthy.advice
    collapsed = verdict(table(trained=25.0), SICK, {})
    assert collapsed is not None and not collapsed.good and "vary little" in collapsed.finding
    assert verdict({}, SICK, {}) is None
