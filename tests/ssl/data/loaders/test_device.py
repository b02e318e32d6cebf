"""Views by matrix products against Pillow's, on the CPU (and on a GPU where there is one)."""

import numpy as np
import pytest
import torch

from nearfar.ssl.config import Views
from nearfar.ssl.data.loaders import base
from nearfar.ssl.data.loaders.base import Loader
from nearfar.ssl.data.loaders.device import DeviceLoader, render, weights
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.errors import BadImage, UserError

VIEWS = Views(global_crops_size=32, local_crops_size=16, local_crops_number=4)
OPTIONS = {"batch_size": 8, "epochs": 2, "seed": 3}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def noise(n=40, height=30, width=44):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(30, 44), (90, 30), (16, 16), (9, 12)])
def test_views_are_those_of_pillow_but_for_roundings(device, height, width):
    source = ArraySource(noise(12, height, width))
    plan = plan_views(VIEWS, 0, 0, np.arange(12), np.full((12, 2), (height, width)))
    images = torch.from_numpy(source.images).permute(0, 3, 1, 2).contiguous().to(device)
    for which, size in ((slice(2), 32), (slice(2, None), 16)):
        wanted = base.render([source.read(i) for i in range(12)], plan.views(which), size)
        found = render(images, plan.views(which), size).cpu()
        difference = (wanted.int() - found.int()).abs()
        assert difference.max() <= 2  # noise, enlarged: a rounding between the passes grows a little
        assert difference.float().mean() < 0.002


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_those_of_the_folder_loader(device, photos):
    source = Subset(FolderSource(photos), range(0, 60, 2))  # of several sizes
    mine = DeviceLoader(source, VIEWS, device=torch.device(device), workers=2, **OPTIONS)
    theirs = Loader(source, VIEWS, **OPTIONS)
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
    def read(self, i):
        if i in (3, 4):
            raise BadImage(self.name(i), "broken on purpose")
        return super().read(i)


def test_bad_images_seeking_and_ranks(photos):
    source = Broken(noise())
    options = {**OPTIONS, "max_bad_fraction": 0.3, "batch_size": 4, "world_size": 2, "rank": 1}
    mine, theirs = DeviceLoader(source, VIEWS, device=torch.device("cpu"), **options), Loader(source, VIEWS, **options)
    for loader in (mine, theirs):
        loader.seek(0, 1)
    for a, b in zip(mine, theirs, strict=True):
        assert a.index.tolist() == b.index.tolist() and a.bad == b.bad
    assert mine.bad == theirs.bad != {}


def test_too_many_images_for_the_memory():
    with pytest.raises(UserError, match=r"40 images of up to 44 x 30 pixels need .* GiB"):
        DeviceLoader(ArraySource(noise()), VIEWS, device=torch.device("cpu"), share=1e-6, **OPTIONS)


@pytest.mark.parametrize(("length", "size", "whole"), [(7, 20, 30), (30, 7, 30), (1, 5, 9), (16, 16, 20)])
def test_weights_are_within_the_crop_and_sum_to_one(length, size, whole):
    begin = torch.tensor([0, whole - length])
    found = weights(begin, torch.tensor([length, length]), size, whole)
    assert found.shape == (2, size, whole)
    assert torch.allclose(found.sum(-1), torch.ones(2, size), atol=1e-5)
    for k, b in enumerate(begin.tolist()):
        assert not found[k, :, :b].any() and not found[k, :, b + length :].any()
    if length == size:
        assert torch.allclose(found[0, :, :length], torch.eye(size), atol=1e-6)
