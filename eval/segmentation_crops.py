"""A segmentation head trained on random crops through a frozen backbone: the protocol of LocAt (docs/methods.md
section 3), with crops, flips and scales that features extracted once cannot have.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nearfar.eval.features.extraction import IGNORE
from nearfar.eval.features.images import fitting_mask, quiet_worker
from nearfar.eval.segmentation import resized_mask
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.data.views import epoch_order
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.heads.segmentation import SegmentationHead

log = logging.getLogger(__name__)
FeatureMap = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, H, W) -> frozen feature maps (B, D, h, w)."""
_TIMED = 5  # steps after which the log says how long all will take


@dataclass(frozen=True)
class CropTraining:
    """LocAt's settings, but for `crop`, which is 512 in the paper. workers: processes that cut crops."""

    crop: int
    steps: int = 20_000
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    scales: tuple[float, float] = (0.5, 2.0)
    seed: int = 0
    workers: int = 0


class Crop(NamedTuple):
    """A crop of a scaled image: its left upper corner and the sides of the scaled image in pixels, and the mirror."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def plan_crop(size: tuple[int, int], training: CropTraining, epoch: int, i: int) -> Crop:
    """A pure function of (seed, epoch, image): scale uniform in `scales`, place uniform, mirrored half of the time.

    size: height and width of the image.
    """
    random = np.random.default_rng((training.seed, epoch, i))
    scale = random.uniform(*training.scales)
    height, width = (max(1, round(scale * side)) for side in size)
    top, left = (int(random.integers(0, max(0, side - training.crop) + 1)) for side in (height, width))
    return Crop(top, left, height, width, bool(random.random() < 0.5))


def cut(image: Image.Image, mask: np.ndarray, crop: Crop, side: int) -> tuple[Tensor, Tensor]:
    """uint8 pixels (3, side, side) and classes (side, side); what lies outside the image is ignored, its pixels 0.

    Pixels are bicubic, the mask takes the class at each pixel's center; the mask is of any resolution.
    """
    rows, columns = min(side, crop.height), min(side, crop.width)
    y, x = image.height / crop.height, image.width / crop.width
    box = (crop.left * x, crop.top * y, (crop.left + columns) * x, (crop.top + rows) * y)
    found = np.zeros((side, side, 3), np.uint8)
    found[:rows, :columns] = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC, box))
    classes = np.full((side, side), IGNORE, np.uint8)
    scaled = resized_mask(mask, (crop.height, crop.width))
    classes[:rows, :columns] = scaled[crop.top : crop.top + rows, crop.left : crop.left + columns]
    if crop.flip:
        found[:, :columns], classes[:, :columns] = found[:, :columns][:, ::-1], classes[:, :columns][:, ::-1]
    return torch.from_numpy(found).permute(2, 0, 1), torch.from_numpy(classes).long()


class CropBatch(NamedTuple):
    """Normalized pixels (B, 3, s, s), 0 outside the image, and classes int64 (B, s, s); images that were left out."""

    images: Tensor
    classes: Tensor
    bad: list[tuple[str, str]]


class _Crops(Dataset[CropBatch]):
    """Batch number -> its crops. Batches go through the images in one order after another, without unreadable ones."""

    def __init__(self, source: Source, training: CropTraining) -> None:
        self.source, self.training = source, training
        self.batch_size = min(training.batch_size, len(source))

    def __len__(self) -> int:
        return self.training.steps

    def __getitem__(self, number: int) -> CropBatch:
        n, side = len(self.source), self.training.crop
        images, classes, bad = [], [], []
        for position in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, at = divmod(position, n)
            i = int(epoch_order(self.training.seed, epoch, n)[at])
            try:
                image = self.source.read(i)
                mask, _ = fitting_mask(self.source, i, (image.height, image.width))
            except BadImage as error:
                bad.append((error.name, error.why))
                continue
            if mask is None:
                bad.append((self.source.name(i), "it has no mask"))
                continue
            crop = plan_crop((image.height, image.width), self.training, epoch, i)
            pixels, labels = cut(image, mask, crop, side)
            outside = torch.zeros(side, side, dtype=torch.bool)
            outside[crop.height :], outside[:, crop.width :] = True, True
            images.append(normalize_pixels(pixels).masked_fill(outside, 0.0))
            classes.append(labels)
        empty = torch.zeros(0, 3, side, side), torch.zeros(0, side, side, dtype=torch.int64)
        stacked = (torch.stack(images), torch.stack(classes)) if images else empty
        return CropBatch(*stacked, bad)


def crop_batches(source: Source, training: CropTraining) -> Iterator[CropBatch]:
    """One batch of crops for each step; the same whatever the number of workers."""
    yield from DataLoader(
        _Crops(source, training),
        batch_size=None,
        num_workers=training.workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # else the loader draws from, and so changes, the global random state
    )


def train_on_crops(
    features: FeatureMap, dim: int, source: Source, classes: int, training: CropTraining, device: torch.device
) -> tuple[SegmentationHead, dict[str, str]]:
    """LocAt's head, and the images that could not be read with the reason why.

    AdamW, one linear cycle up to `lr`, cross-entropy on logits upsampled bilinearly to the crop. features is frozen:
    no gradient enters it. Same seed, same answer on the same device. Raises UserError where no image can be read.
    """
    if training.steps < 1:
        raise UserError(f"The segmentation head needs at least one step of training, not {training.steps}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = SegmentationHead(dim, classes, "mlp").to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, total_steps=training.steps, anneal_strategy="linear", cycle_momentum=False
    )
    bad: dict[str, str] = {}
    began = time.monotonic()
    for step, batch in enumerate(crop_batches(source, training)):
        bad |= dict(batch.bad)
        if len(batch.images):
            loss = crop_loss(head, features, batch, device)
            if step == 0 and not bool(torch.isfinite(loss)):  # once: at every step a GPU would have to be waited for
                raise UserError(
                    "The features of the training images are not finite (NaN or infinite); the backbone that made them "
                    "has most likely diverged."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        elif len(bad) == len(source):
            some = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:3])
            raise UserError(f"None of the {len(source)} training images could be read. {some}")
        schedule.step()
        if step + 1 == _TIMED and training.steps > _TIMED:
            left = (time.monotonic() - began) / _TIMED * (training.steps - _TIMED)
            log.info("Training the head: %d steps, about %.0f minutes (--steps)", training.steps, left / 60)
    return head, bad


def crop_loss(head: SegmentationHead, features: FeatureMap, batch: CropBatch, device: torch.device) -> Tensor:
    """Mean cross-entropy of the pixels that are not ignored; 0 where all are."""
    with torch.no_grad():
        maps = features(batch.images.to(device, non_blocking=True))
    target = batch.classes.to(device, non_blocking=True)
    logits = head(maps, (target.shape[1], target.shape[2]))
    counted = (target != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / counted
