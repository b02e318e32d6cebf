"""From features to the scores beside the headline ones: whitened k-NN, logistic regression, few labels, retrieval,
position.
"""

from dataclasses import replace
from typing import Any

import torch

from nearfar.eval import fewshot, whitening
from nearfar.eval.arrays import check_classes, check_labeled
from nearfar.eval.features.extraction import Features
from nearfar.eval.logistic import logistic_probe
from nearfar.eval.position import position_probe
from nearfar.eval.retrieval import retrieve
from nearfar.eval.scores.headline_scores import (
    Protocol,
    TaskScore,
    counted_classes,
    knn_score,
    labels_of,
    origin_of,
)
from nearfar.ssl.errors import UserError

HEADLINE_SHOTS = 5


def whitened_score(train: Features, test: Features, *, device: torch.device | str = "cpu") -> TaskScore:
    """`knn_score` after `whitening.fit` on the training features, without their labels.

    Memory: both sets once more, in float32.
    """
    labels_of(train, test)
    if train.x.shape[1:] != test.x.shape[1:]:
        raise UserError(f"k-NN: training features have {train.x.shape[1]} dimensions, test features {test.x.shape[1]}.")
    fitted = whitening.fit(train.x)
    known, queries = (replace(each, x=fitted(each.x).numpy()) for each in (train, test))
    score = knn_score(known, queries, device=device)
    return TaskScore("whitened", score.percent, {**score.detail, "shrinkage": fitted.shrinkage})


def logistic_score(train: Features, test: Features, *, device: torch.device | str = "cpu") -> TaskScore:
    """Top-1 of logistic regression, solved to its optimum: what the linear probe's SGD should come near to."""
    y, truth = labels_of(train, test)
    result = logistic_probe(train.x, y, test.x, truth, device=device)
    return TaskScore("logistic", result["top1"], {**result, "features": origin_of(train, test)})


def fewshot_score(
    train: Features, test: Features, protocol: Protocol, *, device: torch.device | str = "cpu"
) -> TaskScore:
    """Top-1 with 5 labeled images a class (fewer where a class has no 5), the mean of 5 draws; the detail has the
    others, and shares of the labels, each with its deviation.

    Shots beyond the smallest class are left out, and the detail says so.
    """
    y, truth = labels_of(train, test)
    what = "training set of the few-shot evaluation"
    labels = check_labeled(train.x, y, what)
    check_classes(labels, what, train.manifest.get("classes"))
    smallest = int(torch.bincount(labels).min())
    shots = [shot for shot in fewshot.SHOTS if shot <= smallest]
    common: dict[str, Any] = {"seed": protocol.seed, "device": device}
    by_shot = fewshot.few_shot(train.x, y, test.x, truth, shots=shots, **common)
    by_share = fewshot.few_labels(train.x, y, test.x, truth, **common)
    headline = max(shot for shot in shots if shot <= HEADLINE_SHOTS)
    detail: dict[str, Any] = {
        "headline_shots": headline,
        "shots": {str(shot): found for shot, found in by_shot.items()},
        "percent_of_labels": {f"{100 * share:g}": found for share, found in by_share.items()},
        "train": len(y),
        "test": len(truth),
    }
    if len(shots) < len(fewshot.SHOTS):
        left = ", ".join(str(shot) for shot in fewshot.SHOTS if shot not in shots)
        detail["left_out"] = f"{left} images a class: the smallest class has {smallest}"
    return TaskScore("fewshot", by_shot[headline]["mean"], {**detail, "features": origin_of(train, test)})


def retrieval_score(
    train: Features,
    test: Features,
    protocol: Protocol,
    classes: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> TaskScore:
    """mIoU of dense retrieval. classes: None counts those of the masks, and refuses what is no class number."""
    masks = train.mask_list(), test.mask_list()
    if classes is None:
        classes = counted_classes(train, test, *masks)
    result = retrieve(
        train.x, masks[0], test.x, masks[1],
        classes=classes, memory=protocol.memory, seed=protocol.seed, device=device,
    )  # fmt: skip
    return TaskScore("retrieval", result["miou"], {**result, "classes": classes, "features": origin_of(train, test)})


def position_score(train: Features, test: Features) -> TaskScore:
    """R2, in percent, of a linear map from patch tokens to their row and column; both sides in the detail."""
    if train.x.ndim != 4 or test.x.ndim != 4:
        raise UserError("The position probe needs grids of patches (--pooling grid).")
    result = position_probe(train.x, test.x)
    detail = {**result, "images": [len(train.x), len(test.x)], "grid": list(train.x.shape[1:3])}
    return TaskScore("position", 100.0 * result["r2"], {**detail, "features": origin_of(train, test)})
