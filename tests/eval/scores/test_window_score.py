"""Segmentation of test images at their own sizes: as the grid evaluator where both see the same, and at odd sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from nearfar.eval.features.extraction import Reading
from nearfar.eval.scores.evaluation import evaluate, evaluate_pixels
from nearfar.eval.scores.headline_scores import Protocol
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError


def blocks(n: int, seed: int, height: int = 24, width: int = 16) -> ArraySource:
    """Blocks of 8 pixels in one of three colors, whose number is their class."""
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 3, (n, -(-height // 8), -(-width // 8))).repeat(8, 1).repeat(8, 2)[:, :height, :width]
    images = np.eye(3, dtype=np.uint8)[masks] * 200 + rng.integers(0, 40, (n, height, width, 3), np.uint8)
    return ArraySource(images.astype(np.uint8), masks=masks.astype(np.uint8))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=2, num_heads=2)


def scored(model: nn.Module, data: tuple[ArraySource, ArraySource], **protocol: int | str) -> Any:
    (score,) = evaluate(model, data, Protocol(Reading(16), **protocol), ("segment",))
    assert json.loads(json.dumps(score.detail, allow_nan=False)) is not None
    return score


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_one_window_of_an_image_in_whole_patches_scores_as_its_grid(model: nn.Module, head: str) -> None:
    data = blocks(12, 0), blocks(5, 1)
    whole = scored(model, data, head=head, steps=15)
    for window in (0, 24):
        found = scored(model, data, head=head, steps=15, window=window)
        assert found.percent == pytest.approx(whole.percent, abs=0.05)
        assert found.detail["per_class"] == pytest.approx(whole.detail["per_class"], abs=0.1)


def test_sizes_of_test_images_need_not_be_those_of_training(model: nn.Module) -> None:
    data = blocks(12, 0), blocks(4, 1, 37, 53)
    score = scored(model, data, steps=150, window=16, stride=8)
    assert score.percent > 50
    assert (score.detail["window"], score.detail["stride"]) == (16, 8)
    assert score.detail["features"]["layer"] == "last-block"


def test_the_head_of_locat_is_trained_on_crops_and_slides(model: nn.Module) -> None:
    data = blocks(12, 0, 40, 48), blocks(4, 1, 37, 53)
    score = scored(model, data, head="locat", steps=40, window=16)
    assert score.percent > 60
    assert (score.detail["crop"], score.detail["stride"], score.detail["steps"]) == (16, 11, 40)
    assert scored(model, data, head="locat", steps=40, window=16).detail == score.detail
    assert scored(model, data, head="locat", steps=2).detail["window"] == 40  # the shorter side


def test_the_backbone_is_left_as_it_was(model: nn.Module, same_bits: Callable[..., None]) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scored(model, (blocks(4, 0), blocks(2, 1)), head="locat", steps=2, window=8)
    assert model.training
    same_bits(before, model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


@pytest.mark.parametrize("head", ["linear", "locat"])
def test_pixels_slide_too(head: str) -> None:
    data = blocks(12, 0), blocks(4, 1, 20, 33)
    protocol = Protocol(Reading(16), head=head, steps=200, window=16)
    (score,) = evaluate_pixels(data, protocol, ("segment",), patch=4)
    assert score.percent > 60


def test_masks_of_another_size_are_scored_at_their_own_and_said(model: nn.Module) -> None:
    class Half(ArraySource):
        def mask(self, i: int) -> NDArray[Any]:
            return super().mask(i)[::2, ::2]

    known = blocks(3, 1)
    train = blocks(12, 0)
    score = scored(model, (train, Half(known.images, masks=known.masks)), steps=150, window=16)
    resized = score.detail["features"]["rescaled_masks"]["test"]
    assert resized["count"] == 3 and resized["first"] == "image 0: 16 x 24, its mask 8 x 12"
    assert score.percent > 50


def test_a_window_that_is_no_whole_patches_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"--window 10 cannot be cut into patches of 4"):
        scored(model, (blocks(2, 0), blocks(2, 1)), window=10, steps=1)
