from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nearfar.ssl.data import libjpeg, open_loader
from nearfar.ssl.data.loaders.base import LoaderOptions
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=16, local_crops_size=8, local_crops_number=2)
OPTIONS = LoaderOptions(batch_size=8, epochs=1, seed=5)


@pytest.fixture
def arrays() -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), np.uint8))


def test_auto_takes_ffcv_for_a_beton_where_it_is_installed(
    arrays: ArraySource, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = BetonSource(beton)
    assert open_loader(arrays, VIEWS, OPTIONS).title == "pillow loader"
    assert open_loader(source, VIEWS, OPTIONS).title == "ffcv loader"
    assert open_loader(source, VIEWS, OPTIONS, loader="pillow").title == "pillow loader"
    monkeypatch.setattr(libjpeg, "available", lambda: False)
    assert open_loader(source, VIEWS, OPTIONS).title == "pillow loader"
    with pytest.raises(UserError, match="The ffcv loader needs FFCV"):
        open_loader(source, VIEWS, OPTIONS, loader="ffcv")


def test_what_does_not_go_together_is_told(arrays: ArraySource) -> None:
    with pytest.raises(UserError, match=r"data\.path is not one\. Write it: nearfar data beton"):
        open_loader(arrays, VIEWS, OPTIONS, loader="ffcv")
    for loader in ("auto", "pillow", "device"):
        with pytest.raises(UserError, match=r"data\.color_on=loader needs the ffcv loader"):
            open_loader(arrays, VIEWS, OPTIONS, loader=loader, color="loader")


def test_all_three_give_the_same_batches(beton: Path) -> None:
    source = BetonSource(beton)
    folder, ffcv, device = (
        list(open_loader(source, VIEWS, OPTIONS, loader=loader)) for loader in ("pillow", "ffcv", "device")
    )
    for a, b, c in zip(folder, ffcv, device, strict=True):
        assert a.index.tolist() == b.index.tolist() == c.index.tolist()
        for x, y, z in zip(a.groups, b.groups, c.groups, strict=True):
            assert torch.equal(x, y)
            assert (x.int() - z.int()).abs().max() <= 1


def test_color_by_the_loader(beton: Path) -> None:
    source = BetonSource(beton)
    colored = next(iter(open_loader(source, VIEWS, OPTIONS, color="loader")))
    plain = next(iter(open_loader(source, VIEWS, OPTIONS)))
    assert colored.colored and not plain.colored and colored.index.tolist() == plain.index.tolist()
    for ours, theirs in zip(colored.groups, plain.groups, strict=True):
        assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
