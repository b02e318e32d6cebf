import io
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.ssl.config import Views
from nearfar.ssl.data.loaders.base import Loader
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.sources.choose import open_source
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.data.sources.hugging_face import HuggingFaceSource
from nearfar.ssl.data.sources.tar import TarSource
from nearfar.ssl.errors import BadImage, UserError

VIEWS = Views(global_crops_size=16, local_crops_size=8, local_crops_number=2)


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def images(n=20):
    return np.random.default_rng(0).integers(0, 256, (n, 20, 24, 3), np.uint8)


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def shards(folder, labels=True, long=""):
    pixels = images()
    for shard in range(3):
        files = {}
        for i in range(shard, 20, 3):
            key = f"part/{long}{i:04}"
            files[f"{key}.png"] = png(pixels[i])
            files[f"{key}.json"] = b"{}"
            if labels:
                files[f"{key}.cls"] = f"{i % 7}\n".encode()
        write_tar(folder / f"train-{shard:03}.tar", files)
    order = [i for shard in range(3) for i in range(shard, 20, 3)]
    return pixels[order], np.array(order) % 7


@pytest.mark.parametrize("long", ["", "x" * 150])  # names beyond 100 bytes have headers of their own
def test_shards_hold_what_was_put_in(tmp_path, long):
    pixels, labels = shards(tmp_path, long=long)
    source = open_source(tmp_path)
    assert isinstance(source, TarSource) and len(source) == 20
    assert source.labels.tolist() == labels.tolist()
    for i in range(20):
        np.testing.assert_array_equal(np.asarray(source.read(i)), pixels[i])
        assert source.encoded(i) == png(pixels[i])
    assert source.name(0) == f"train-000.tar:part/{long}0000.png"
    assert source.mask(0) is None
    assert len(open_source(tmp_path / "train-001.tar")) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_any_source(tmp_path, workers):
    pixels, labels = shards(tmp_path)
    options = {"batch_size": 4, "epochs": 2, "seed": 1, "rank": 1, "world_size": 2}
    mine = Loader(open_source(tmp_path), VIEWS, workers=workers, **options)
    theirs = Loader(ArraySource(pixels, labels), VIEWS, **options)
    mine.seek(0, 1)
    theirs.seek(0, 1)
    for a, b in zip(mine, theirs, strict=True):
        assert a.index.tolist() == b.index.tolist() and a.label.tolist() == b.label.tolist()
        assert all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))


def test_shards_without_labels_and_their_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shards(tmp_path / "a", labels=False)
    shards(tmp_path / "b")
    a, b = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert a.labels is None
    assert a.fingerprint != b.fingerprint == open_source(tmp_path / "b").fingerprint


def test_shards_that_are_wrong(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(b"no tar file, but longer than a header is: " * 30)
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        open_source(file)
    write_tar(file, {"a.png": png(images()[0])}, "w:gz")
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        open_source(file)
    write_tar(file, {"a.txt": b"x"})
    with pytest.raises(UserError, match="no images in"):
        open_source(file)
    write_tar(file, {"a.png": png(images()[0]), "a.cls": b"cat"})
    with pytest.raises(UserError, match=r"a\.cls holds b'cat', where a class number is needed"):
        open_source(file)
    write_tar(file, {"a.png": png(images()[0]), "a.cls": b"1", "b.png": png(images()[1])})
    with pytest.raises(UserError, match=r"b\.png has no class beside it"):
        open_source(file)
    write_tar(file, {"a.png": png(images()[0]), "b.png": png(images()[1])})
    whole = file.read_bytes()
    for length in (1000, 2100, 2500, 3000):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="was cut off"):
            open_source(file)


def test_a_damaged_image_in_a_shard_is_bad_by_its_name(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png(images()[0]), "b.png": b"nothing"})
    source = open_source(tmp_path)
    with pytest.raises(BadImage, match=r"a\.tar:b\.png: not an image"):
        source.read(1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match=r"a\.tar:a\.png"):
        source.read(0)


def test_a_folder_with_images_and_a_tar_is_a_folder(tmp_path):
    shards(tmp_path)
    (tmp_path / "a.png").write_bytes(png(images()[0]))
    assert isinstance(open_source(tmp_path), FolderSource)


class Label:
    names = ("cat", "dog")


class Dataset:
    """What of `datasets.Dataset` is used."""

    def __init__(self, rows, features):
        self.rows, self.features = rows, features

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


class Castable(Dataset):
    def cast_column(self, column, kind):
        assert column == "image" and kind == "undecoded"
        rows = [{**row, "image": {"bytes": png(np.asarray(row["image"])), "path": None}} for row in self.rows]
        return Dataset(rows, self.features)


def rows(n=6):
    return [{"image": Image.fromarray(pixels), "label": i % 2} for i, pixels in enumerate(images(n))]


FEATURES = {"image": object(), "label": Label()}


def test_rows_of_pillow_images():
    source = HuggingFaceSource(Dataset(rows(), FEATURES))
    assert len(source) == 6 and source.labels.tolist() == [0, 1] * 3 and source.classes == ["cat", "dog"]
    np.testing.assert_array_equal(np.asarray(source.read(2)), images(6)[2])
    assert source.encoded(2) is None and source.mask(0) is None and source.name(2) == "a data set[2]"
    turned = rows(1)
    turned[0]["image"].getexif()[0x0112] = 6
    assert HuggingFaceSource(Dataset(turned, FEATURES)).read(0).size == (20, 24)


def test_rows_of_bytes_where_the_package_is_installed(monkeypatch):
    package = types.SimpleNamespace(Image=lambda decode: "undecoded")
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = HuggingFaceSource(Castable(rows(), FEATURES))
    np.testing.assert_array_equal(np.asarray(source.read(3)), images(6)[3])
    assert source.encoded(3) == png(images(6)[3])
    assert source.fingerprint == HuggingFaceSource(Castable(rows(), FEATURES)).fingerprint
    assert source.fingerprint != HuggingFaceSource(Castable(rows()[:5], FEATURES)).fingerprint


def test_hugging_face_data_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no column 'picture'; its columns are: image, label"):
        HuggingFaceSource(Dataset(rows(), FEATURES), image="picture")
    with pytest.raises(UserError, match="is streamed"):
        HuggingFaceSource(iter(rows()))
    bad = HuggingFaceSource(Dataset([{"image": 3, "label": 0}], FEATURES))
    with pytest.raises(BadImage, match="holds int, no image"):
        bad.read(0)
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="not installed: pip install datasets"):
        open_source(tmp_path)


def test_the_real_package(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    data = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    np.testing.assert_array_equal(np.asarray(source.read(2)), images(6)[2])
