"""What a run's scores mean, in one sentence, with what to try and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nearfar.eval.results import HEADLINES, TITLES, Score, signed
from nearfar.ssl.wording import counted

_STANDARD_ERRORS = 2.0  # a smaller difference may be chance
_SAME_MIOU = 0.5  # points of mIoU, of which no error follows from the number of images
_FEW_STEPS = 3000
_MANY_TIMES = 20  # more test images are advised up to so many times those there are


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
    two standard errors (of so many test images) is called noise. None where there is no score of trained features.
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
    own = f"{TITLES[task]} {score.percent:.1f} %"
    against = {"start": "the starting weights", "untrained": "untrained", "pixels": "raw pixels"}
    compared = ", ".join(f"{against[subject]} {other.percent:.1f} %" for subject, other in others.items())
    facts = f"{own} ({compared})" if compared else own
    facts += _health(last)
    besides = _other_tasks(table, task)
    gained = _Margin.of(score, others["start"]) if "start" in others else None
    if "classifier.pooling" in settings:
        advice = _advice_with_labels(last, settings, score.step, gained)
    elif gained is not None and not _weak(last):
        advice = _advice_from_weights(gained, settings)
    else:
        advice = _advice(last, settings, score.step)
    if not others:
        if _weak(last):
            return Verdict(f"{facts}: the features vary little from image to image.", advice, False, besides)
        return Verdict(f"{facts}.", "What training added is not known: score again with --baselines.", True, besides)
    margins = {against[subject]: _Margin.of(score, other) for subject, other in others.items()}
    if all(margin.better for margin in margins.values()):
        gains = ", ".join(f"{signed(margin.points)} over {name}" for name, margin in margins.items())
        return Verdict(f"Training paid off: {gains}: {facts}.", "", True, besides)
    return Verdict(f"{_shortfall(score, margins)}: {facts}.", _more_images(score, margins) + advice, False, besides)


class _Margin(NamedTuple):
    """By how many points the trained features are above others, and how many may be chance."""

    points: float
    chance: float

    @staticmethod
    def of(score: Score, other: Score) -> _Margin:
        if score.task == "segment":
            return _Margin(score.percent - other.percent, _SAME_MIOU)
        chance = chance_difference([score.percent, other.percent], [score.val.images, other.val.images])
        return _Margin(score.percent - other.percent, chance)

    @property
    def better(self) -> bool:
        return self.points > self.chance

    @property
    def worse(self) -> bool:
        return self.points < -self.chance


def _shortfall(score: Score, margins: Mapping[str, _Margin]) -> str:
    """Than what the features are better, than what worse, and where the images are too few to say."""
    better = {name: margin.points for name, margin in margins.items() if margin.better}
    worse = [name for name, margin in margins.items() if margin.worse]
    tied = {name: margin for name, margin in margins.items() if not margin.better and not margin.worse}
    findings = []
    if better:
        findings.append(
            "better than " + " and than ".join(f"{name} by {points:.1f} points" for name, points in better.items())
        )
    if worse:
        findings.append("worse than " + " and than ".join(worse))
    if tied:
        differences = ", ".join(signed(margin.points) for margin in tied.values())
        most = max(margin.chance for margin in tied.values())
        why = f"within the noise of {score.val.images:,} images, where up to {most:.1f} points may be chance"
        why = f"less than {most:.1f} points" if score.task == "segment" else why
        findings.append(f"neither better nor worse than {' and than '.join(tied)} ({differences}: {why})")
    how = "has paid off in part" if better and not worse else "has not paid off yet"
    return f"Training {how}: the features are {', and '.join(findings)}"


def _more_images(score: Score, margins: Mapping[str, _Margin]) -> str:
    """How many test images would tell a gain from chance, where that is not out of reach; else nothing."""
    times = [(m.chance / m.points) ** 2 for m in margins.values() if 0 < m.points <= m.chance]
    if not times or max(times) > _MANY_TIMES or score.task == "segment":
        return ""
    images = max(times) * score.val.images
    unit = 10 ** max(0, math.floor(math.log10(images)) - 1)
    return f"About {unit * math.ceil(images / unit):,} test images would tell such a gain from chance. "


def _other_tasks(table: Mapping[str, Mapping[str, Score]], decided: str) -> str:
    """The other scores of the trained features beside those of the baselines."""
    summaries = []
    for task, score in table["trained"].items():
        beside = [
            f"{name} {table[subject][task].percent:.1f} %"
            for subject, name in (("start", "starting weights"), ("untrained", "untrained"), ("pixels", "raw pixels"))
            if task in table.get(subject, {})
        ]
        if task != decided:
            summaries.append(f"{TITLES[task]} {score.percent:.1f} %" + (f" ({', '.join(beside)})" if beside else ""))
    return f"Other scores: {', '.join(summaries)}." if summaries else ""


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
    tries = _more_training(last, step)
    few_steps = bool(tries)
    if _weak(last):
        tries += [] if settings.get("loss.koleo_weight") else ["loss.koleo_weight=0.1 (spreads the features)"]
        tries += [] if settings.get("head.batch_norm") else ["head.batch_norm=true"]
        if isinstance(prototypes := settings.get("head.prototypes"), int) and prototypes > 256:
            tries.append(f"fewer prototypes (head.prototypes={max(128, prototypes // 4)})")
        tries.append("a lower optim.lr")
    else:
        if few_steps and settings.get("optim.name", "adamw") == "adamw":
            tries.append("optim.name=muon (a short run may learn faster by it)")
        tries.append("a higher optim.lr")
        tries.append("larger crops (views.global_crops_scale, views.local_crops_scale)")
    return f"Try {'; '.join(tries[:4])}."


def _more_training(last: Mapping[str, float], step: int | None) -> list[str]:
    """That few steps were made, where they were, with the epochs of enough."""
    steps = step if step is not None else last.get("step")
    if steps is None or steps >= _FEW_STEPS:
        return []
    longer = ""
    if last.get("epoch") and last.get("step"):
        longer = f", such as train.epochs={math.ceil(_FEW_STEPS * last['epoch'] / last['step'])}"
    return [f"more training than {counted(int(steps), 'step')}{longer}"]


def _advice_with_labels(
    last: Mapping[str, float], settings: Mapping[str, Any], step: int | None, gained: _Margin | None
) -> str:
    """For a supervised run. gained: over the weights that it began with."""
    if gained is not None and gained.worse:
        return (
            "The starting weights may serve as they are. Or try a lower optim.lr; a lower optim.layerwise_decay; fewer "
            "train.epochs."
        )
    tries = _more_training(last, step)
    if not (settings.get("backbone.weights") or settings.get("backbone.pretrained")):
        tries.append("pretraining first (nearfar pretrain, then backbone.weights=RUN)")
    tries += ["a higher optim.lr", "larger crops (augment.scale)", "more labeled images"]
    return f"Try {'; '.join(tries[:4])}."


def _advice_from_weights(gained: _Margin, settings: Mapping[str, Any]) -> str:
    """For a run that began with weights: what they knew was lost, or what is new hardly learned."""
    anchor = settings.get("loss.anchor_weight")
    if gained.worse:
        tighter = f"loss.anchor_weight={3 * anchor:g}" if anchor else "loss.anchor_weight=1 (holds what they know)"
        return f"The starting weights may serve as they are. Or try a lower optim.lr; {tighter}; fewer train.epochs."
    tries = [f"loss.anchor_weight={anchor / 3:.1g} (lets features move further)"] if anchor else []
    if settings.get("optim.backbone_lr_mult", 1.0) < 1:
        tries.append("optim.backbone_lr_mult=1 with optim.layerwise_decay=0.9")
    tries += ["a higher optim.lr", "more of your own images"]
    return f"Try {'; '.join(tries)}."


def chance_difference(percents: Sequence[float], images: Sequence[int]) -> float:
    """Percentage points by which two accuracies (in percent), on so many test images each, may differ by chance: two
    standard errors of the difference of two binomial shares."""
    pairs = zip(percents, images, strict=True)
    variance = sum(max(percent * (100 - percent), 0.0) / max(count, 1) for percent, count in pairs)
    return _STANDARD_ERRORS * math.sqrt(variance)
