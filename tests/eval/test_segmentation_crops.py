"""Crops, flips and scales of training images with their masks, and the head trained on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nearfar.eval.features.extraction import IGNORE
from nearfar.eval.segmentation import resized_mask
from nearfar.eval.segmentation_crops import Crop, CropTraining, crop_batches, crop_loss, cut, plan_crop, train_on_crops
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.heads.segmentation import SegmentationHead

CPU = torch.device("cpu")


def halves(n: int = 6, side: int = 16, seed: int = 0) -> ArraySource:
    """Left half dark and of class 0, right half bright and of class 1, the edge somewhere in the middle."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, side, side), np.uint8)
    for mask in masks:
        mask[:, rng.integers(4, side - 4) :] = 1
    images = (masks[..., None] * 150 + rng.integers(0, 60, (n, side, side, 3))).astype(np.uint8)
    return ArraySource(images, masks=masks)


def colors(images: Tensor) -> Tensor:
    """Frozen features: the mean color of each patch of 4."""
    return F.avg_pool2d(images, 4)


def test_a_crop_is_the_scaled_image_cut() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    mask = rng.integers(0, 9, (20, 30)).astype(np.uint8)
    whole = np.asarray(image.resize((60, 40), Image.Resampling.BICUBIC))
    pixels, classes = cut(image, mask, Crop(6, 12, 40, 60, False), 16)
    inner = np.s_[6:22, 12:28]
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - whole[inner]).max() <= 1
    assert np.array_equal(classes.numpy(), resized_mask(mask, (40, 60))[inner])
    mirrored = cut(image, mask, Crop(6, 12, 40, 60, True), 16)
    assert torch.equal(mirrored[0], pixels.flip(-1)) and torch.equal(mirrored[1], classes.flip(-1))


def test_outside_the_image_all_is_ignored() -> None:
    image = Image.fromarray(np.full((20, 10, 3), 200, np.uint8))
    pixels, classes = cut(image, np.ones((20, 10), np.uint8), Crop(0, 0, 10, 5, True), 16)
    assert (classes[:10, :5] == 1).all() and (pixels[:, :10, :5] == 200).all()
    assert (classes[10:] == IGNORE).all() and (classes[:, 5:] == IGNORE).all() and (pixels[:, 10:] == 0).all()
    training = CropTraining(16, steps=1, batch_size=1, scales=(0.5, 0.5))
    (batch,) = crop_batches(
        ArraySource(np.full((1, 16, 16, 3), 200, np.uint8), masks=np.ones((1, 16, 16), np.uint8)), training
    )
    assert (batch.images[..., 8:, :] == 0).all() and (batch.images[..., :8, :8] != 0).all()  # 0 is the mean color


def test_a_crop_is_a_function_of_seed_epoch_and_image() -> None:
    training = CropTraining(16)
    crops = [plan_crop((40, 60), training, epoch, i) for epoch in range(20) for i in range(20)]
    assert crops == [plan_crop((40, 60), training, epoch, i) for epoch in range(20) for i in range(20)]
    assert len(set(crops)) > 390
    scales = [crop.height / 40 for crop in crops]
    assert 0.5 <= min(scales) < 0.6 and 1.9 < max(scales) <= 2.0 and 1.15 < np.mean(scales) < 1.35
    assert 0.4 < np.mean([crop.flip for crop in crops]) < 0.6
    for crop in crops:
        assert 0 <= crop.top <= crop.height - 16 and 0 <= crop.left <= crop.width - 16


def test_batches_go_through_all_images_and_do_not_depend_on_workers() -> None:
    source = halves()
    one = list(crop_batches(source, CropTraining(8, steps=6, batch_size=4)))
    two = list(crop_batches(source, CropTraining(8, steps=6, batch_size=4, workers=2)))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.classes, b.classes) for a, b in zip(one, two, strict=True)
    )
    assert [len(batch.images) for batch in one] == [4] * 6


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    (batch,) = crop_batches(halves(), CropTraining(8, steps=1, batch_size=4))
    head = SegmentationHead(3, 2, "mlp")
    batch.classes[:, :3] = IGNORE
    found = crop_loss(head, colors, batch, CPU).detach()
    logits = head(colors(batch.images), (8, 8)).double().log_softmax(1)
    picked = [
        -logits[i, batch.classes[i, r, c], r, c]
        for i, r, c in np.ndindex(*batch.classes.shape)
        if batch.classes[i, r, c] != IGNORE
    ]
    assert float(found) == pytest.approx(float(torch.stack(picked).detach().mean()), rel=1e-5)
    batch.classes[:] = IGNORE
    assert float(crop_loss(head, colors, batch, CPU).detach()) == 0.0


def test_the_head_learns_and_is_the_same_again() -> None:
    source, training = halves(), CropTraining(8, steps=60, batch_size=6)
    head, bad = train_on_crops(colors, 3, source, 2, training, CPU)
    (batch,) = crop_batches(source, CropTraining(8, steps=1, batch_size=6, seed=5))
    predicted = head(colors(batch.images), (8, 8)).argmax(1)
    counted = batch.classes != IGNORE
    assert bad == {} and (predicted == batch.classes)[counted].float().mean() > 0.85
    again, _ = train_on_crops(colors, 3, source, 2, training, CPU)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


class Damaged(ArraySource):
    broken: tuple[int, ...] = (2,)

    def read(self, i: int) -> Image.Image:
        if i in self.broken:
            raise BadImage(self.name(i), "cut off")
        return super().read(i)


def test_unreadable_images_are_left_out_and_named() -> None:
    known = halves()
    source = Damaged(known.images, masks=known.masks)
    _, bad = train_on_crops(colors, 3, source, 2, CropTraining(8, steps=3, batch_size=6), CPU)
    assert bad == {"image 2": "cut off"}
    source.broken = tuple(range(6))
    with pytest.raises(UserError, match=r"None of the 6 training images could be read.*image"):
        train_on_crops(colors, 3, source, 2, CropTraining(8, steps=3, batch_size=6), CPU)
