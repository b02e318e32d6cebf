"""A classifier's answers for images, and how good they are: top-1, top-5, per class, confusion."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from nearfar.eval.features.images import Decoding, View, batches, default_workers
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import Classifier


class Predictions(NamedTuple):
    """What a classifier says of the readable images of a source, in their order."""

    probabilities: np.ndarray  # float32 (n, classes)
    rows: np.ndarray  # int64 (n,): which images these are
    bad: dict[str, str]  # name and reason of each image that could not be read


@torch.inference_mode()
def predictions_of(
    classifier: Classifier,
    source: Source,
    size: int,
    resize: int | None,
    decoding: Decoding,
    *,
    bf16: bool = False,
    go_on: Callable[[], None] = lambda: None,
) -> Predictions:
    """Probabilities for the center crops of images, on the classifier's own device and in evaluation mode.

    Args:
        size, resize: side of the crop, and the shorter side before it, in pixels (`eval_view`).
        bf16: autocast; the softmax is in float32.
        go_on: called after every batch; what it raises ends this.

    Raises:
        UserError: no image can be read.
    """
    device = next(classifier.parameters()).device
    step = decoding.batch_size
    numbers = [range(first, min(first + step, len(source))) for first in range(0, len(source), step)]
    workers = default_workers(device, len(numbers)) if decoding.workers is None else decoding.workers
    found, index, bad = [], list[int](), dict[str, str]()
    was_training = classifier.training
    classifier.eval()
    try:
        view = View((size, size), resize, whole=False)
        for batch in batches(source, view, numbers, workers=workers, pinned=device.type == "cuda"):
            index += batch.index
            bad |= dict(batch.bad)
            if batch.images is not None:
                images = normalize_pixels(batch.images.to(device))
                with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                    logits = classifier(images)
                found.append(logits.float().softmax(-1).cpu().numpy())
            if decoding.progress:
                decoding.progress(len(batch.index) + len(batch.bad))
            go_on()
    finally:
        classifier.train(was_training)
    if not found:
        some = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
        raise UserError(f"None of the {len(source)} images could be read, so there is nothing to classify. {some}")
    return Predictions(np.concatenate(found), np.asarray(index, np.int64), bad)


def top(probabilities: np.ndarray, k: int) -> np.ndarray:
    """The k likeliest classes of each row (n, classes), the likeliest first, (n, k); of equal ones the lower number."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]


def accuracies(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """top1 and, with more than five classes, top5, in percent."""
    best = top(probabilities, 5)
    scores = {"top1": 100 * float((best[:, 0] == labels).mean())}
    if probabilities.shape[1] > 5:
        scores["top5"] = 100 * float((best == labels[:, None]).any(1).mean())
    return scores


def detail(probabilities: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """What results.json holds besides the accuracy: JSON-able. A class without images has accuracy None."""
    answers, count = top(probabilities, 1)[:, 0], len(classes)
    confusion = np.bincount(labels * count + answers, minlength=count * count).reshape(count, count)
    totals = confusion.sum(1)
    per_class = [
        100 * float(right) / int(n) if n else None for right, n in zip(confusion.diagonal(), totals, strict=True)
    ]
    return {
        **accuracies(probabilities, labels),
        "images": len(labels),
        "classes": classes,
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }
