"""The .beton format: FFCV's own Reader and Loader are the oracle of what is written."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import libjpeg, open_source
from nearfar.ssl.data.beton_writer import BetonOptions, write_beton
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.sources.beton import HEADER, BetonSource
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.errors import BadImage, UserError

pytestmark = pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed")


def scene(height: int = 40, width: int = 60, seed: int = 0) -> NDArray[Any]:
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * x + y + seed) % 200, (x + 2 * y) % 200, (x * y // 30) % 200], -1).astype(np.uint8)


def save(path: Path, pixels: NDArray[Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def written(
    source: ArraySource | FolderSource, tmp_path: Path, form: BetonOptions | None = None, **options: bool | int
) -> tuple[Any, BetonSource]:
    outcome = write_beton(source, tmp_path / "out.beton", form or BetonOptions(), **options)
    return outcome, BetonSource(tmp_path / "out.beton")


def test_jpegs_keep_their_bytes_and_all_else_its_pixels(tmp_path: Path) -> None:
    root = tmp_path / "in"
    save(root / "a.jpg", scene(), quality=80)
    save(root / "b.jpg", scene()[..., 0], quality=80)  # gray
    save(root / "c.jpg", scene(), quality=80, progressive=True)
    save(root / "d.png", scene())
    save(root / "e.png", scene(100, 120))
    outcome, beton = written(FolderSource(root), tmp_path)
    assert (outcome.unchanged, outcome.raw, outcome.encoded, outcome.bad) == (3, 1, 1, [])
    for i, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        assert beton.stored(i) == (root / name).read_bytes() == beton.encoded(i)
    assert beton.raw(3) and beton.encoded(3) is None
    np.testing.assert_array_equal(np.asarray(beton.read(3)), scene())
    assert np.abs(np.asarray(beton.read(4)).astype(int) - scene(100, 120)).mean() < 6
    assert [beton.name(i) for i in range(5)] == ["a.jpg", "b.jpg", "c.jpg", "d.png", "e.png"]
    assert beton.labels is None and beton.classes is None and beton.mask(0) is None
    assert beton.size.tolist() == [[40, 60]] * 4 + [[100, 120]]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_photographs_end_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "in" / "a.jpg", scene(), quality=95, exif=exif)
    source = FolderSource(tmp_path / "in")
    outcome, beton = written(source, tmp_path, BetonOptions(raw_side=0))
    assert outcome.encoded == 1
    upright = np.asarray(source.read(0)).astype(int)
    assert tuple(beton.size[0]) == upright.shape[:2] == ((60, 40) if orientation > 4 else (40, 60))
    with Image.open(io.BytesIO(beton.stored(0))) as image:
        assert image.getexif().get(0x0112, 1) == 1
    assert np.abs(np.asarray(beton.read(0)).astype(int) - upright).mean() < 3


def test_large_images_are_shrunk_with_their_masks(tmp_path: Path) -> None:
    images, masks = scene(100, 160)[None], (np.arange(160) // 40).astype(np.uint8)[None, None].repeat(100, 1)
    outcome, beton = written(
        ArraySource(images, [1], masks), tmp_path, BetonOptions(max_side=80, raw_side=0, quality=99)
    )
    assert outcome.encoded == 1
    expected = np.asarray(Image.fromarray(images[0]).resize((80, 50), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(beton.read(0)) - expected).mean() < 6
    np.testing.assert_array_equal(beton.mask(0), (np.arange(80) // 20)[None].repeat(50, 0))


def test_ffcvs_reader_and_loader_read_it(tmp_path: Path) -> None:
    reader = pytest.importorskip("ffcv.reader")
    images, masks = np.stack([scene(seed=s) for s in range(7)]), np.arange(7 * 2400, dtype=np.uint32).astype(np.uint8)
    source = ArraySource(images, np.arange(7) * 3, masks.reshape(7, 40, 60), ["x", "y"])
    _, beton = written(source, tmp_path)
    theirs = reader.Reader(str(beton.path))
    assert theirs.field_names == ["image", "name", "label", "mask"]
    assert theirs.num_samples == 7
    kinds = [type(theirs.handlers[name]).__name__ for name in theirs.field_names]
    assert kinds == ["RGBImageField", "BytesField", "IntField", "BytesField"]  # FFCV reads JSON as bytes
    np.testing.assert_array_equal(theirs.metadata["f2"], np.arange(7) * 3)
    assert len(theirs.alloc_table) == 21
    assert (theirs.alloc_table["ptr"] % theirs.page_size + theirs.alloc_table["size"] <= theirs.page_size).all()

    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "name": None, "mask": None}
    loader = Loader(str(beton.path), 7, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines, os_cache=True)
    pixels, labels = next(iter(loader))[:2]
    np.testing.assert_array_equal(pixels, images)
    np.testing.assert_array_equal(labels[:, 0], np.arange(7) * 3)


def test_files_of_ffcvs_own_writer_are_read(tmp_path: Path) -> None:
    pytest.importorskip("ffcv.writer")
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    file = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField("jpg", jpeg_quality=100), "weight": FloatField(), "label": IntField()}
    DatasetWriter(str(file), fields, num_workers=1).from_indexed_dataset([(scene(seed=s), 0.5, s) for s in range(5)])
    beton = open_source(file)
    assert isinstance(beton, BetonSource) and len(beton) == 5
    assert beton.labels.tolist() == [0, 1, 2, 3, 4]
    assert beton.name(3) == "theirs.beton[3]"
    assert np.abs(np.asarray(beton.read(2)).astype(int) - scene(seed=2)).mean() < 3
    assert len(beton.fingerprint) == 32


def test_labels_classes_masks_and_other_processes(tmp_path: Path, photos: Path) -> None:
    source = FolderSource(photos)
    outcome, beton = written(source, tmp_path, workers=3)
    assert outcome.images == outcome.unchanged == 60
    assert beton.labels.tolist() == source.labels.tolist()
    assert beton.classes == source.classes == ["class0", "class1", "class2"]
    assert [beton.name(i) for i in range(60)] == source.names
    for i in range(0, 60, 9):
        np.testing.assert_array_equal(np.asarray(beton.read(i)), np.asarray(source.read(i)))
    other = pickle.loads(pickle.dumps(beton))
    assert other.stored(3) == beton.stored(3) and other.fingerprint == beton.fingerprint
    assert Subset(beton, [4]).encoded(0) == beton.stored(4)


def test_the_file_does_not_depend_on_threads_and_changes_with_the_data(tmp_path: Path, photos: Path) -> None:
    source = FolderSource(photos)
    prints = []
    for name, data, workers in (("a", source, 1), ("b", source, 4), ("c", Subset(source, range(59)), 2)):
        write_beton(data, tmp_path / f"{name}.beton", workers=workers)
        prints.append(BetonSource(tmp_path / f"{name}.beton").fingerprint)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert prints[0] == prints[1] != prints[2]


def test_more_than_a_page(tmp_path: Path) -> None:
    """Samples stay on one page of 8 MiB each."""
    images = np.random.default_rng(0).integers(0, 256, (5, 1100, 1100, 3), np.uint8)
    _, beton = written(ArraySource(images), tmp_path, BetonOptions(max_side=None, raw_side=2000))
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(beton.read(i)), images[i])
    assert (beton.records["image"]["ptr"] % 2**23 + 3 * 1100**2 <= 2**23).all()


def test_bad_images_are_listed_and_left_out_or_stop_the_writing(tmp_path: Path, time_limit: None) -> None:
    root = tmp_path / "in"
    for i in range(6):
        save(root / f"{i}.jpg", scene())
    (root / "1.jpg").write_bytes(b"no image")
    (root / "3.jpg").write_bytes((root / "3.jpg").read_bytes()[:500])
    (root / "4.jpg").write_bytes(b"")
    outcome, beton = written(FolderSource(root), tmp_path)
    assert [name for name, _ in outcome.bad] == ["1.jpg", "3.jpg", "4.jpg"]
    assert [beton.name(i) for i in range(len(beton))] == ["0.jpg", "2.jpg", "5.jpg"]
    assert json.loads(beton._read(1, *beton.records["name"][1].tolist())[:-1])["index"] == 2
    (tmp_path / "out.beton").unlink()
    with pytest.raises(UserError, match=r"1\.jpg: not an image of a known format\. Repair or remove it"):
        written(FolderSource(root), tmp_path, stop_at_bad=True)
    assert os.listdir(tmp_path) == ["in"]  # nothing half-written is left
    for i in (0, 2, 5):
        (root / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="None of the 6 images can be read"):
        written(FolderSource(root), tmp_path)
    assert os.listdir(tmp_path) == ["in"]


def test_a_jpeg_that_only_pillow_forgives_is_encoded_anew(tmp_path: Path) -> None:
    """Bytes between the last code and the end marker: Pillow says nothing, libjpeg-turbo warns."""
    save(tmp_path / "in" / "a.jpg", scene())
    data = (tmp_path / "in" / "a.jpg").read_bytes()
    (tmp_path / "in" / "a.jpg").write_bytes(data[:-2] + b"\x12\x34\x56" * 9 + data[-2:])
    source = FolderSource(tmp_path / "in")
    outcome, beton = written(source, tmp_path, BetonOptions(raw_side=0))
    assert outcome.encoded == 1
    pixels = np.empty(40 * 60 * 3, np.uint8)
    libjpeg.Decoder().decode(beton.stored(0), pixels, 40, 60, 180)


class Fails(ArraySource):
    def read(self, i: Any) -> Any:
        if i == 3:
            raise ZeroDivisionError("a mistake in a source")
        return super().read(i)


def test_other_errors_end_the_writing_and_leave_nothing(tmp_path: Path, time_limit: None) -> None:
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        write_beton(Fails(np.zeros((400, 9, 9, 3), np.uint8)), tmp_path / "a.beton", workers=2)
    assert not os.listdir(tmp_path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    source = ArraySource(scene()[None])
    (tmp_path / "there.beton").write_text("x")
    for name, why in (("there.beton", "exists already"), ("a.bin", "end in .beton"), ("no/a.beton", "no folder")):
        with pytest.raises(UserError, match=why):
            write_beton(source, tmp_path / name)
    assert write_beton(source, tmp_path / "there.beton", overwrite=True).raw == 1


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    left = {name: tmp_path / f".writing-{name}-01234567" for name in ("out.beton", "other.beton")}
    living, fresh = tmp_path / ".writing-out.beton-76543210", tmp_path / ".writing-out.beton-89abcdef"
    for file in (*left.values(), living, fresh):
        file.write_bytes(b"half")
        if file != fresh:
            os.utime(file, (0, 0))
    with living.open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        written(ArraySource(np.stack([scene(), scene(seed=9)])), tmp_path)
    assert not left["out.beton"].exists()
    assert left["other.beton"].exists() and living.exists() and fresh.exists()


def test_files_that_are_not_whole_are_refused(tmp_path: Path, beton: Path) -> None:
    data = beton.read_bytes()
    bad = tmp_path / "bad.beton"
    for share in (0.0, 0.00001, 0.001, 0.5, 0.9999):
        bad.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match="not a whole"):
            BetonSource(bad)

    def changed(begin: int, values: bytes) -> Path:
        bad.write_bytes(data[:begin] + values + data[begin + len(values) :])
        return bad

    with pytest.raises(UserError, match=r"is not a \.beton, or has a version that cannot be read.*with 3"):
        BetonSource(changed(0, struct.pack("<H", 3)))
    samples, table = HEADER.fields["samples"][1], HEADER.fields["table"][1]
    with pytest.raises(UserError, match="no images"):
        BetonSource(changed(samples, struct.pack("<Q", 0)))
    for value in (5, 2**40, 2**63):
        with pytest.raises(UserError, match=r"damaged|not a whole"):
            BetonSource(changed(table, struct.pack("<Q", value)))
    with pytest.raises(UserError, match="no field 'image'"):
        BetonSource(changed(data.index(b"image\0"), b"imago\0"))
    bad.write_text("these are words, and more of them than a header is long")
    with pytest.raises(UserError, match=r"is not a \.beton"):
        BetonSource(bad)
    with pytest.raises(UserError, match=r"no field 'mask' of type bytes; its fields are: image \(image\)"):
        BetonSource(beton).require("mask", 3)


def test_changed_bytes_are_noticed(tmp_path: Path, beton: Path) -> None:
    whole = BetonSource(beton)
    data = bytearray(beton.read_bytes())
    begin, size = whole._extent[5]
    data[begin + size // 2] ^= 0x40
    data[whole._extent[6][0] : whole._extent[6][0] + 20] = bytes(20)
    bad = tmp_path / "bad.beton"
    bad.write_bytes(data)
    source = BetonSource(bad)
    for i in (5, 6):
        with pytest.raises(BadImage, match=r"class\d/0\d+\.jpg: its bytes .* not those that were written") as caught:
            source.read(i)
        assert caught.value.name == whole.name(i)
    assert zlib.crc32(source.stored(7)) == zlib.crc32(whole.stored(7))


def test_without_ffcv_a_beton_can_be_read_but_not_written(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libjpeg, "available", lambda: False)
    assert BetonSource(beton).read(0).mode == "RGB"
    with pytest.raises(UserError, match=r"Writing .* needs FFCV, which is not installed"):
        write_beton(ArraySource(scene()[None]), tmp_path / "a.beton")


NAME_RECORDS = [b"5", b"null", b"[1, 2]", b'"a name"', b"{", b"[" * 30_000, b"\xff\xfe", b"", b'{"name": {"a": 1}}']


@pytest.mark.parametrize("record", NAME_RECORDS, ids=range(len(NAME_RECORDS)))
def test_a_damaged_name_record_costs_the_name_only(tmp_path: Path, record: bytes) -> None:
    write_beton(ArraySource(np.stack([scene(60, 80, seed=s) for s in range(3)])), tmp_path / "a.beton")
    whole = BetonSource(tmp_path / "a.beton")
    data = bytearray((tmp_path / "a.beton").read_bytes())
    at = data.index(b'{"name": "image 1"')
    size = whole.records["name"]["size"][1]
    if len(record) > size:  # then elsewhere, at the end of the file's data
        at, size = whole.table - 2**16, len(record)
    data[at : at + size] = record + b"\0" * (size - len(record))
    offset = data.index(bytes(whole.records["name"][1:2]))
    data[offset : offset + 16] = np.array([at, size], "<u8").tobytes()
    (tmp_path / "a.beton").write_bytes(data)
    damaged = BetonSource(tmp_path / "a.beton")
    assert isinstance(damaged.name(1), str) and damaged.name(0) == "image 0"
    np.testing.assert_array_equal(np.asarray(damaged.read(1)), np.asarray(whole.read(1)))


def test_pointers_of_name_records_that_lead_anywhere(tmp_path: Path) -> None:
    write_beton(ArraySource(scene(60, 80)[None]), tmp_path / "a.beton")
    whole, data = BetonSource(tmp_path / "a.beton"), (tmp_path / "a.beton").read_bytes()
    offset = data.index(bytes(whole.records["name"][:1]))
    for ptr, size in ((2**64 - 1, 9), (0, 2**64 - 1), (2**63, 2**63), (2**40, 10), (len(data) - 4, 9)):
        changed = data[:offset] + np.array([ptr, size], "<u8").tobytes() + data[offset + 16 :]
        (tmp_path / "b.beton").write_bytes(changed)
        assert BetonSource(tmp_path / "b.beton").name(0) == "b.beton[0]"


@pytest.mark.parametrize("about", [b"[]", b"7", b"{", b"[" * 100, b'{"classes": 5}', b'{"classes": [1]}', b"\xff"])
def test_what_a_damaged_file_says_about_itself_is_told(tmp_path: Path, about: bytes) -> None:
    write_beton(ArraySource(scene()[None], [0], classes=["a" * 200]), tmp_path / "a.beton")
    data = bytearray((tmp_path / "a.beton").read_bytes())
    at = data.index(b'{"classes"')
    end = data.index(b"\0", at)
    data[at:end] = about + b" " * (end - at - len(about))
    (tmp_path / "a.beton").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        BetonSource(tmp_path / "a.beton")


def test_a_file_of_random_damage_opens_or_is_told_and_nothing_else(tmp_path: Path, beton: Path) -> None:
    data, rng, opened = beton.read_bytes(), np.random.default_rng(0), 0
    head, table = HEADER.itemsize + 3 * 1044 + 60 * 48, BetonSource(beton).table
    for round_ in range(150):
        damaged = bytearray(data)
        begin, end = ((0, head), (table, len(data)))[round_ % 2]
        for at in rng.integers(begin, end, 3):
            damaged[at] = rng.integers(0, 256)
        (tmp_path / "a.beton").write_bytes(damaged)
        try:
            source = BetonSource(tmp_path / "a.beton")
        except UserError:
            continue
        opened += 1
        for i in range(0, len(source), 7):
            assert source.name(i).isprintable()
            with contextlib.suppress(BadImage):
                source.read(i)
    assert 0 < opened < 150
