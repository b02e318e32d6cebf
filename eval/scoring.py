"""Evaluators end to end: a backbone and two sources in, percentages out, collected in one results.json."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.eval.features import IGNORE, Features, Size, extract
from nearfar.eval.knn import KS, knn
from nearfar.eval.linear import linear_probe
from nearfar.eval.pixels import pixel_features, pixel_grid
from nearfar.eval.segmentation import segment_probe
from nearfar.eval.store import FeatureStore
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import BadImage, UserError

TASKS = ("knn", "linear", "segment")
HEADLINE_K = 20  # fixed beforehand: choosing the best k by its score would look at the test set


def evaluate(
    backbone: Backbone,
    train: Source,
    test: Source,
    *,
    tasks: Iterable[str] = TASKS,
    size: int,
    resize: int | None = None,
    layer: str = "final",
    pooling: str = "cls",
    linear_layer: str | None = None,
    grid_size: Size | None = None,
    grid_layer: str = "last-block",
    head: str = "linear",
    steps: int | None = None,
    epochs: int = 100,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    amp: bool = False,
    store: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Scores of frozen features: {"knn_top1", "linear_top1", "miou"} of the `tasks` asked for, and details of each.

    k-NN and linear probe read `layer` and `pooling` of center crops of `size` (`linear_layer`, such as "blocks-4",
    where the probe should read more); segmentation reads `grid_layer` of whole images resized to `grid_size`, by
    default the size of the first training image in whole patches. `store`: a folder where features are kept and
    found again; without it they live in memory. Every detail says which weights, layer, norm and PRR it read.
    Raises UserError for unknown tasks, missing labels or masks, and as `describe` and the evaluators do.
    """
    chosen, crop = _known(tasks), size

    def features(size: Size, layer: str, pooling: str) -> tuple[Features, Features]:
        reading: dict[str, Any] = {"size": size, "layer": layer, "pooling": pooling, "amp": amp}
        reading |= {"batch_size": batch_size, "workers": workers, "progress": progress}
        if isinstance(size, tuple):  # larger images in smaller batches: attention maps grow with the square
            reading["batch_size"] = max(1, min(batch_size, batch_size * crop**2 // (size[0] * size[1])))
        else:
            reading["resize"] = resize
        pair = []
        for split, source in (("train", train), ("test", test)):
            if store is None:
                pair.append(extract(backbone, source, **reading))
            else:
                folder = store / f"{split}-{layer}-{pooling.replace('+', '-')}"
                pair.append(FeatureStore.write(folder, backbone, source, **reading))
        return pair[0], pair[1]

    results: dict[str, Any] = {}
    pooled: dict[str, tuple[Features, Features]] = {}
    for task, depth in (("knn", layer), ("linear", linear_layer or layer)):
        if task in chosen:
            if depth not in pooled:
                pooled[depth] = features(size, depth, pooling)
            score = knn_scores(*pooled[depth]) if task == "knn" else linear_scores(*pooled[depth], epochs, seed)
            results |= score
    if "segment" in chosen:
        grid = grid_size or native_grid(train, backbone.patch_size)
        grids = features((grid, grid) if isinstance(grid, int) else grid, grid_layer, "grid")
        results |= segment_scores(*grids, head=head, steps=steps, seed=seed)
    return results


def evaluate_pixels(
    train: Source,
    test: Source,
    *,
    tasks: Iterable[str] = TASKS,
    patch: int,
    side: int = 16,
    grid_size: Size | None = None,
    head: str = "linear",
    steps: int | None = None,
    epochs: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """`evaluate` of raw pixels: thumbnails of side x side for k-NN and linear probe, patches for segmentation."""
    chosen = _known(tasks)
    results: dict[str, Any] = {}
    if "knn" in chosen or "linear" in chosen:
        pair = pixel_features(train, side), pixel_features(test, side)
        results |= knn_scores(*pair) if "knn" in chosen else {}
        results |= linear_scores(*pair, epochs, seed) if "linear" in chosen else {}
    if "segment" in chosen:
        grid = grid_size or native_grid(train, patch)
        pair = pixel_grid(train, grid, patch), pixel_grid(test, grid, patch)
        results |= segment_scores(*pair, head=head, steps=steps, seed=seed)
    return results


def knn_scores(train: Features, test: Features, ks: Iterable[int] = KS) -> dict[str, Any]:
    """knn_top1 at k = 20, and every k under "knn"; k beyond the training set is cut to its size, and said so."""
    ks = sorted({*ks, HEADLINE_K})
    top1 = knn(train.x, _labels(train), test.x, _labels(test), ks)
    headline = min(HEADLINE_K, len(train.x))
    detail: dict[str, Any] = {"k": headline, "top1": {str(k): score for k, score in top1.items()}}
    if ks[-1] > len(train.x):
        detail["capped"] = f"k is at most {len(train.x)}, the number of training images"
    return {"knn_top1": top1[headline], "knn": {**detail, "features": _origin(train, test)}}


def linear_scores(train: Features, test: Features, epochs: int = 100, seed: int = 0) -> dict[str, Any]:
    """linear_top1, and everything else that `linear_probe` says under "linear"."""
    result = linear_probe(train.x, _labels(train), test.x, _labels(test), epochs=epochs, seed=seed)
    return {"linear_top1": result["top1"], "linear": {**result, "features": _origin(train, test)}}


def segment_scores(
    train: Features, test: Features, *, head: str = "linear", steps: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """miou, and everything else that `segment_probe` says under "segment". Classes are those of the masks."""
    masks = train.mask_list(), test.mask_list()
    classes = 1 + max(int(np.max(mask, where=mask != IGNORE, initial=0)) for part in masks for mask in part)
    result = segment_probe(train.x, masks[0], test.x, masks[1], classes=classes, head=head, steps=steps, seed=seed)
    return {"miou": result["miou"], "segment": {**result, "head": head, "features": _origin(train, test)}}


def native_grid(source: Source, patch: int) -> tuple[int, int]:
    """Height and width of the first readable image, rounded to whole patches."""
    for i in range(len(source)):
        try:
            width, height = source.read(i).size
        except BadImage:
            continue
        return max(1, round(height / patch)) * patch, max(1, round(width / patch)) * patch
    raise UserError(f"None of the {len(source)} images could be read.")


def merge_results(file: Path, section: str, scores: dict[str, Any], keep: bool = True) -> dict[str, Any]:
    """Put `scores` into `section` ("trained", "untrained", "pixels") of a results.json, keeping what else is there.

    keep=False drops what the section held. The file is replaced atomically. Returns all results. Raises UserError for a
    file that is not such JSON.
    """
    results: Any = {}
    if file.exists():
        try:
            results = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not readable JSON ({error}); move it away and evaluate again.") from None
        if not isinstance(results, dict) or not isinstance(results.get(section, {}), dict):
            raise UserError(f"{file} does not hold results; move it away and evaluate again.")
    results[section] = {**(results.get(section, {}) if keep else {}), **scores}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    partial.replace(file)
    return dict(results)


def _known(tasks: Iterable[str]) -> set[str]:
    chosen = {tasks} if isinstance(tasks, str) else set(tasks)
    if unknown := chosen - set(TASKS):
        raise UserError(f"Unknown evaluation {', '.join(sorted(unknown))}: use {', '.join(TASKS)}.")
    return chosen


def _labels(features: Features) -> np.ndarray:
    if features.labels is None:
        raise UserError(
            "k-NN and linear probe need labels, and these images have none: use class folders, or a list with labels."
        )
    return features.labels


def _origin(train: Features, test: Features) -> dict[str, Any]:
    """What a score was measured on, short enough to stand beside it."""
    keys = ("checkpoint", "features", "layer", "pooling", "norm", "prr", "size", "view", "compute", "side", "patch")
    origin = {key: train.manifest[key] for key in keys if key in train.manifest}
    unreadable = {"train": len(train.manifest.get("bad", {})), "test": len(test.manifest.get("bad", {}))}
    data = {"train": train.manifest.get("dataset"), "test": test.manifest.get("dataset")}
    return {**origin, "dataset": data, "unreadable": unreadable}
