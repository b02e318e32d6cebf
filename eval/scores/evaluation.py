"""Evaluators end to end: a backbone and two sources in, percentages out, each as soon as it is computed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from nearfar.eval.features.extraction import DEFAULT_DECODING, Features, Reading, Size, eval_mode, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.pixels import pixel_features, pixel_grid
from nearfar.eval.scores.augmented import augmented_score
from nearfar.eval.scores.further_scores import (
    fewshot_score,
    logistic_score,
    position_score,
    retrieval_score,
    whitened_score,
)
from nearfar.eval.scores.headline_scores import (
    PIXEL_SIDE,
    POSITION_IMAGES,
    Protocol,
    TaskScore,
    knn_score,
    linear_score,
    native_grid,
    segment_score,
)
from nearfar.eval.scores.robustness_score import robustness_score
from nearfar.eval.scores.tasks import TASKS
from nearfar.eval.scores.window_score import Frozen, window_score
from nearfar.ssl.backbones.tokens import Backbone, check_divides
from nearfar.ssl.data.sources.base import Source, spread
from nearfar.ssl.errors import UserError

Pair = tuple[Features, Features]


def evaluate(
    backbone: Backbone,
    data: tuple[Source, Source],
    protocol: Protocol,
    tasks: Iterable[str] = TASKS,
    classes: int | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> Iterator[TaskScore]:
    """Scores of frozen features on (training, test) images, one task after the other, as `tasks.plan` says.

    Features, neighbors and heads are computed on the device that the backbone is on.

    classes: of the masks; None counts them. A task's features are made when its turn comes, and shared by the tasks
    that read the same. Raises UserError as `manifest_of` and the evaluators do.
    """
    reads, chosen = _Reads(backbone, data, protocol, decoding), set(tasks)
    for task in TASKS:
        if task in chosen:
            yield _score(task, reads, classes)


class _Reads:
    """Features of both sets, made when they are first asked for; pooled ones are kept, and the last grids."""

    def __init__(self, backbone: Backbone, data: tuple[Source, Source], protocol: Protocol, decoding: Decoding) -> None:
        self.backbone, self.data, self.protocol, self.decoding = backbone, data, protocol, decoding
        self.device = next(backbone.parameters()).device
        self._pooled: dict[Reading, Pair] = {}

    def pooled(self, reading: Reading | None = None) -> Pair:
        """As the protocol says, or as `reading`."""
        reading = reading or self.protocol.pooled
        if reading not in self._pooled:
            train, test = (extract(self.backbone, source, reading, self.decoding) for source in self.data)
            self._pooled[reading] = train, test
        return self._pooled[reading]

    def grid(self, source: Source, size: Size, layer: str, decoding: Decoding) -> Features:
        height, width = sides(size)
        reading = Reading((height, width), layer=layer, pooling="grid", amp=self.protocol.pooled.amp)
        side = self.protocol.pooled.size
        crop = side * side if isinstance(side, int) else side[0] * side[1]
        # larger images in smaller batches: attention maps grow with the square
        batch = max(1, min(decoding.batch_size, decoding.batch_size * crop // (height * width)))
        return extract(self.backbone, source, reading, replace(decoding, batch_size=batch))

    def grids(self, task: str) -> Pair:
        """Of whole images with masks."""
        (layer,) = self.protocol.layers(task)
        size = self.protocol.grid_size or native_grid(self.data[0], self.backbone.patch_size)
        train, test = (self.grid(source, size, layer, self.decoding) for source in self.data)
        return train, test

    def position_grids(self) -> Pair:
        """Of at most `POSITION_IMAGES` whole images of each set, squeezed into squares; by this process alone."""
        (layer,) = self.protocol.layers("position")
        alone = replace(self.decoding, shared=False)  # other ranks know the whole sets only
        size = self.protocol.pooled.size
        train, test = (self.grid(spread(source, POSITION_IMAGES), size, layer, alone) for source in self.data)
        return train, test


def _score(task: str, reads: _Reads, classes: int | None) -> TaskScore:
    protocol, device = reads.protocol, reads.device
    match task:
        case "knn":
            return knn_score(*reads.pooled(), device=device)
        case "whitened":
            return whitened_score(*reads.pooled(), device=device)
        case "linear":
            return _linear(reads)
        case "logistic":
            return logistic_score(*reads.pooled(), device=device)
        case "fewshot":
            return fewshot_score(*reads.pooled(), protocol, device=device)
        case "segment":
            return _segment(reads, classes)
        case "retrieval":
            return retrieval_score(*reads.grids("retrieval"), protocol, classes, device=device)
        case "robustness":
            train, test = reads.pooled()[0], reads.data[1]
            return robustness_score(reads.backbone, train, test, protocol.pooled, reads.decoding, protocol.seed)
        case "position":
            return position_score(*reads.position_grids())
    raise AssertionError(f"nothing scores {task}")


def _linear(reads: _Reads) -> TaskScore:
    readings = reads.protocol.linear_readings()
    if reads.protocol.augment and len(readings) > 1:
        raise UserError(
            f"--augment trains on one kind of feature, and --layer and --pooling name {len(readings)}: "
            f"{', '.join(readings)}."
        )
    pairs = {name: reads.pooled(reading) for name, reading in readings.items()}
    if not reads.protocol.augment:
        return linear_score(pairs, reads.protocol, device=reads.device)
    ((name, reading),) = readings.items()
    return augmented_score(reads.backbone, reads.data[0], pairs[name], reading, reads.protocol, reads.decoding)


def _segment(reads: _Reads, classes: int | None) -> TaskScore:
    """By grids of whole images; where windows are asked for, or the head is LocAt's, of test images at their size."""
    protocol, backbone = reads.protocol, reads.backbone
    if protocol.head != "locat" and protocol.window is None:
        return segment_score(*reads.grids("segment"), protocol, classes, device=reads.device)
    frozen = Frozen.of(backbone, reads.data[0], protocol.grid_layer, protocol.pooled.amp)
    grids = None
    if protocol.head != "locat":
        size = protocol.grid_size or native_grid(reads.data[0], backbone.patch_size)
        grids = reads.grid(reads.data[0], size, protocol.grid_layer, reads.decoding)
    with eval_mode(backbone):
        return window_score(frozen, reads.data, protocol, classes, grids, reads.decoding)


def evaluate_pixels(
    data: tuple[Source, Source],
    protocol: Protocol,
    tasks: Iterable[str] = TASKS,
    classes: int | None = None,
    patch: int = 16,
    device: torch.device | str = "cpu",
) -> Iterator[TaskScore]:
    """`evaluate` of raw pixels: thumbnails in place of image features, patches in place of tokens.

    Robustness is left out: what a shuffle of patches does to pixels is no property of a network.
    """
    chosen = set(tasks)
    if chosen & {"knn", "whitened", "linear", "logistic", "fewshot"}:
        thumbnails = pixel_features(data[0], PIXEL_SIDE), pixel_features(data[1], PIXEL_SIDE)
        if "knn" in chosen:
            yield knn_score(*thumbnails, device=device)
        if "whitened" in chosen:
            yield whitened_score(*thumbnails, device=device)
        if "linear" in chosen:
            yield linear_score({"pixels": thumbnails}, protocol, device=device)
        if "logistic" in chosen:
            yield logistic_score(*thumbnails, device=device)
        if "fewshot" in chosen:
            yield fewshot_score(*thumbnails, protocol, device=device)
    size = protocol.grid_size
    if "segment" in chosen:
        yield _segment_pixels(data, protocol, classes, patch, device)
    if "retrieval" in chosen:
        size = size or native_grid(data[0], patch)
        grids = pixel_grid(data[0], size, patch), pixel_grid(data[1], size, patch)
        yield retrieval_score(*grids, protocol, classes, device=device)
    if "position" in chosen:
        square = protocol.pooled.size
        yield position_score(*(pixel_grid(spread(source, POSITION_IMAGES), square, patch) for source in data))


def _segment_pixels(
    data: tuple[Source, Source], protocol: Protocol, classes: int | None, patch: int, device: torch.device | str
) -> TaskScore:
    size = protocol.grid_size or native_grid(data[0], patch)
    if protocol.head == "locat":
        return window_score(Frozen.pixels(patch, device), data, protocol, classes)
    train = pixel_grid(data[0], size, patch)
    if protocol.window is not None:
        return window_score(Frozen.pixels(patch, device), data, protocol, classes, train)
    return segment_score(train, pixel_grid(data[1], size, patch), protocol, classes, device=device)


def check_grid_size(protocol: Protocol, tasks: Iterable[str], patch: int) -> None:
    """Raises UserError where one of the tasks reads grids of whole images, and patches do not divide their size."""
    grids = {"retrieval"} if protocol.head == "locat" else {"segment", "retrieval"}
    if protocol.grid_size and grids & set(tasks):
        check_divides(*sides(protocol.grid_size), patch)


def sides(size: Size) -> tuple[int, int]:
    """Height and width of images of a size."""
    return (size, size) if isinstance(size, int) else size
