"""The health of a run: numbers that show collapse, and messages that explain it (docs/methods.md section 7)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def teacher_health(probabilities: Tensor, features: Tensor) -> dict[str, float]:
    """Collapse indicators of one step.

    Args:
        probabilities: the teacher's (..., K).
        features: the teacher's backbone features (..., D).

    Returns:
        entropy: mean entropy of a row / ln K. 1 = every image gets the uniform output, 0 = a single prototype each.
        kl: mean KL(row || mean row) in nats. 0 = every image gets the same answer, whatever it is.
        prototypes_used: share of the prototypes, among as many as there are rows, that win at least one row.
        feature_std: mean over dimensions of the std of L2-normalized features, times sqrt(D). Healthy near 1.
        rankme: exp of the entropy of the normalized singular values (RankMe, eq. 1); at most min(rows, D).
    """
    rows = probabilities.flatten(0, -2).float()
    prototypes = rows.shape[1]
    log_rows = rows.clamp_min(1e-12).log()
    entropy = -(rows * log_rows).sum(-1).mean()
    mean = rows.mean(0)
    entropy_of_mean = -(mean * mean.clamp_min(1e-12).log()).sum()
    winners = rows.argmax(-1)
    # The only wait for the device; what is left is small and runs on the CPU.
    entropy, entropy_of_mean = torch.stack([entropy, entropy_of_mean]).cpu().unbind()
    features = features.cpu()
    return {
        "entropy": float(entropy) / math.log(prototypes),
        "kl": float(entropy_of_mean - entropy),  # the mean of KL(row || mean) is the gap between the entropies
        "prototypes_used": winners.cpu().unique().numel() / min(prototypes, rows.shape[0]),
        "feature_std": feature_std(features),
        "rankme": rankme(features),
    }


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean std over dimensions of L2-normalized features (..., D), times sqrt(D)."""
    rows = F.normalize(features.flatten(0, -2).float(), dim=-1)
    return float(rows.std(0).mean()) * math.sqrt(rows.shape[1])


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank of features (..., D) (Garrido et al. 2023, eq. 1)."""
    rows = features.flatten(0, -2).double()
    values = torch.linalg.svdvals(rows)
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


ALIKE = 0.05  # std of features below which they count as equal, unless they began nearly so


def collapse(metrics: dict[str, float], start: dict[str, float] | None = None) -> str | None:
    """What is wrong with these numbers of `teacher_health`, and what to do about it; None when nothing is.

    Those of features (feature_std, rankme) may stand alone.

    start: the numbers of the run's first line. The features of some untrained networks (LGP, PRR) are nearly alike, so
        those of a run count as collapsed where they are three times as alike as they were.
    """
    alike, rank = ALIKE, 0.0
    if start is not None:
        alike, rank = min(ALIKE, start["feature_std"] / 3), min(5.0, start["rankme"] / 3)
    if metrics["feature_std"] < alike:
        return (
            f"Complete collapse: all images get nearly the same features (std {metrics['feature_std']:.3f}, healthy "
            "near 1). Try a lower optim.lr or more warm-up."
        )
    if metrics.get("entropy", 0.0) > 0.98:
        return (
            f"Collapse to the uniform output: the teacher's entropy is {metrics['entropy']:.3f} of ln K, so the loss "
            "stays near ln K. Try fewer head.prototypes, a lower loss.teacher_temp, head.batch_norm=true, or a "
            "higher optim.lr."
        )
    if metrics.get("kl", 1.0) < 0.02:
        return (
            "Collapse to one answer: the teacher does not tell images apart (KL to its own mean is "
            f"{metrics['kl']:.3f} nats). Try a higher loss.teacher_temp or a lower loss.center_momentum."
        )
    if metrics["rankme"] < rank and start is not None:
        koleo = "loss.koleo_weight=0.02, " if "entropy" in metrics else ""
        return (
            f"Dimensional collapse: the features share few directions (RankMe {metrics['rankme']:.1f}, "
            f"{start['rankme']:.1f} at the start). Try {koleo}a lower optim.lr or more warm-up."
        )
    return None


class CollapseWatch:
    """Reports a collapse once it lasts, and the recovery; silent on single bad steps.

    Before step `grace` it is silent about a run that began like that, as many do until the learning rate has risen.
    """

    def __init__(self, grace: int, patience: int = 5, start: dict[str, float] | None = None) -> None:
        """
        Args:
            grace: first step that counts in any case.
            patience: consecutive checks that must agree.
            start: the numbers of the run's first check, where that is over; else they are those of the first update.
        """
        self.grace, self.patience, self.start = grace, patience, start
        self._bad = 0
        self._reported = False

    def update(self, step: int, metrics: dict[str, float]) -> str | None:
        """The message to print after this step's `teacher_health`, or None."""
        self.start = self.start or metrics
        message = collapse(metrics, self.start)
        if step < self.grace and collapse(self.start, self.start):
            message = None
        self._bad = self._bad + 1 if message else 0
        if self._reported and not message:
            self._reported = False
            return f"Recovered by step {step}: the teacher tells images apart again."
        if message and self._bad >= self.patience and not self._reported:
            self._reported = True
            return message
        return None


def patience(log_every_steps: int) -> int:
    """Checks that make up 50 steps, but at least 2, and 5 where there are more."""
    return min(5, max(2, 50 // log_every_steps))


SCORE_NOISE = 1.5  # points of accuracy between two scores that mean nothing: two standard errors of some 4,000 images


def falling_score(metrics: list[dict[str, float]]) -> str | None:
    """One sentence when the online k-NN has just been clearly below its best twice in a row; None elsewhere.

    metrics: the lines of metrics.jsonl, in order; the last one is the newest score.
    """
    scored = [number for number, line in enumerate(metrics) if "knn_top1" in line]
    scores = [metrics[number]["knn_top1"] for number in scored]
    if not _is_falling(scores) or _is_falling(scores[:-1]):  # the second: it was told then
        return None
    best = scores.index(max(scores))
    then, now = (_mean_loss(metrics[: scored[which]]) for which in (best, -1))
    losses = ""
    if then is not None and now is not None:
        falls = "although the loss falls" if now < then else "and the loss does not fall either"
        losses = f", {falls} ({then:.2f} -> {now:.2f})"
    return (
        f"The features get worse: the online k-NN was {scores[best]:.1f} at step {metrics[scored[best]]['step']:.0f} "
        f"and is {scores[-2]:.1f} and {scores[-1]:.1f} now{losses}. The views may share something easier than what "
        "is in the pictures. Try a lower optim.lr, less loss.koleo_weight, another loss.centering, stronger "
        "color augmentation, or fewer train.epochs."
    )


def _is_falling(scores: list[float]) -> bool:
    """Are the last two clearly below the best of those before them?"""
    return len(scores) > 2 and max(scores[-2:]) < max(scores[:-2]) - SCORE_NOISE


def _mean_loss(metrics: list[dict[str, float]]) -> float | None:
    losses = [line["loss"] for line in metrics if "loss" in line][-10:]
    return sum(losses) / len(losses) if losses else None


LOST = 0.5  # similarity to the features that a run began with, below which little of them is left


def start_similarity(features: np.ndarray, start: np.ndarray) -> float:
    """How much is left of the features that a run began with: 1 = all, about 0 = nothing.

    The mean cosine between what two networks say of the same images, features and start (n, D), after the mean over the
    images is taken from each: trained features share most of their direction, and the plain cosine of two different
    images is near 1 already.
    """
    ours, theirs = (torch.from_numpy(np.asarray(x, np.float64)) for x in (features, start))
    return float(F.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=-1).mean())


def features_lost(metrics: list[dict[str, float]]) -> str | None:
    """One sentence when the similarity to the run's starting features has just fallen below `LOST`; None elsewhere.

    metrics: the lines of metrics.jsonl, in order; the last one is the newest score.
    """
    lines = [line for line in metrics if "start_similarity" in line]
    if not lines or lines[-1]["start_similarity"] >= LOST:
        return None
    if len(lines) > 1 and lines[-2]["start_similarity"] < LOST:  # it was told then
        return None
    scores = [line["knn_top1"] for line in lines if "knn_top1" in line]
    meanwhile = ""
    if len(scores) > 1:
        meanwhile = f" The online k-NN was {scores[0]:.1f} at the first score and is {scores[-1]:.1f} now."
    return (
        f"The features that this run began with are being lost: their similarity to those of now is "
        f"{lines[-1]['start_similarity']:.2f} (1 = unchanged, 0 = nothing left).{meanwhile} Where they are worth "
        "keeping, try a lower optim.backbone_lr_mult, a longer optim.freeze_backbone_epochs, a lower "
        "optim.layerwise_decay or more loss.anchor_weight."
    )


def nothing_learned(
    metrics: list[dict[str, float]], most_directions: int, batch_norm: bool = False, remedy: str | None = None
) -> str | None:
    """One sentence where the metrics of a whole run show features no better than at its start; None elsewhere.

    Args:
        metrics: the lines of metrics.jsonl, in order.
        most_directions: the largest RankMe possible: min(rows of a step, dimensions).
        batch_norm: has the head batch norm already?
        remedy: what else to try, where the head is not DINO's.
    """
    signs = []
    scores = [line["knn_top1"] for line in metrics if "knn_top1" in line]
    if len(scores) > 1 and scores[-1] <= scores[0] and scores[-1] < 80:  # a higher start cannot rise by much
        signs.append(f"the online k-NN did not rise ({scores[0]:.1f} at its first score, {scores[-1]:.1f} at the end)")
    last = next((line for line in reversed(metrics) if "rankme" in line), None)
    if last and last["rankme"] < 0.1 * most_directions and last["feature_std"] < 0.6:
        signs.append(
            f"the features are nearly alike (RankMe {last['rankme']:.1f} of at most {most_directions}, std "
            f"{last['feature_std']:.2f}, healthy near 1)"
        )
    if not signs:
        return None
    batch_norm_too = "" if batch_norm else "head.batch_norm=true, "
    others = remedy or f"{batch_norm_too}fewer head.prototypes or a larger views.local_crops_scale"
    return (
        f"Little or nothing was learned: {' and '.join(signs)}. Try more train.epochs, another optim.lr, "
        f"{others}; `nearfar eval all RUN --baselines` compares with the untrained network and raw pixels."
    )
