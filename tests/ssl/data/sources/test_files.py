import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.sources.choose import open_source
from nearfar.ssl.data.sources.files import FolderSource, ListSource
from nearfar.ssl.data.sources.npz import NpzSource
from nearfar.ssl.errors import BadImage, UserError

DATA = Path(os.environ.get("NEARFAR_DATA", Path(__file__).parents[5] / "shared" / "data"))


def pixels(value, height=12, width=16):
    return np.full((height, width, 3), value, np.uint8)


def put(path, value=0, height=12, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(value, height, width)).save(path)
    return path


def first(source, i):
    return int(np.asarray(source.read(i))[0, 0, 0])


def test_class_folders(tmp_path):
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


def test_flat_folder_has_no_labels(tmp_path):
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.png", 1)
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.classes is None
    assert [first(source, i) for i in range(2)] == [1, 2]


def test_links_are_followed_but_not_round_and_round(tmp_path):
    put(tmp_path / "far" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "class").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "far")
    assert open_source(tmp_path / "root").names == ["class/a.png"]


def test_a_file_that_went_bad_is_named(tmp_path):
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
def test_folders_that_are_no_data_set(tmp_path, files, message):
    for name in files:
        if name.endswith(".png"):
            put(tmp_path / name)
        else:
            (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "imagenette").mkdir()
    with pytest.raises(UserError, match=r"nothing at .*imagenet/train.*it holds imagenette/"):
        open_source(tmp_path / "imagenet" / "train")
    (tmp_path / "data.zip").write_text("x")
    with pytest.raises(UserError, match=r"data\.zip is a file"):
        open_source(tmp_path / "data.zip")


def test_masks_of_the_sibling_tree(tmp_path):
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


def test_a_palette_mask_gives_its_numbers_and_a_color_mask_is_refused(tmp_path):
    put(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    mask = Image.fromarray(np.full((12, 16), 7, np.uint8), "P")
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(tmp_path / "masks" / "a.png")
    assert (open_source(tmp_path / "images").mask(0) == 7).all()
    put(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="mode RGB"):
        open_source(tmp_path / "images").mask(0)


def test_list_of_paths(tmp_path):
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
def test_lists_that_cannot_be_used(tmp_path, text, message):
    put(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        ListSource(tmp_path / "list.txt")


def encoded(values):
    files = []
    for value in values:
        file = io.BytesIO()
        Image.fromarray(pixels(value)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def test_npz_of_jpegs(tmp_path):
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


def test_npz_of_pixels(tmp_path):
    images = np.stack([pixels(v) for v in (1, 2)])
    np.savez_compressed(tmp_path / "d.npz", images=images, label=[5, 6], mask=images[..., 0])
    source = open_source(tmp_path / "d.npz")
    assert isinstance(source, ArraySource)
    assert first(source, 1) == 2
    assert source.labels.tolist() == [5, 6]
    assert (source.mask(1) == 2).all()


def test_npz_that_cannot_be_used(tmp_path):
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


def test_arrays():
    gray = np.arange(2, dtype=np.uint8)[:, None, None].repeat(9, 1).repeat(8, 2)
    source = ArraySource(gray, labels=[1, 0], masks=gray, classes=["a", "b"])
    assert source.read(1).size == (8, 9)
    assert source.read(1).mode == "RGB"
    assert first(source, 1) == 1
    for wrong in (np.ones((2, 9, 8, 3)), np.ones((2, 9, 8, 4), np.uint8), np.ones((9, 8), np.uint8)):
        with pytest.raises(UserError, match="must be uint8"):
            ArraySource(wrong)
    with pytest.raises(UserError, match="do not fit"):
        ArraySource(gray, masks=gray[:, :4])


def test_subset():
    images = np.stack([pixels(v) for v in range(5)])
    source = ArraySource(images, labels=range(5), masks=images[..., 0], classes=list("abcde"))
    part = Subset(source, [4, 1])
    assert [first(part, i) for i in range(len(part))] == [4, 1]
    assert part.labels.tolist() == [4, 1]
    assert part.classes == list("abcde")
    assert part.name(0) == "image 4"
    assert (part.mask(1) == 1).all()
    assert part.fingerprint != Subset(source, [1, 4]).fingerprint != source.fingerprint


def test_the_fingerprint_follows_the_data(tmp_path):
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


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
def test_shared_data_opens():
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


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    """A class that vanished without a word would renumber the labels of the others."""
    for name in ("cats", "dogs"):
        put(tmp_path / name / "0.png")
    scandir = os.scandir

    def guarded(path="."):
        if os.fspath(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="cats cannot be read: Permission denied"):
        open_source(tmp_path)
