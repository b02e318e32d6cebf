"""Collapse indicators against closed forms and numpy."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from nearfar.ssl.learning.health import (
    CollapseWatch,
    collapse,
    falling_score,
    feature_std,
    features_lost,
    nothing_learned,
    patience,
    rankme,
    start_similarity,
    teacher_health,
)
from nearfar.ssl.settings.listing import all_settings

HEALTHY = {"entropy": 0.6, "kl": 1.0, "feature_std": 0.9, "rankme": 30.0, "prototypes_used": 0.7}
FLAT = {**HEALTHY, "entropy": 0.995}


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))


def test_flat_rows_have_entropy_one_and_no_kl(features: Tensor) -> None:
    health = teacher_health(torch.full((2, 64, 32), 1 / 32), features)
    assert health["entropy"] == pytest.approx(1, abs=1e-6) and health["kl"] == pytest.approx(0, abs=1e-5)


def test_one_hot_rows_have_entropy_zero_and_kl_of_their_spread(features: Tensor) -> None:
    rows = F.one_hot(torch.arange(128) % 32, 32).float().unflatten(0, (2, 64))
    health = teacher_health(rows, features)
    assert health["entropy"] == pytest.approx(0, abs=1e-6)
    assert health["kl"] == pytest.approx(math.log(32), rel=1e-5)
    assert health["prototypes_used"] == 1


def test_identical_rows_have_no_kl_whatever_they_say(features: Tensor) -> None:
    row = torch.softmax(torch.randn(32, generator=torch.Generator().manual_seed(1)), 0)
    health = teacher_health(row.expand(2, 64, 32), features)
    assert health["kl"] == pytest.approx(0, abs=1e-5) and 0 < health["entropy"] < 1
    assert health["prototypes_used"] == 1 / 32


def test_entropy_and_kl_against_scipy(features: Tensor) -> None:
    logits = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(2)) * 3
    rows = logits.softmax(-1).flatten(0, 1).double().numpy()
    health = teacher_health(logits.softmax(-1), features)
    assert health["entropy"] == pytest.approx(scipy_entropy(rows, axis=1).mean() / np.log(32), rel=1e-5)
    mean = np.broadcast_to(rows.mean(0), rows.shape)
    assert health["kl"] == pytest.approx(scipy_entropy(rows, mean, axis=1).mean(), rel=1e-4)
    assert health["prototypes_used"] == len(set(rows.argmax(1))) / 32


def test_prototypes_used_counts_among_as_many_as_there_are_rows(features: Tensor) -> None:
    rows = F.one_hot(torch.arange(128), 1000).float().unflatten(0, (2, 64))
    assert teacher_health(rows, features)["prototypes_used"] == 1


def test_feature_std_is_near_one_for_random_features_and_zero_for_equal_ones(features: Tensor) -> None:
    assert feature_std(features) == pytest.approx(1, abs=0.03)
    assert feature_std(features * 100) == pytest.approx(feature_std(features), rel=1e-5)
    assert feature_std(features[:1, :1].expand(2, 64, 48)) == pytest.approx(0, abs=1e-5)


def test_rankme_against_numpy(features: Tensor) -> None:
    rows = features.flatten(0, 1).numpy().astype(np.float64) * np.linspace(0.01, 1, 48)
    values = np.linalg.svd(rows, compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    assert rankme(torch.from_numpy(rows).float()) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_rankme_counts_dimensions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(3))).Q
    assert rankme(basis @ torch.eye(5, 40)) == pytest.approx(5, rel=1e-3)
    assert rankme(torch.ones(64, 40)) == pytest.approx(1, rel=1e-3)


def test_health_says_the_same_of_bf16(features: Tensor) -> None:
    rows = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(4)).softmax(-1)
    wide, narrow = teacher_health(rows, features), teacher_health(rows, features.bfloat16())
    for key in wide:
        assert narrow[key] == pytest.approx(wide[key], rel=0.02)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"entropy": 0.99}, ["uniform output", "ln K", "head.prototypes"]),
        ({"kl": 0.001}, ["one answer", "loss.center_momentum"]),
        ({"feature_std": 0.01}, ["same features", "optim.lr"]),
    ],
)
def test_each_collapse_is_named_with_what_to_change(changed: dict[str, float], parts: list[str]) -> None:
    assert collapse(HEALTHY) is None
    message = collapse({**HEALTHY, **changed})
    assert message is not None and all(part in message for part in parts)


def test_the_words_name_settings_that_exist() -> None:
    keys = {setting.key for setting in all_settings()}
    for changed in ({"entropy": 0.99}, {"kl": 0.0}, {"feature_std": 0.0}):
        named = set(re.findall(r"(?:head|loss|optim)\.\w+", collapse({**HEALTHY, **changed}) or ""))
        assert named and named <= keys


def test_the_watch_waits_until_a_collapse_lasts_tells_it_once_and_tells_the_recovery() -> None:
    watch = CollapseWatch(grace=100, patience=3, start=FLAT)
    assert [watch.update(step, FLAT) for step in range(95, 100)] == [None] * 5  # before grace
    assert [watch.update(step, FLAT) for step in (100, 101)] == [None, None]
    assert watch.update(102, HEALTHY) is None  # single bad steps are no collapse, nor is this a recovery
    messages = [watch.update(step, FLAT) for step in range(103, 110)]
    assert messages[:2] == [None, None] and "uniform output" in str(messages[2]) and messages[3:] == [None] * 4
    assert "Recovered by step 110" in str(watch.update(110, HEALTHY))
    assert watch.update(111, HEALTHY) is None
    again = [watch.update(step, FLAT) for step in range(112, 116)]
    assert [bool(message) for message in again] == [False, False, True, False]


def test_what_a_run_began_with_is_no_collapse_until_grace_and_what_came_later_is() -> None:
    began_flat, became_flat = CollapseWatch(grace=1000, patience=2), CollapseWatch(grace=1000, patience=2)
    assert not any(began_flat.update(step, FLAT) for step in range(10, 1000, 10))
    assert became_flat.update(10, HEALTHY) is None
    assert [bool(became_flat.update(step, FLAT)) for step in (20, 30, 40)] == [False, True, False]


def test_features_that_began_alike_are_no_collapse_and_those_that_became_so_are() -> None:
    start = {**HEALTHY, "feature_std": 0.06, "rankme": 2.0}
    assert collapse({**start, "feature_std": 0.03, "rankme": 1.5}, start) is None
    assert "Complete collapse: all images" in str(collapse({**start, "feature_std": 0.015}, start))
    message = str(collapse({**HEALTHY, "rankme": 3.0}, HEALTHY))
    assert "Dimensional collapse" in message and "RankMe 3.0, 30.0 at the start" in message
    assert collapse({**HEALTHY, "rankme": 11.0}, HEALTHY) is None


def teacher(kind: str, share: float, generator: torch.Generator) -> dict[str, float]:
    """Numbers of a teacher of 64 images and 32 prototypes on the way (share 0 to 1) into a kind of collapse."""
    logits, features = (torch.randn(2, 64, n, generator=generator) for n in (32, 48))
    logits = 3 * logits
    if kind == "flat":
        logits = (1 - share) * logits
    elif kind == "one answer":
        logits = (1 - share) * logits + share * 9 * (torch.arange(32) == 5)
    elif kind == "same features":
        features = (1 - share) * features + share * torch.ones(48)
    else:  # few directions
        features = features * torch.where(torch.arange(48) < 2, 1.0, 1 - share)
    return teacher_health(logits.softmax(-1), features)


@pytest.mark.parametrize("log_every", [1, 5, 10, 25])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flat", "uniform output"),
        ("one answer", "one answer"),
        ("same features", "nearly the same features"),
        ("few directions", "few directions"),
    ],
)
def test_each_collapse_is_named_within_fifty_steps(kind: str, expected: str, log_every: int) -> None:
    generator = torch.Generator().manual_seed(5)
    watch, messages = CollapseWatch(grace=10_000, patience=patience(log_every)), {}
    for step in range(log_every, 401, log_every):
        share = min(1.0, max(0.0, (step - 200) / 20)) * 0.995  # healthy until 200, collapsed from 220 on
        if message := watch.update(step, teacher(kind, share, generator)):
            messages[step] = message
    assert len(messages) == 1
    ((step, message),) = messages.items()
    assert 200 < step <= 270 and expected in message


@pytest.mark.parametrize("seed", range(5))
def test_healthy_numbers_raise_no_alarm(seed: int) -> None:
    generator, watch = torch.Generator().manual_seed(seed), CollapseWatch(grace=0)
    assert not any(watch.update(step, teacher("flat", 0.0, generator)) for step in range(50))


def scored(*scores: float, losses: tuple[float, ...] = (3.0, 2.5, 2.0, 1.5, 1.0)) -> list[dict[str, float]]:
    """Metrics of a run that is scored after every ten lines."""
    lines = []
    for number, (score, loss) in enumerate(zip(scores, losses, strict=False), 1):
        lines += [{"step": 10.0 * number, "loss": loss, "rankme": 9.0}] * 10
        lines.append({"step": 10.0 * number, "epoch": number, "knn_top1": score})
    return lines


def test_a_score_that_falls_while_the_loss_falls_is_told_once() -> None:
    message = falling_score(scored(35.0, 43.5, 41.0, 37.0))
    assert message is not None and "was 43.5 at step 20 and is 41.0 and 37.0 now" in message
    assert "although the loss falls (2.50 -> 1.50)" in message
    assert falling_score(scored(35.0, 43.5, 41.0, 37.0, 36.0)) is None  # told before
    assert "does not fall either" in str(falling_score(scored(43.5, 41.0, 37.0, losses=(1.0, 2.0, 3.0))))


@pytest.mark.parametrize(
    "scores",
    [(), (40.0,), (40.0, 30.0), (30.0, 40.0, 35.0), (40.0, 35.0, 39.0), (40.0, 39.0, 38.6), (40.0, 30.0, 41.0)],
)
def test_noise_a_single_fall_and_a_recovery_are_not_told(scores: tuple[float, ...]) -> None:
    assert falling_score(scored(*scores)) is None


def line(**values: float) -> dict[str, float]:
    return {"rankme": 60.0, "feature_std": 0.9, **values}


def test_a_run_that_learned_nothing_is_told_in_one_sentence() -> None:
    flat = nothing_learned([{"knn_top1": 25.3}, line(), {"knn_top1": 24.7}], 128)
    assert flat is not None and "25.3 at its first score, 24.7 at the end" in flat and "RankMe" not in flat
    alike = nothing_learned([line(rankme=6.5, feature_std=0.43)], 128)
    assert alike is not None and "RankMe 6.5 of at most 128, std 0.43" in alike and "train.epochs" in alike
    assert "head.batch_norm=true" in alike  # and not where it is true
    assert "batch_norm" not in str(nothing_learned([line(rankme=6.5, feature_std=0.43)], 128, batch_norm=True))


def test_a_run_that_learned_is_not_scolded() -> None:
    assert nothing_learned([{"knn_top1": 25.3}, line(), {"knn_top1": 41.0}], 128) is None
    assert nothing_learned([line(rankme=6.5)], 128) is None  # few directions, but images far apart
    assert nothing_learned([{"knn_top1": 95.0}, line(), {"knn_top1": 94.0}], 128) is None  # nothing left to gain
    assert nothing_learned([{"knn_top1": 25.3}], 128) is None and nothing_learned([], 128) is None


def test_similarity_to_the_start_is_blind_to_what_all_images_share() -> None:
    rng = np.random.default_rng(0)
    start, other = (10 + rng.normal(size=(200, 30)) for _ in range(2))  # the plain cosine of any two is .99
    assert start_similarity(start, start) == pytest.approx(1)
    assert start_similarity(2 * start + 5, start) == pytest.approx(1)
    assert abs(start_similarity(other, start)) < 0.05
    assert start_similarity(start + other, start) == pytest.approx(0.5**0.5, abs=0.05)


def test_lost_features_are_told_once_with_the_scores() -> None:
    messages = []
    lines: list[dict[str, float]] = []
    for step, (similarity, score) in enumerate([(1.0, 70.0), (0.6, 60.0), (0.4, 40.0), (0.3, 30.0), (0.6, 50.0)]):
        lines += [{"step": step, "loss": 1.0}, {"step": step, "start_similarity": similarity, "knn_top1": score}]
        messages.append(features_lost(lines))
    assert [bool(message) for message in messages] == [False, False, True, False, False]
    assert "0.40" in str(messages[2]) and "was 70.0 at the first score and is 40.0 now" in str(messages[2])
    assert features_lost([{"step": 1, "knn_top1": 3.0}]) is None
