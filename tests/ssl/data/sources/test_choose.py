from __future__ import annotations

import os
from pathlib import Path

import pytest

from nearfar.ssl.data.sources.choose import open_source
from nearfar.ssl.errors import UserError

DATA = Path(os.environ.get("NEARFAR_DATA", Path(__file__).parents[5] / "shared" / "data"))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "imagenette").mkdir()
    with pytest.raises(UserError, match=r"nothing at .*imagenet/train.*it holds imagenette/"):
        open_source(tmp_path / "imagenet" / "train")
    (tmp_path / "data.zip").write_text("x")
    with pytest.raises(UserError, match=r"data\.zip is a file"):
        open_source(tmp_path / "data.zip")


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".beton", "n" * 300 + ".npz", "a\0b", "\x1b[2J", "~nobody7"])
def test_names_that_cannot_be_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="There is nothing at") as caught:
        open_source(tmp_path / name)
    assert "\x1b" not in str(caught.value) and "\0" not in str(caught.value)


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
def test_shared_data_opens() -> None:
    cifar = open_source(DATA / "cifar10" / "test.npz")
    assert (len(cifar), len(cifar.classes), cifar.read(0).size) == (8000, 10, (32, 32))
    nette = open_source(DATA / "imagenette224" / "train")
    assert (len(nette), len(nette.classes), nette.read(9).size) == (3800, 10, (224, 224))
    camvid = open_source(DATA / "camvid" / "images" / "val")
    assert len(camvid) == 163
    assert camvid.mask(5).shape == camvid.read(5).size[::-1]
    for wrong in ("camvid", "camvid/images", "imagenette224"):
        with pytest.raises(UserError, match="parts of a data set"):
            open_source(DATA / wrong)
