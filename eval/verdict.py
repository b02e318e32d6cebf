"""What a run's scores mean, in one sentence, with what to try and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nearfar.eval.results import HEADLINES, TITLES, Score

_STANDARD_ERRORS = 2.0  # a smaller difference may be chance
_FEW_STEPS = 3000


class Verdict(NamedTuple):
    """finding: one sentence. advice: what to try; empty where nothing is wrong. good: nothing to worry about. others:
    the scores that did not decide, in a sentence."""

    finding: str
    advice: str
    good: bool
    others: str = ""

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.finding, self.others, self.advice) if part)


def verdict(
    table: Mapping[str, Mapping[str, Score]], metrics: Iterable[Mapping[str, float]], settings: Mapping[str, Any]
) -> Verdict | None:
    """Did training help? From one table of `nearfar.eval.results.tables`, the lines of metrics.jsonl and flat settings.

    The first task of k-NN, linear probe and segmentation that the trained features have decides. A difference within
    two standard errors (of so many test images) counts as none. None where there is no score of trained features.
    """
    trained = table.get("trained", {})
    task = next((task for task in HEADLINES if task in trained), None)
    if task is None:
        return None
    score = trained[task]
    others = {
        subject: table[subject][task] for subject in ("start", "untrained", "pixels") if task in table.get(subject, {})
    }
    last: dict[str, float] = {}
    for line in metrics:
        last |= line
    said = f"{TITLES[task]} {score.percent:.1f} %"
    against = {"start": "the starting weights", "untrained": "untrained", "pixels": "raw pixels"}
    compared = ", ".join(f"{against[subject]} {other.percent:.1f} %" for subject, other in others.items())
    facts = f"{said} ({compared})" if compared else said
    facts += _health(last)
    besides = _other_tasks(table, task)
    lost = [
        against[subject]
        for subject, other in others.items()
        if score.percent - other.percent <= _chance_difference(score, other)
    ]
    advice = _advice(last, settings, score.step)
    if not others:
        if _weak(last):
            return Verdict(f"{facts}: the features vary little from image to image.", advice, False, besides)
        return Verdict(f"{facts}.", "What training added is not known: score again with --baselines.", True, besides)
    if lost:
        behind = " and than ".join(lost)
        return Verdict(
            f"Training has not paid off yet: the features are no better than {behind}: {facts}.", advice, False, besides
        )
    gains = ", ".join(
        f"{score.percent - other.percent:+.1f} over {against[subject]}" for subject, other in others.items()
    )
    return Verdict(f"Training paid off: {gains}: {facts}.", "", True, besides)


def _other_tasks(table: Mapping[str, Mapping[str, Score]], decided: str) -> str:
    """The other scores of the trained features beside those of the baselines."""
    told = []
    for task, score in table["trained"].items():
        beside = [
            f"{name} {table[subject][task].percent:.1f} %"
            for subject, name in (("start", "starting weights"), ("untrained", "untrained"), ("pixels", "raw pixels"))
            if task in table.get(subject, {})
        ]
        if task != decided:
            told.append(f"{TITLES[task]} {score.percent:.1f} %" + (f" ({', '.join(beside)})" if beside else ""))
    return f"Besides, {', '.join(told)}." if told else ""


def _health(last: Mapping[str, float]) -> str:
    parts = [
        f"{name} {last[key]:.{digits}f}"
        for key, name, digits in (("rankme", "RankMe", 1), ("feature_std", "feature std", 2))
        if math.isfinite(last.get(key, math.nan))
    ]
    return "; " + ", ".join(parts) if parts else ""


def _weak(last: Mapping[str, float]) -> bool:
    """Features near a collapse: far fewer directions, or far less spread, than healthy ones have."""
    return last.get("rankme", math.inf) < 10 or last.get("feature_std", math.inf) < 0.5


def _advice(last: Mapping[str, float], settings: Mapping[str, Any], step: int | None) -> str:
    """The likeliest cures first, each a setting as it is written."""
    tries = []
    steps = step if step is not None else last.get("step")
    if steps is not None and steps < _FEW_STEPS:
        longer = ""
        if last.get("epoch") and last.get("step"):
            longer = f", such as train.epochs={math.ceil(_FEW_STEPS * last['epoch'] / last['step'])}"
        tries.append(f"more training than {steps:,.0f} steps{longer}")
    if _weak(last):
        tries += [] if settings.get("loss.koleo_weight") else ["loss.koleo_weight=0.1 (spreads the features)"]
        tries += [] if settings.get("head.batch_norm") else ["head.batch_norm=true"]
        if isinstance(prototypes := settings.get("head.prototypes"), int) and prototypes > 256:
            tries.append(f"fewer prototypes (head.prototypes={max(128, prototypes // 4)})")
        tries.append("a lower optim.lr")
    else:
        tries.append("a higher optim.lr")
        tries.append("larger crops (views.global_crops_scale, views.local_crops_scale)")
    return f"Try {'; '.join(tries[:4])}."


def _chance_difference(one: Score, other: Score) -> float:
    """Percentage points that two accuracies on so many test images may differ by chance."""
    variance = sum(max(score.percent * (100 - score.percent), 0.0) / max(score.val.images, 1) for score in (one, other))
    return _STANDARD_ERRORS * math.sqrt(variance) if one.task != "segment" else 0.5
