"""The linear probe as DINO trains it: on random views of the training images, each a random resized crop, mirrored half
of the time, that goes through the frozen backbone anew (docs/methods.md section 5).
"""

import logging
import math
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.eval.arrays import check_classes, check_labeled
from nearfar.eval.features.extraction import Features, Reading, eval_mode, read
from nearfar.eval.features.images import Decoding, default_workers
from nearfar.eval.linear import (
    LEARNING_RATES,
    WEIGHT_DECAYS,
    StandardizedRows,
    Sweep,
    best_setting,
    score_heads,
    standardize,
    stratified,
)
from nearfar.eval.scores.headline_scores import Protocol, TaskScore, labels_of, origin_of
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.loaders.base import LoaderOptions
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import Source, Subset
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.linear import LinearHeads
from nearfar.ssl.settings.run import ViewSettings

log = logging.getLogger(__name__)
SCALE = (0.08, 1.0)  # of the image's area, as torchvision's RandomResizedCrop has it
_BATCH = 256
_VIEWS = 2  # of one decoded image: two epochs of the probe cost one of decoding
_TIMED = 5


def augmented_score(
    backbone: Backbone,
    source: Source,
    pair: tuple[Features, Features],
    reading: Reading,
    protocol: Protocol,
    decoding: Decoding,
) -> TaskScore:
    """Top-1 of a linear classifier trained on views of `source`, scored on clean test features.

    pair: clean (training, test) features under the same reading; the training ones give the statistics by which
    features are standardized, and the held-out tenth (of each class) that chooses rate and decay. Unlike without
    augmentation the chosen head is not trained afresh with that tenth: it would double the cost. Raises UserError as
    `linear_probe` does.
    """
    what = "training set of the linear probe"
    device = next(backbone.parameters()).device
    y, truth = labels_of(*pair)
    labels, test_labels = (
        check_labeled(pair[0].x, y, what),
        check_labeled(pair[1].x, truth, "test set of the linear probe"),
    )
    classes = max(check_classes(labels, what, pair[0].manifest.get("classes")), int(test_labels.max()) + 1)
    held = stratified(labels, 0.1, protocol.seed)
    clean = standardize(pair[0].x, device, what)
    kept = Subset(source, pair[0].index[~held.numpy()])
    settings = list(product(LEARNING_RATES, WEIGHT_DECAYS))
    size = reading.size if isinstance(reading.size, int) else reading.size[0]
    loader = view_loader(kept, size, protocol.epochs, protocol.seed, decoding.workers, device)
    steps = loader.options.epochs * loader.steps_per_epoch * _VIEWS
    heads = LinearHeads(pair[0].x.shape[1], classes, len(settings)).to(device)
    sweep = Sweep(heads, settings, loader.options.batch_size, steps)
    began = time.monotonic()
    for step, (x, target) in enumerate(viewed_features(backbone, loader, reading)):
        sweep.step((x - clean.mean) * clean.scale, target)
        if step + 1 == _TIMED and steps > _TIMED:
            left = (time.monotonic() - began) / _TIMED * (steps - _TIMED)
            log.info("Training the linear probe on views: %d steps, about %.0f minutes", steps, left / 60)
    scores = score_heads(heads, clean, labels, torch.nonzero(held).flatten(), what)
    rows = [
        {"lr": lr, "decay": decay, "top1": top1, "loss": loss}
        for (lr, decay), top1, loss in zip(settings, scores["top1"], scores["loss"], strict=True)
    ]
    best = best_setting(rows, int(held.sum()))
    if best is None:
        raise UserError(f"Linear probe: training diverged at every rate of {list(LEARNING_RATES)}.")
    queries = StandardizedRows(pair[1].x, device, clean.mean, clean.scale)
    number = rows.index(best)
    found = score_heads(heads, queries, test_labels, torch.arange(len(test_labels)), "test set of the linear probe")
    detail: dict[str, Any] = {key: values[number] for key, values in found.items() if key.startswith("top")}
    detail |= {"lr": best["lr"], "decay": best["decay"], "holdout": rows, "epochs": protocol.epochs, "classes": classes}
    detail |= {"augment": {"scale": list(SCALE), "flip": 0.5}, "train": len(kept), "test": len(test_labels)}
    return TaskScore("linear", detail["top1"], {**detail, "features": origin_of(*pair)})


def view_loader(
    source: Source, size: int, epochs: int, seed: int, workers: int | None, device: torch.device
) -> PillowLoader:
    """Two views of every image a pass, pure functions of (seed, pass, image, view): crops of `SCALE`, half mirrored."""
    views = ViewSettings(
        global_crops_size=size, global_crops_scale=SCALE, local_crops_number=0, hflip_prob=0.5, color_jitter_prob=0.0,
        grayscale_prob=0.0, blur_prob=(0.0, 0.0, 0.0), solarize_prob=(0.0, 0.0, 0.0),
    )  # fmt: skip
    passes, batch_size = math.ceil(epochs / _VIEWS), min(_BATCH, len(source))
    workers = default_workers(device, passes * len(source)) if workers is None else workers
    return PillowLoader(source, views, LoaderOptions(batch_size, passes, seed, workers, min_side=1))


@torch.no_grad()
def viewed_features(backbone: Backbone, loader: PillowLoader, reading: Reading) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, D) of one view after the other, and the classes (B,), on the backbone's device."""
    device = next(backbone.parameters()).device
    with eval_mode(backbone):
        for batch in loader:
            assert batch.label is not None
            target = torch.from_numpy(np.asarray(batch.label, np.int64)).to(device)
            for view in batch.views:
                images = normalize_pixels(view).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=reading.amp):
                    x = read(backbone, images, reading.layer, reading.pooling)
                yield x.float(), target
