from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import open_source
from nearfar.ssl.data.loaders.base import LoaderOptions
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import ArraySource, passed_over
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.data.sources.tar import TarSource
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=16, local_crops_size=8, local_crops_number=2)


def png(pixels: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def images(n: int = 20) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (n, 20, 24, 3), np.uint8)


def write_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz", "w:bz2"] = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def shards(folder: Path, labels: bool = True, long: str = "") -> tuple[NDArray[Any], NDArray[Any]]:
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
def test_shards_hold_what_was_put_in(tmp_path: Path, long: str) -> None:
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
def test_shards_give_the_batches_of_any_source(tmp_path: Path, workers: int) -> None:
    pixels, labels = shards(tmp_path)
    options = {"batch_size": 4, "epochs": 2, "seed": 1, "rank": 1, "world_size": 2}
    mine = PillowLoader(open_source(tmp_path), VIEWS, LoaderOptions(workers=workers, **options))
    theirs = PillowLoader(ArraySource(pixels, labels), VIEWS, LoaderOptions(**options))
    mine.seek(0, 1)
    theirs.seek(0, 1)
    for a, b in zip(mine, theirs, strict=True):
        assert a.index.tolist() == b.index.tolist() and a.label.tolist() == b.label.tolist()
        assert all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))


def test_shards_without_labels_and_their_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shards(tmp_path / "a", labels=False)
    shards(tmp_path / "b")
    a, b = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert a.labels is None
    assert a.fingerprint != b.fingerprint == open_source(tmp_path / "b").fingerprint


def test_other_images_at_the_same_places_have_another_fingerprint(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("val", 2)):
        (tmp_path / part).mkdir()
        bitmap = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(bitmap, "BMP")
        write_tar(tmp_path / part / "000.tar", {"a.bmp": bitmap.getvalue()})
    assert open_source(tmp_path / "train").fingerprint != open_source(tmp_path / "val").fingerprint


def test_shards_that_are_wrong(tmp_path: Path) -> None:
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


def test_a_damaged_image_in_a_shard_is_bad_by_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(images()[0]), "b.png": b"nothing"})
    source = open_source(tmp_path)
    with pytest.raises(BadImage, match=r"a\.tar:b\.png: not an image"):
        source.read(1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match=r"a\.tar:a\.png"):
        source.read(0)


def test_a_folder_with_images_and_a_tar_is_a_folder(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "a.png").write_bytes(png(images()[0]))
    assert isinstance(open_source(tmp_path), FolderSource)


def header(name: bytes, size: bytes | int = 0, kind: bytes = b"0", linked: bytes = b"") -> bytes:
    """A tar header by hand, whose size is written as it is given."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block[124 : 124 + len(field)] = field
    block[156:157] = kind
    block[157 : 157 + len(linked)] = linked
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([header(b"a.png", 2**32)], "was cut off|cannot be read"),
        ([header(b"a.png", b"\xff" * 11 + b"\x00")], "damaged|cannot be read"),  # a negative size
        ([header(b"x", 2**32, b"x"), header(b"a.png")], "cut off|cannot be read|no images"),
        ([header(b"x", 12, b"x"), padded(b"12 size=-99\n"), header(b"a.png")], "damaged|cut off|cannot be read|no im"),
        ([header(b"a.png", 3, b"S"), padded(b"abc")], "no images|cannot be read"),  # with holes
        ([header(b"a.png", 0, b"2", b"/etc/passwd")], "no images"),  # a link
        ([header(b"a.png", 0, b"6")], "no images"),  # a pipe
        ([header(b"a.png"), header(b"a.cls", 40), padded(b"9" * 40)], r"a\.cls holds b'9+' and 20 bytes more"),
        ([header(b"a.png"), header(b"a.cls", 10000), padded(b"9" * 10000)], "9,980 bytes more, where a class number"),
        ([header(b"a.png"), header(b"a.cls", 0)], "holds b'', where a class number"),
    ],
)  # fmt: skip
def test_crafted_shards_are_told(tmp_path: Path, members: list[bytes], message: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"".join(members) + bytes(1024))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "a.tar")


def test_shards_of_random_bytes_are_read_or_told_but_nothing_else(tmp_path: Path) -> None:
    file, rng = tmp_path / "a.tar", np.random.default_rng(0)
    write_tar(file, {f"{i}{'x' * 60 * i}.png": b"x" for i in range(4)} | {"0.cls": b"1"})
    whole, answers = file.read_bytes(), {"read": 0, "told": 0}
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole) // 2, 4):
            damaged[at] = rng.integers(0, 256)
        for begin in range(0, len(damaged) - 511, 512):  # with sums that fit, or tarfile looks no further
            if damaged[begin + 257 : begin + 262] == b"ustar":
                damaged[begin + 148 : begin + 156] = b" " * 8
                damaged[begin + 148 : begin + 156] = b"%06o\0 " % sum(damaged[begin : begin + 512])
        file.write_bytes(damaged)
        try:
            assert len(open_source(file).fingerprint) == 32
            answers["read"] += 1
        except UserError:
            answers["told"] += 1
    assert min(answers.values()) > 10, answers


def test_members_of_other_types_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(images()[0]), "a.json": b"{}", "b.avif": b"x", "README": b"x"})
    assert passed_over(open_source(tmp_path / "a.tar")) == ["a.tar:b.avif", "a.tar:README"]
