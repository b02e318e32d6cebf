"""The health of a run: numbers that show collapse, and messages that explain it (docs/methods.md section 7)."""

from __future__ import annotations

import math

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
        entropy: mean entropy of a row / ln K. 1 = every image gets the flat answer, 0 = a single prototype each.
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


def collapse(metrics: dict[str, float]) -> str | None:
    """What is wrong with these numbers of `teacher_health`, and what to do about it; None when nothing is."""
    if metrics["feature_std"] < 0.05:
        return (
            f"Collapse: all images get nearly the same features (std {metrics['feature_std']:.3f}, healthy near 1). "
            "Try a lower optim.lr or more warm-up."
        )
    if metrics["entropy"] > 0.98:
        return (
            f"Collapse to the flat answer: the teacher's entropy is {metrics['entropy']:.3f} of ln K, so the loss "
            "stays near ln K. Try fewer head.prototypes, a lower loss.teacher_temp, head.batch_norm=true, or a "
            "higher optim.lr."
        )
    if metrics["kl"] < 0.02:
        return (
            "Collapse to one answer: the teacher does not tell images apart (KL to its own mean is "
            f"{metrics['kl']:.3f} nats). Try a higher loss.teacher_temp or a lower loss.center_momentum."
        )
    return None


class CollapseWatch:
    """Reports a collapse once it lasts, and the recovery; silent on single bad steps and before step `grace`."""

    def __init__(self, grace: int, patience: int = 5) -> None:
        """`grace`: first step that counts. `patience`: consecutive checks that must agree."""
        self.grace = grace
        self.patience = patience
        self._bad = 0
        self._reported = False

    def update(self, step: int, metrics: dict[str, float]) -> str | None:
        """The message to print after this step's `teacher_health`, or None."""
        message = collapse(metrics) if step >= self.grace else None
        self._bad = self._bad + 1 if message else 0
        if self._reported and not message:
            self._reported = False
            return f"Recovered by step {step}: the teacher tells images apart again."
        if message and self._bad >= self.patience and not self._reported:
            self._reported = True
            return message
        return None


def nothing_learned(metrics: list[dict[str, float]], most_directions: int, batch_norm: bool = False) -> str | None:
    """One sentence where the metrics of a whole run show features no better than at its start; None elsewhere.

    Args:
        metrics: the lines of metrics.jsonl, in order.
        most_directions: the largest RankMe possible: min(rows of a step, dimensions).
        batch_norm: has the head batch norm already?
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
    return (
        f"Little or nothing was learned: {' and '.join(signs)}. Try more train.epochs, another optim.lr, "
        f"{batch_norm_too}fewer head.prototypes or a larger views.local_crops_scale; `nearfar eval all RUN "
        "--baselines` compares with the untrained network and raw pixels."
    )
