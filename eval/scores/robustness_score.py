"""What perturbed test images cost: one pass over them, every perturbation of a batch at once, k-NN for each.

The neighbors come from clean training images, so nothing is trained, and a drop is a change of the features only.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearfar.eval import robustness
from nearfar.eval.features.extraction import Features, Reading, eval_mode, manifest_of, read
from nearfar.eval.features.images import Decoding, View, batches, default_workers
from nearfar.eval.knn import knn
from nearfar.eval.results import CLEAN
from nearfar.eval.scores.headline_scores import HEADLINE_K, TaskScore, labels_of, origin_of, same_images
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import UserError

HEADLINE = "patch shuffle"


class Perturbation(NamedTuple):
    """images: normalized (B, 3, H, W) -> what the network sees. network: a context in which it runs."""

    images: Callable[[Tensor], Tensor]
    network: Callable[[], AbstractContextManager[Any]] = nullcontext


def perturbations(backbone: Backbone, size: int, seed: int) -> dict[str, Perturbation]:
    """Every perturbation by its name, "clean" first; not every network allows each of them (a UserError then).

    size: side of the test images in pixels. Random orders follow from the seed alone.
    """
    orders = [torch.Generator().manual_seed(seed + number) for number in range(2)]
    patch = backbone.patch_size

    def bands() -> AbstractContextManager[None]:  # the same order in every batch
        return robustness.bands_shuffled(backbone, torch.Generator().manual_seed(seed))

    def resized(factor: float) -> Perturbation:
        side = max(patch, round(factor * size / patch) * patch)
        return Perturbation(partial(robustness.at_resolution, side=side))

    return {
        CLEAN: Perturbation(_unchanged),
        HEADLINE: Perturbation(partial(robustness.shuffle_patches, patch_size=patch, generator=orders[0])),
        "token shuffle": Perturbation(_unchanged, partial(robustness.tokens_shuffled, backbone, orders[1])),
        "band shuffle": Perturbation(_unchanged, bands),
        "half the size": resized(0.5),
        "1.5 times the size": resized(1.5),
        "detail lost, 2x": Perturbation(partial(robustness.coarsened, factor=2.0)),
        "detail lost, 4x": Perturbation(partial(robustness.coarsened, factor=4.0)),
        "mirrored": Perturbation(robustness.flipped),
        "upside down": Perturbation(partial(robustness.flipped, vertical=True)),
        "blur, sigma 1": Perturbation(partial(robustness.blurred, sigma=1.0)),
        "blur, sigma 3": Perturbation(partial(robustness.blurred, sigma=3.0)),
    }


def perturbed_features(
    backbone: Backbone, source: Source, reading: Reading, decoding: Decoding, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, str]]:
    """Pooled features (n, D) under each perturbation, the rows of `source` they are of, and what is left out and why.

    Every image is decoded once. Raises UserError as `manifest_of` does, and where no image can be read.
    """
    device = next(backbone.parameters()).device
    (size, _) = manifest_of(backbone, source, reading)["size"]
    n, step = len(source), decoding.batch_size
    numbers = [range(first, min(first + step, n)) for first in range(0, n, step)]
    workers = default_workers(device, len(numbers)) if decoding.workers is None else decoding.workers
    view = View((size, size), reading.resize, whole=False)
    ways = perturbations(backbone, size, seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    left_out: dict[str, str] = {}
    index: list[int] = []
    with eval_mode(backbone), torch.inference_mode():
        for batch in batches(source, view, numbers, workers=workers, pinned=device.type == "cuda"):
            index += batch.index
            if batch.images is None:
                continue
            images = normalize_pixels(batch.images).to(device)
            for name, x in _each(backbone, images, reading, ways, left_out):
                found[name].append(x)
    if not index:
        raise UserError(f"None of the {n} images could be read, so there is nothing to perturb.")
    return (
        {name: np.concatenate(parts) for name, parts in found.items() if name not in left_out},
        np.asarray(index, np.int64),
        left_out,
    )


def robustness_score(
    backbone: Backbone, train: Features, test: Source, reading: Reading, decoding: Decoding, seed: int
) -> TaskScore:
    """k-NN top-1 of shuffled patches; every perturbation with its drop from clean images in the detail.

    train: features of clean training images under the same reading.
    """
    by_name, index, left_out = perturbed_features(backbone, test, reading, decoding, seed)
    labels = None if test.labels is None else test.labels[index]
    clean = Features(by_name[CLEAN], index, labels, manifest={"dataset": test.fingerprint, "classes": test.classes})
    if same_images(train, clean):
        raise UserError(
            "Robustness is scored on other images than those it learns from, and --train and --val name the same."
        )
    if HEADLINE in left_out:
        raise UserError(f"The patches of these images cannot be shuffled: {left_out[HEADLINE]}")
    y, truth = labels_of(train, clean)
    device = next(backbone.parameters()).device
    k = min(HEADLINE_K, len(train.x))
    top1 = {name: knn(train.x, y, x, truth, (k,), device=device)[k] for name, x in by_name.items()}
    table = {name: {"top1": value, "drop": top1[CLEAN] - value} for name, value in top1.items()}
    detail: dict[str, Any] = {"k": k, "table": table, "train": len(train.x), "test": len(truth)}
    if left_out:
        detail["left_out"] = left_out
    return TaskScore("robustness", top1[HEADLINE], {**detail, "features": origin_of(train, clean)})


def _each(
    backbone: Backbone, images: Tensor, reading: Reading, ways: dict[str, Perturbation], left_out: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The features of one batch under each perturbation; those that the network refuses join `left_out`."""
    for name, way in ways.items():
        if name in left_out:
            continue
        try:
            with way.network(), torch.autocast(images.device.type, torch.bfloat16, enabled=reading.amp):
                x = read(backbone, way.images(images), reading.layer, reading.pooling)
        except UserError as error:
            if name == CLEAN:
                raise
            left_out[name] = str(error)
            continue
        yield name, x.float().cpu().numpy()


def _unchanged(images: Tensor) -> Tensor:
    return images
