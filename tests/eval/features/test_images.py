"""Images at evaluation size: compiled or by Pillow, in threads or processes, the same batches."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.eval.features import images
from nearfar.eval.features.images import View, batches, decodes_compiled, default_workers
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.beton_writer import BetonOptions, write_beton
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.sources.files import FolderSource

needs_ffcv = pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed")
CROP, WHOLE = View((24, 24), None, whole=False), View((16, 32), None, whole=True)


def photo(rng: np.random.Generator, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth, as photos are: JPEGs of noise differ most."""
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEGs of every kind, and what is none: gray, CMYK, turned by EXIF, progressive, cut off, empty, a PNG, tiny."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        photo(rng, 40 + 7 * i, 61 - 5 * i).save(root / f"a{i}.jpg", quality=90)
    photo(rng, 50, 40, "L").save(root / "b-gray.jpg")
    photo(rng, 50, 40, "CMYK").save(root / "c-cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(rng, 50, 40).save(root / "d-turned.jpg", exif=exif)
    photo(rng, 50, 40).save(root / "e-progressive.jpg", progressive=True)
    data = BytesIO()
    photo(rng, 90, 90).save(data, "JPEG")
    (root / "f-cut.jpg").write_bytes(data.getvalue()[:-200])
    (root / "g-empty.jpg").write_bytes(b"")
    photo(rng, 50, 40).save(root / "h.png")
    photo(rng, 3, 5).save(root / "i-tiny.jpg")
    photo(rng, 24, 24).save(root / "j-as-it-is.jpg")
    return root


def all_of(source: Any, view: View, workers: int = 0, size: int = 4) -> list[Any]:
    numbers = [range(a, min(a + size, len(source))) for a in range(0, len(source), size)]
    return list(batches(source, view, numbers, workers=workers, pinned=False))


def by_pillow(source: BetonSource | FolderSource, view: View, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(images, "decodes_compiled", lambda _: False)
        return all_of(source, view)


def assert_same(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.images is None) == (b.images is None)
        if a.images is not None:
            assert torch.equal(a.images, b.images)
        assert (a.index, a.bad, a.rescaled) == (b.index, b.bad, b.rescaled)


@needs_ffcv
@pytest.mark.parametrize("view", [CROP, WHOLE])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_folder_of_jpegs_is_read_compiled_with_pillows_pixels(
    folder: Path, view: View, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(folder)
    assert decodes_compiled(source)
    expected = by_pillow(source, view, monkeypatch)
    monkeypatch.setattr(images, "DataLoader", None)
    got = all_of(source, view, workers)
    assert_same(got, expected)
    assert {name for batch in got for name, _ in batch.bad} >= {"g-empty.jpg"}


@needs_ffcv
def test_clean_jpegs_do_not_meet_pillows_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Subset(FolderSource(folder), range(4))
    monkeypatch.setattr(FolderSource, "read", None)
    (batch,) = all_of(source, CROP)
    assert batch.index == [0, 1, 2, 3]


@needs_ffcv
@pytest.mark.parametrize("workers", [0, 2])
def test_a_beton_is_read_compiled_with_pillows_pixels(
    folder: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beton(FolderSource(folder), tmp_path / "a.beton", BetonOptions(raw_side=0))
    data = bytearray((tmp_path / "a.beton").read_bytes())
    source = BetonSource(tmp_path / "a.beton")
    begin, size = source._extent[2].tolist()
    data[begin + size // 2] ^= 255  # one image is damaged
    (tmp_path / "b.beton").write_bytes(data)
    source = BetonSource(tmp_path / "b.beton")
    expected = by_pillow(source, CROP, monkeypatch)
    assert_same(all_of(source, CROP, workers), expected)
    assert len([bad for batch in expected for bad in batch.bad]) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_are_read_by_pillow_in_processes(workers: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), np.uint8)
    source = ArraySource(pixels)
    assert not decodes_compiled(source)
    got = torch.cat([batch.images for batch in all_of(source, CROP, workers, 2)])
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1), pixels)


@pytest.mark.parametrize(
    ("device", "cores", "count", "workers"),
    [("cuda", 12, 100, 12), ("cuda", 64, 100, 16), ("cuda", 12, 3, 2), ("cpu", 12, 100, 3), ("cpu", 2, 100, 1),
     ("cpu", 2, 1, 0)],
)  # fmt: skip
def test_as_many_workers_as_cores_and_batches_are_worth(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, count: int, workers: int
) -> None:
    monkeypatch.setattr(images, "available_cores", lambda: cores)
    assert default_workers(torch.device(device), count) == workers
