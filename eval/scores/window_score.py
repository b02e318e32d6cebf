"""Segmentation of test images at their own sizes, by a head trained on crops (LocAt) or on grids of whole images."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearfar.eval.features.extraction import DEFAULT_DECODING, Features, Reading, eval_mode, manifest_of, read
from nearfar.eval.features.images import Decoding, default_workers, fitting_mask
from nearfar.eval.features.pixels import pixel_map
from nearfar.eval.scores.headline_scores import Protocol, TaskScore, native_grid
from nearfar.eval.scores.tasks import mask_classes, masks_of
from nearfar.eval.segmentation import (
    ProbeTraining,
    check_grid,
    grid_statistics,
    iou_scores,
    mask_logits,
    pixel_confusion,
    resized_mask,
    train_head,
)
from nearfar.eval.segmentation_crops import CropTraining, FeatureMap, train_on_crops
from nearfar.eval.segmentation_windows import Logits, Windows, predicted_classes
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import BadImage, UserError

LOCAT_CROP = 512


class Frozen(NamedTuple):
    """Frozen feature maps: how they are made, their width, the patch, the device, and what they are, for a score."""

    features: FeatureMap
    dim: int
    patch: int
    device: torch.device
    about: dict[str, Any]

    @staticmethod
    def of(backbone: Backbone, source: Source, layer: str, amp: bool) -> "Frozen":
        """A backbone's patch tokens at a layer; put it into eval mode while they are made."""
        patch, device = backbone.patch_size, next(backbone.parameters()).device
        manifest = manifest_of(backbone, source, Reading((patch, patch), layer=layer, pooling="grid", amp=amp))
        keys = ("checkpoint", "layer", "pooling", "norm", "prr", "compute")

        def features(images: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                return read(backbone, images, layer, "grid").permute(0, 3, 1, 2).float()

        with torch.inference_mode(), eval_mode(backbone):
            dim = features(torch.zeros(1, 3, patch, patch, device=device)).shape[1]
        return Frozen(features, dim, patch, device, {key: manifest[key] for key in keys})

    @staticmethod
    def pixels(patch: int, device: torch.device | str) -> "Frozen":
        about = {"features": "pixels", "patch": patch}
        return Frozen(lambda images: pixel_map(images, patch), 3 * patch * patch, patch, torch.device(device), about)


def window_score(
    frozen: Frozen,
    data: tuple[Source, Source],
    protocol: Protocol,
    classes: int | None = None,
    grids: Features | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> TaskScore:
    """mIoU of test images at their own sizes, by windows that slide over them.

    grids: of whole training images, for a "linear" or "mlp" head; without them the head is LocAt's, trained on crops of
    the windows' side. classes: None counts those of the masks.
    """
    train, test = data
    if classes is None:
        classes = mask_classes(pair for source in data for pair in masks_of(source))
    windows = _windows(protocol, train, frozen.patch)
    if grids is None:
        head = _locat(frozen, train, classes, windows, protocol, decoding)
    else:
        head = _on_grids(frozen, grids, classes, protocol)
    table, left, rescaled = _confusion(test, head.logits_of, windows, classes, frozen.device)
    detail: dict[str, Any] = {
        **iou_scores(table), **head.how, "head": protocol.head, "classes": classes, "window": windows.side,
        "stride": windows.stride, "train": len(train) - len(head.bad), "test": len(test) - len(left),
    }  # fmt: skip
    unreadable = {name: _counted(named) for name, named in (("train", head.bad), ("test", left))}
    origin = {**frozen.about, "unreadable": unreadable}
    if rescaled:
        origin["rescaled_masks"] = {"train": None, "test": {"count": len(rescaled), "first": rescaled[0]}}
    return TaskScore("segment", detail["miou"], {**detail, "features": origin})


class _TrainedHead(NamedTuple):
    """Images -> logits, the training images that could not be read, and how it was trained."""

    logits_of: Logits
    bad: dict[str, str]
    how: dict[str, Any]


def _locat(
    frozen: Frozen, train: Source, classes: int, windows: Windows, protocol: Protocol, decoding: Decoding
) -> _TrainedHead:
    side = windows.side or _default_side(train, frozen.patch)
    steps = CropTraining.steps if protocol.steps is None else protocol.steps
    workers = default_workers(frozen.device, steps) if decoding.workers is None else decoding.workers
    training = CropTraining(side, steps, seed=protocol.seed, workers=workers)
    head, bad = train_on_crops(frozen.features, frozen.dim, train, classes, training, frozen.device)

    def logits_of(images: Tensor) -> Tensor:
        return mask_logits(head, frozen.features(images), images.shape[-2:])

    how = {"steps": steps, "crop": side, "scales": list(training.scales), "flips": True}
    return _TrainedHead(logits_of, bad, how)


def _on_grids(frozen: Frozen, grids: Features, classes: int, protocol: Protocol) -> _TrainedHead:
    masks = grids.mask_list()
    probe = ProbeTraining(head=protocol.head, steps=protocol.steps, seed=protocol.seed)
    check_grid(grids.x, masks, classes, probe.ignore, "training set of the segmentation probe")
    statistics = grid_statistics(grids.x, frozen.device)
    head = train_head(grids.x, masks, statistics, classes, probe)
    mean, std = (each[:, None, None] for each in statistics)

    def logits_of(images: Tensor) -> Tensor:
        return mask_logits(head, (frozen.features(images) - mean) / std, images.shape[-2:])

    return _TrainedHead(logits_of, grids.manifest.get("bad", {}), {"steps": probe.steps_taken})


def _windows(protocol: Protocol, train: Source, patch: int) -> Windows:
    side = _default_side(train, patch) if protocol.window is None else protocol.window
    return Windows.of(side, protocol.stride, patch)


def _default_side(train: Source, patch: int) -> int:
    """512 as in the paper, or the shorter side of the first image in whole patches where that is smaller."""
    return min(LOCAT_CROP // patch * patch, *native_grid(train, patch))


def _confusion(
    test: Source, logits_of: Logits, windows: Windows, classes: int, device: torch.device
) -> tuple[np.ndarray, dict[str, str], list[str]]:
    """Pixel counts (truth, predicted) at each mask's own size; images left out and why; masks of another size."""
    table = np.zeros((classes, classes), np.int64)
    bad: dict[str, str] = {}
    rescaled: list[str] = []
    for i in range(len(test)):
        try:
            image = test.read(i)
            mask, note = fitting_mask(test, i, (image.height, image.width))
        except BadImage as error:
            bad[error.name] = error.why
            continue
        if mask is None:
            raise UserError(f"The image {test.name(i)} has no mask: give every image one, or leave it out.")
        rescaled += [note] if note else []
        pixels = normalize_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1)).to(device)
        predicted = predicted_classes(pixels, logits_of, windows)
        table += pixel_confusion(resized_mask(predicted, (mask.shape[0], mask.shape[1])), mask, classes)
    if len(bad) == len(test):
        some = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
        raise UserError(f"None of the {len(test)} test images could be read. {some}")
    return table, bad, rescaled


def _counted(bad: dict[str, str]) -> dict[str, Any]:
    return {"count": len(bad), "first": next((f"{name}: {why}" for name, why in bad.items()), None)}
