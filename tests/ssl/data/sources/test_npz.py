from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.sources import npz
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.sources.choose import open_source
from nearfar.ssl.data.sources.npz import NpzSource
from nearfar.ssl.errors import BadImage, UserError


def pixels(value: int, height: int = 12, width: int = 16) -> NDArray[Any]:
    return np.full((height, width, 3), value, np.uint8)


def first(source: ArraySource | NpzSource, i: int) -> int:
    return int(np.asarray(source.read(i))[0, 0, 0])


def encoded(values: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    files = []
    for value in values:
        file = io.BytesIO()
        Image.fromarray(pixels(value)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def test_npz_of_jpegs(tmp_path: Path) -> None:
    jpeg, offset = encoded([10, 100, 200])
    np.savez(tmp_path / "d.npz", jpeg=jpeg, offset=offset, label=np.array([2, 0, 1], np.uint8), extra=np.ones(3))
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    source = open_source(tmp_path / "d.npz")
    assert isinstance(source, NpzSource)
    assert [first(source, i) for i in range(len(source))] == pytest.approx([10, 100, 200], abs=2)
    assert source.labels.tolist() == [2, 0, 1]
    assert source.classes == ["x", "y", "z"]
    assert source.name(1) == "d.npz[1]"
    source.jpeg = source.jpeg.copy()
    source.jpeg[offset[1] : offset[2]] = 0
    with pytest.raises(BadImage, match=r"d\.npz\[1\]: not an image"):
        source.read(1)


def test_npz_of_pixels(tmp_path: Path) -> None:
    images = np.stack([pixels(v) for v in (1, 2)])
    np.savez_compressed(tmp_path / "d.npz", images=images, label=[5, 6], mask=images[..., 0])
    source = open_source(tmp_path / "d.npz")
    assert isinstance(source, ArraySource)
    assert first(source, 1) == 2
    assert source.labels.tolist() == [5, 6]
    assert (source.mask(1) == 2).all()


def test_npz_without_images(tmp_path: Path) -> None:
    nothing = np.zeros(0, np.uint8)
    kinds = (
        {"jpeg": nothing, "offset": np.zeros(1, int)},
        {"images": np.zeros((0, 8, 8, 3), np.uint8)},
        {"images": np.uint8(3)},
    )
    for kind in kinds:
        np.savez(tmp_path / "none.npz", **kind)
        with pytest.raises(UserError, match=r"none\.npz holds no images"):
            open_source(tmp_path / "none.npz")


def test_npz_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=[1], y=[2])
    with pytest.raises(UserError, match="holds x, y;"):
        open_source(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
        open_source(path)
    jpeg, offset = encoded([1, 2])
    np.savez(path, jpeg=jpeg[:-5], offset=offset)
    with pytest.raises(UserError, match="`offset` must rise"):
        open_source(path)
    np.savez(path, jpeg=jpeg, offset=offset, label=[1, 2, 3])
    with pytest.raises(UserError, match=r"2 images, but labels of shape \(3,\)"):
        open_source(path)
    np.savez(path, jpeg=np.array([{}], object), offset=offset)
    with pytest.raises(UserError, match="pickle"):
        open_source(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.array(["cat", "dog"])}, r"must be class numbers .* begin with 'cat', 'dog'"),
        ({"label": np.array([0.5, 1])}, "must be class numbers"),
        ({"label": np.array([np.nan, 1])}, "must be class numbers"),
        ({"label": np.array([2**64 - 1, 1], np.uint64)}, "must be class numbers"),
        ({"offset": np.array(["0", "9", "20"])}, r"`offset` whole numbers .* <U2"),
        ({"offset": np.array([0.0, 9.0, 20.0])}, "`offset` whole numbers"),
        ({"offset": np.zeros((3, 2), int)}, "`offset` whole numbers"),
        ({"offset": np.array([0, 2**63, 2**64 - 1], np.uint64)}, "must rise"),
        ({"offset": np.array([9, 0, 9])}, "must rise"),
        ({"offset": np.array(3)}, "`offset` whole numbers"),
        ({"jpeg": np.zeros((9, 9))}, "`jpeg` must be uint8"),
    ],
)
def test_arrays_that_are_malformed(tmp_path: Path, changes: dict[str, NDArray[Any]], message: str) -> None:
    jpeg, offset = encoded([1, 2])
    np.savez(tmp_path / "d.npz", **{"jpeg": jpeg, "offset": offset, **changes})
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "d.npz")


def test_masks_that_are_malformed(tmp_path: Path) -> None:
    for mask in (np.full((2, 12, 16), 256), np.full((2, 12, 16), -1), np.full((2, 12, 16), "x")):
        np.savez(tmp_path / "d.npz", images=np.zeros((2, 12, 16, 3), np.uint8), mask=mask)
        with pytest.raises(UserError, match="class numbers from 0 to 255"):
            open_source(tmp_path / "d.npz")


def test_class_names_that_are_no_text(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 12, 16, 3), np.uint8))
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"classes\.txt holds class names that are not UTF-8"):
        open_source(tmp_path / "d.npz")


def test_a_file_that_would_take_far_more_memory_than_it_has_bytes_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "_SMALL", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((2000, 32, 32, 3), np.uint8))
    monkeypatch.setattr(np, "load", None)  # the headers alone decide
    with pytest.raises(UserError, match=r"bomb\.npz has \d+,\d+ bytes and would take 6,144,000 in memory"):
        open_source(tmp_path / "bomb.npz")


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", file.getvalue() + bytes(100))
    with pytest.raises(UserError, match="should have 70,368,744,177,664 bytes, more than it holds"):
        open_source(tmp_path / "d.npz")


@pytest.mark.parametrize(("wrong", "right"), [("labels", "label"), ("Mask", "mask"), ("image", "images")])
def test_an_array_of_nearly_the_right_name_is_not_passed_over(tmp_path: Path, wrong: str, right: str) -> None:
    """`labels` was: the images had no labels, and a run no k-NN."""
    arrays = {"images": np.zeros((2, 9, 9, 3), np.uint8), "label": [0, 1], "mask": np.zeros((2, 9, 9), np.uint8)}
    arrays[wrong] = arrays.pop(right)
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError, match=f"`{wrong}`, which nothing reads: name it `{right}`"):
        open_source(tmp_path / "d.npz")
