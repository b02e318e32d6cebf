"""Views by matrix products against Pillow's, on the CPU (and on a GPU where there is one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.loaders.base import LoaderOptions
from nearfar.ssl.data.loaders.device import DeviceLoader
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=32, local_crops_size=16, local_crops_number=4)
OPTIONS = {"batch_size": 8, "epochs": 2, "seed": 3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def noise(n: int = 40, height: int = 30, width: int = 44) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_those_of_the_folder_loader(device: str, photos: Path) -> None:
    source = Subset(FolderSource(photos), range(0, 60, 2))  # of several sizes
    mine = DeviceLoader(source, VIEWS, LoaderOptions(workers=2, **OPTIONS), device=torch.device(device))
    theirs = PillowLoader(source, VIEWS, LoaderOptions(**OPTIONS))
    for a, b in zip(mine, theirs, strict=True):
        assert (a.epoch, a.step, a.index.tolist(), a.label.tolist()) == (
            b.epoch, b.step, b.index.tolist(), b.label.tolist(),
        )  # fmt: skip
        assert np.array_equal(a.plan.box, b.plan.box)
        for x, y in zip(a.groups, b.groups, strict=True):
            assert x.device.type == device
            assert (x.cpu().int() - y.int()).abs().max() <= 1
    assert mine.decoded == 30  # once in all, not once an epoch


class Broken(ArraySource):
    def read(self, i: int) -> Image.Image:
        if i in (3, 4):
            raise BadImage(self.name(i), "broken on purpose")
        return super().read(i)


def test_bad_images_seeking_and_ranks(photos: Path) -> None:
    source = Broken(noise())
    options = {**OPTIONS, "max_bad_fraction": 0.3, "batch_size": 4, "world_size": 2, "rank": 1}
    mine = DeviceLoader(source, VIEWS, LoaderOptions(**options), device=torch.device("cpu"))
    theirs = PillowLoader(source, VIEWS, LoaderOptions(**options))
    for loader in (mine, theirs):
        loader.seek(0, 1)
    for a, b in zip(mine, theirs, strict=True):
        assert a.index.tolist() == b.index.tolist() and a.bad == b.bad
    assert mine.bad == theirs.bad != {}


def test_too_many_images_for_the_memory() -> None:
    with pytest.raises(UserError, match=r"40 images of up to 44 x 30 pixels need .* GiB"):
        DeviceLoader(ArraySource(noise()), VIEWS, LoaderOptions(**OPTIONS), device=torch.device("cpu"), share=1e-6)
