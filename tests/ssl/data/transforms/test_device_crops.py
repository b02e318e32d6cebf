"""Views by matrix products against Pillow's, on the CPU (and on a GPU where there is one)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.transforms import crops
from nearfar.ssl.data.transforms.device_crops import render_on_device, weights
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=32, local_crops_size=16, local_crops_number=4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def noise(n: int = 40, height: int = 30, width: int = 44) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(30, 44), (90, 30), (16, 16), (9, 12)])
def test_views_are_those_of_pillow_but_for_roundings(device: str, height: int, width: int) -> None:
    source = ArraySource(noise(12, height, width))
    plan = plan_views(VIEWS, 0, 0, np.arange(12), np.full((12, 2), (height, width)))
    images = torch.from_numpy(source.images).permute(0, 3, 1, 2).contiguous().to(device)
    for which, size in ((slice(2), 32), (slice(2, None), 16)):
        expected = crops.render([source.read(i) for i in range(12)], plan.views(which), size)
        found = render_on_device(images, plan.views(which), size).cpu()
        difference = (expected.int() - found.int()).abs()
        assert difference.max() <= 2  # noise, enlarged: a rounding between the passes grows a little
        assert difference.float().mean() < 0.002


@pytest.mark.parametrize(("length", "size", "whole"), [(7, 20, 30), (30, 7, 30), (1, 5, 9), (16, 16, 20)])
def test_weights_are_within_the_crop_and_sum_to_one(length: int, size: int, whole: int) -> None:
    begin = torch.tensor([0, whole - length])
    found = weights(begin, torch.tensor([length, length]), size, whole)
    assert found.shape == (2, size, whole)
    assert torch.allclose(found.sum(-1), torch.ones(2, size), atol=1e-5)
    for k, b in enumerate(begin.tolist()):
        assert not found[k, :, :b].any() and not found[k, :, b + length :].any()
    if length == size:
        assert torch.allclose(found[0, :, :length], torch.eye(size), atol=1e-6)
