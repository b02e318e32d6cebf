"""`nearfar predict`: a classifier's answers for images, as a .csv with one line an answer."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nearfar.eval.classification import Predictions, accuracies, predictions_of, top
from nearfar.eval.features.images import Decoding
from nearfar.launch.computing import compute_for
from nearfar.launch.progress import progress, summed
from nearfar.ssl import checkpoint
from nearfar.ssl.data import open_source
from nearfar.ssl.data.labels import labels_as
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import gpus
from nearfar.ssl.wording import printable

_SHOWN = 3  # unreadable images that are named


@dataclass(frozen=True)
class PredictOptions:
    """top: answers for each image. size, resize: of the image in pixels, in place of those of the run."""

    top: int = 1
    size: int | None = None
    resize: int | None = None
    device: str = "auto"
    workers: int | None = None


def predict_images(model: Path, images: str, target: Path, options: PredictOptions, console: Console) -> None:
    """Classify the images with `model` and write `target`: file, rank, class, probability. What cannot be read is named
    and left out; where the images have labels, the accuracy is told.

    Raises:
        UserError: the model has no head, there are no images, none can be read, or the file cannot be written.
    """
    classifier = checkpoint.load_classifier(model)
    source = open_source(images)
    size, resize = _sizes(checkpoint.about(model), options, model)
    if not 1 <= options.top <= len(classifier.classes):
        raise UserError(
            f"--top {options.top} is not possible: {model} knows {len(classifier.classes)} classes, so give 1 to "
            f"{len(classifier.classes)}."
        )
    try:
        files.check_writable(target)
    except OSError as error:
        raise UserError(f"The answers cannot be written to {target}: {error.strerror or error}.") from None
    compute = compute_for(classifier.backbone, options.device)
    gpus.require_room(compute.device, sum(p.nbytes for p in classifier.parameters()), "the weights")
    with progress(len(source), f"Classifying {images}", console) as report:
        decoding = Decoding(workers=options.workers, progress=summed(report))
        found = predictions_of(classifier.to(compute.device), source, size, resize, decoding, bf16=compute.bf16)
    _write(target, source, classifier.classes, found, options.top)
    say = _sayer(console)
    say(f"{target}: {len(found.rows):,} images, {len(found.bad):,} unreadable ones left out")
    for name, why in list(found.bad.items())[:_SHOWN]:
        say(f"Left out: {name}: {why}")
    if len(found.bad) > _SHOWN:
        say(f"Left out: ... and {len(found.bad) - _SHOWN:,} more")
    if source.labels is not None:
        _tell_accuracy(source, images, classifier.classes, found, say)


def _sizes(about: dict[str, Any], options: PredictOptions, model: Path) -> tuple[int, int | None]:
    """Side of the crop and shorter side before it: as given, else as the run was scored."""
    settings = about.get("run")
    known = settings.get("eval") if isinstance(settings, dict) else None
    sizes = known if isinstance(known, dict) else {}
    size, resize = options.size or sizes.get("size"), options.resize or sizes.get("resize")
    if not isinstance(size, int) or not 4 <= size <= 4096:
        raise UserError(f"{model} does not say at which size it was trained: give --size.")
    if options.size and not options.resize and isinstance(sizes.get("size"), int) and isinstance(resize, int):
        resize = round(resize * size / sizes["size"])  # the same share of an image
    if resize is not None and (not isinstance(resize, int) or resize < size):
        raise UserError(f"A crop of {size} pixels does not fit into images resized to {resize}: give --resize.")
    return size, resize


def _write(target: Path, source: Source, classes: list[str], found: Predictions, count: int) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "rank", "class", "probability"])
    best = top(found.probabilities, count)
    for i, answers, shares in zip(found.rows.tolist(), best.tolist(), found.probabilities, strict=True):
        for rank, answer in enumerate(answers, 1):
            rows.writerow([source.name(i), rank, classes[answer], f"{shares[answer]:.6f}"])
    try:
        files.write_text(target, text.getvalue())
    except OSError as error:
        raise UserError(f"The answers cannot be written to {target}: {error.strerror or error}.") from None


def _tell_accuracy(
    source: Source, images: str, classes: list[str], found: Predictions, say: Callable[[str], None]
) -> None:
    try:
        labels = labels_as(classes, source, images)
    except UserError as error:
        say(f"No accuracy: {error}")
        return
    scores = accuracies(found.probabilities, np.asarray(labels)[found.rows])
    say(f"Accuracy on the labels of {images}: " + ", ".join(f"{name} {score:.2f} %" for name, score in scores.items()))


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
