from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import ArraySource, passed_over
from nearfar.ssl.data.sources.files import FolderSource, ListSource, kinds_of
from nearfar.ssl.errors import BadImage, UserError


def pixels(value: int, height: int = 12, width: int = 16) -> NDArray[Any]:
    return np.full((height, width, 3), value, np.uint8)


def put(path: Path, value: int = 0, height: int = 12, width: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(value, height, width)).save(path)
    return path


def first(source: FolderSource | ListSource, i: int) -> int:
    return int(np.asarray(source.read(i))[0, 0, 0])


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "dog" / "b.png", 3)
    put(tmp_path / "dog" / "a.PNG", 2)
    put(tmp_path / "cat" / "deep" / "er" / "c.png", 1)
    for clutter in ("dog/Thumbs.db", "dog/.DS_Store", "dog/.hidden.png", "cat/notes.txt", ".git/x.png", "classes.txt"):
        path = tmp_path / clutter
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["cat/deep/er/c.png", "dog/a.PNG", "dog/b.png"]
    assert [first(source, i) for i in range(3)] == [1, 2, 3]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.mask(0) is None


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.png", 1)
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.classes is None
    assert [first(source, i) for i in range(2)] == [1, 2]


def test_links_are_followed_but_not_round_and_round(tmp_path: Path) -> None:
    put(tmp_path / "far" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "class").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "far")
    source = open_source(tmp_path / "root")
    assert [source.name(i) for i in range(len(source))] == ["class/a.png"]


def test_a_file_that_went_bad_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no image")
    with pytest.raises(BadImage) as caught:
        open_source(tmp_path).read(1)
    assert caught.value.name == "b.jpg"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "the folder is empty"),
        (["a.csv", "b.txt"], r"a\.csv, b\.txt"),
        (["a.png", "dog/b.png"], r"both images \(a\.png, 1 in all\) and folders of images \(dog, 1 in all\)"),
        (["train/dog/a.png", "val/dog/b.png"], r"parts of a data set \(train, val\).*train"),
        (["images/train/a.png", "masks/train/a.png"], r"images, masks.*/images\."),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, files: list[Any], message: str) -> None:
    for name in files:
        if name.endswith(".png"):
            put(tmp_path / name)
        else:
            (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_masks_of_the_sibling_tree(tmp_path: Path) -> None:
    for k, name in enumerate(("a", "b")):
        put(tmp_path / "images" / "train" / f"{name}.jpg", 50)
        (tmp_path / "masks" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 16), k + 4, np.uint8)).save(tmp_path / "masks" / "train" / f"{name}.png")
    source = open_source(tmp_path / "images" / "train")
    assert source.labels is None
    assert source.mask(1).dtype == np.uint8
    assert source.mask(1).shape == (12, 16)
    assert (source.mask(1) == 5).all()
    put(tmp_path / "images" / "train" / "c.jpg")
    with pytest.raises(UserError, match=r"1 of 3 images .* no mask.*c\.png"):
        open_source(tmp_path / "images" / "train")


def test_a_palette_mask_gives_its_numbers_and_a_color_mask_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    mask = Image.fromarray(np.full((12, 16), 7, np.uint8), "P")
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(tmp_path / "masks" / "a.png")
    assert (open_source(tmp_path / "images").mask(0) == 7).all()
    put(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="mode RGB"):
        open_source(tmp_path / "images").mask(0)


def test_list_of_paths(tmp_path: Path) -> None:
    absolute = put(tmp_path / "elsewhere" / "a b.png", 1)
    put(tmp_path / "lists" / "b.png", 2)
    file = tmp_path / "lists" / "some.txt"
    file.write_text(f"{absolute}\nb.png\n\n")
    source = open_source(file)
    assert [first(source, i) for i in range(len(source))] == [1, 2]
    assert source.labels is None
    file.write_text(f"{absolute}\t7\nb.png\t3\n")
    assert open_source(file).labels.tolist() == [7, 3]
    file.write_text(f"{absolute}\tzebra\nb.png\tape\n")
    assert open_source(file).labels.tolist() == [1, 0]
    assert open_source(file).classes == ["ape", "zebra"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"gone.png\n", r"lists gone\.png, which does not exist"),
        (b"a.png\t1\na.png\n", r"none for a\.png"),
        (b"\xff\xfe\x00", "cannot be read as a list"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        ListSource(tmp_path / "list.txt")


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    put(tmp_path / "x" / "a.png", 1)
    put(tmp_path / "y" / "b.png", 1)
    prints = [FolderSource(tmp_path).fingerprint]
    assert FolderSource(tmp_path).fingerprint == prints[0]
    put(tmp_path / "y" / "b.png", 1, 40, 40)
    prints.append(FolderSource(tmp_path).fingerprint)
    (tmp_path / "y" / "b.png").rename(tmp_path / "x" / "b.png")
    prints.append(FolderSource(tmp_path).fingerprint)
    images = np.stack([pixels(v) for v in range(3)])
    prints += [ArraySource(images).fingerprint, ArraySource(images, [0, 1, 2]).fingerprint]
    prints += [ArraySource(images[::-1]).fingerprint, ArraySource(images[:2]).fingerprint]
    assert len(set(prints)) == len(prints)


def test_other_images_under_the_same_names_and_of_the_same_sizes_have_another_fingerprint(tmp_path: Path) -> None:
    """Such as the frames of two films: they would pass for the images that a network has learned."""
    for film, value in (("train", 1), ("val", 2)):
        for frame in range(3):
            file = tmp_path / film / f"{frame:06}.bmp"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((20, 30, 3), 10 * value + frame, np.uint8)).save(file)
    train, val = FolderSource(tmp_path / "train"), FolderSource(tmp_path / "val")
    sizes = {os.path.getsize(source.path(i)) for source in (train, val) for i in range(3)}
    assert train.names == val.names and len(sizes) == 1
    assert train.fingerprint != val.fingerprint
    (tmp_path / "train").rename(tmp_path / "moved")
    assert FolderSource(tmp_path / "moved").fingerprint == train.fingerprint


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that vanished without a word would renumber the labels of the others."""
    for name in ("cats", "dogs"):
        put(tmp_path / name / "0.png")
    scandir = os.scandir

    def guarded(path: str = ".") -> Any:
        if os.fspath(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="cats cannot be read: Permission denied"):
        open_source(tmp_path)


def test_files_passed_over_for_their_type_are_counted_and_named(tmp_path: Path) -> None:
    put(tmp_path / "x" / "a.png")
    for name in ("x/b.avif", "x/c.AVIF", "d.jp2", "x/README", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["x/a.png"]
    assert passed_over(source) == ["d.jp2", "x/README", "x/b.avif", "x/c.AVIF"]
    assert kinds_of(passed_over(source)) == "2 .avif (x/b.avif), 1 .jp2 (d.jp2), 1 without an ending (x/README)"


def test_names_that_are_no_text_are_printable_and_still_found(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and a sequence that clears a terminal."""
    for name in (b"caf\xe9.png", b"\x1b[2J.png", b"bad\xff.jpg"):
        put(tmp_path / "a.png").rename(os.path.join(os.fsencode(tmp_path), name).decode("utf-8", "surrogateescape"))
    (tmp_path / b"bad\xff.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"no image")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(3)] == [r"\x1b[2J.png", r"bad\xff.jpg", r"caf\xe9.png"]
    assert source.read(0).size == source.read(2).size == (16, 12)
    with pytest.raises(BadImage) as caught:
        source.read(1)
    assert str(caught.value) == r"bad\xff.jpg: not an image of a known format"
    assert len(source.fingerprint) == 32


def test_folders_nested_beyond_measure_are_told(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:  # 1,500 deep, a step at a time: the path as a whole could be too long
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    try:
        with pytest.raises(UserError, match=r"nested too deeply|no images|cannot be read"):
            open_source(tmp_path)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil's own way is recursive


def test_a_mask_that_is_no_png_or_damaged_is_bad(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png")
    put(tmp_path / "masks" / "a.png")
    mask = tmp_path / "masks" / "a.png"
    Image.fromarray(pixels(3)[..., 0]).save(mask)
    whole = mask.read_bytes()
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", whole[:40], b""):
        mask.write_bytes(data)
        with pytest.raises(BadImage, match=r"its mask .* cannot be read"):
            open_source(tmp_path / "images").mask(0)
