"""The FFCV loader against the Pillow loader, and what happens when a file is not what it should be."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.beton_writer import BetonOptions, write_beton
from nearfar.ssl.data.loaders.base import Batch, LoaderOptions
from nearfar.ssl.data.loaders.device import DeviceLoader
from nearfar.ssl.data.loaders.ffcv import FFCVLoader
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.data.transforms.colors import color, color_of
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import ViewSettings

pytest.importorskip("numba")
pytestmark = [
    pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed"),
    pytest.mark.usefixtures("time_limit"),
]

VIEWS = ViewSettings(global_crops_size=48, local_crops_size=24, local_crops_number=8)
OPTIONS = {"batch_size": 8, "epochs": 2, "seed": 3}
PLAN = ("box", "flip", "jitter", "factors", "order", "gray", "sigma", "solarize")


@pytest.fixture
def source(beton: Path) -> BetonSource:
    return BetonSource(beton)


def ffcv(source: BetonSource, views: ViewSettings = VIEWS, **options: bool | float) -> FFCVLoader:
    colored = options.pop("colored", False)
    return FFCVLoader(source, views, LoaderOptions(**{**OPTIONS, **options}), colored=colored)


def pillow(
    source: ArraySource | BetonSource | FolderSource, views: ViewSettings = VIEWS, **options: float
) -> PillowLoader:
    return PillowLoader(source, views, LoaderOptions(**{**OPTIONS, **options}))


def assert_same(one: Iterable[Batch], two: Iterable[Batch]) -> None:
    one, two = list(one), list(two)
    assert [(b.epoch, b.step) for b in one] == [(b.epoch, b.step) for b in two]
    for a, b in zip(one, two, strict=True):
        assert a.index.tolist() == b.index.tolist()
        assert a.label is None if b.label is None else a.label.tolist() == b.label.tolist()
        assert all(np.array_equal(getattr(a.plan, name), getattr(b.plan, name)) for name in PLAN)
        for x, y in zip(a.groups, b.groups, strict=True):
            assert x.dtype == y.dtype == torch.uint8
            assert torch.equal(x, y)
        assert a.bad == b.bad


def broken(beton: Path, tmp_path: Path, which: Any, how: Callable[..., Any]) -> BetonSource:
    """A copy of the file, in which the bytes of some images are changed by `how`."""
    whole, data = BetonSource(beton), bytearray(beton.read_bytes())
    for i in which:
        begin, size = whole._extent[i]
        data[begin : begin + size] = how(bytes(data[begin : begin + size]))
    (tmp_path / "broken.beton").write_bytes(data)
    return BetonSource(tmp_path / "broken.beton")


def mangled(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def other_size(data: bytes) -> bytes:
    """The same JPEG, whose header says it is half as high."""
    at = data.index(b"\xff\xc0") + 5
    height = int.from_bytes(data[at : at + 2], "big")
    return data[:at] + (height // 2).to_bytes(2, "big") + data[at + 2 :]


# --- parity ----------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_folder_loader_on_the_same_file(source: BetonSource) -> None:
    assert_same(ffcv(source), pillow(source))


def test_batches_are_those_of_the_original_folder(source: BetonSource, photos: Path) -> None:
    """JPEGs keep their bytes and names their order, so that not even the file makes a difference."""
    mine, theirs = list(ffcv(source)), list(pillow(FolderSource(photos)))
    for a, b in zip(mine, theirs, strict=True):
        assert a.index.tolist() == b.index.tolist() and a.label.tolist() == b.label.tolist()
        for x, y in zip(a.groups, b.groups, strict=True):
            difference = (x.int() - y.int()).abs()
            assert difference.float().mean() <= 2 and difference.max() <= 8  # what the issue asks for
            assert difference.max() <= 2  # and what is: only another libjpeg could make one


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_same_batches_for_every_number_of_threads(source: BetonSource, workers: int) -> None:
    assert_same(ffcv(source, workers=workers), ffcv(source))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("epoch", "step"), [(0, 5), (1, 0), (1, 6), (2, 0)])
def test_seek_gives_the_tail_of_the_stream(source: BetonSource, workers: int, epoch: int, step: int) -> None:
    sought = ffcv(source, workers=workers)
    sought.seek(epoch, step)
    whole = list(ffcv(source))
    assert_same(sought, whole[epoch * 7 + step :])
    assert_same(sought, whole[epoch * 7 + step :])  # iterating again starts there again


def test_ranks_share_the_global_batch(source: BetonSource) -> None:
    one = list(ffcv(source))
    ranks = [list(ffcv(source, batch_size=4, rank=rank, world_size=2, workers=rank)) for rank in range(2)]
    for whole, left, right in zip(one, *ranks, strict=True):
        assert whole.index.tolist() == [*left.index, *right.index]
        for g, group in enumerate(whole.groups):
            assert torch.equal(group, torch.cat([left.groups[g], right.groups[g]], 1))


def test_an_image_is_decoded_once_for_ten_views(source: BetonSource, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = libjpeg.Decoder.decode
    monkeypatch.setattr(libjpeg.Decoder, "decode", lambda self, *rest: (calls.append(1), decode(self, *rest)))
    run = ffcv(source, epochs=1)
    batches = list(run)
    assert len(batches) == 7 and all(len(batch.views) == 10 for batch in batches)
    assert run.decoded == len(calls) == 56


def test_pixels_kept_raw_and_arrays_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 26, 3), np.uint8)
    write_beton(ArraySource(images), tmp_path / "raw.beton", BetonOptions())
    raw = BetonSource(tmp_path / "raw.beton")
    assert raw.raw(0)
    assert_same(ffcv(raw), pillow(ArraySource(images)))
    only_global = ViewSettings(global_crops_size=30, local_crops_number=0)
    assert_same(ffcv(raw, only_global), pillow(ArraySource(images), only_global))


def test_views_larger_than_the_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 12, 3), np.uint8)
    write_beton(ArraySource(images), tmp_path / "small.beton")
    views = ViewSettings(global_crops_size=64, local_crops_size=32, local_crops_number=1)
    assert_same(ffcv(BetonSource(tmp_path / "small.beton"), views), pillow(ArraySource(images), views))


def test_color_agrees_with_augment(source: BetonSource) -> None:
    for plain, done in zip(ffcv(source), ffcv(source, colored=True, workers=2), strict=True):
        assert done.colored and not plain.colored
        for first, x, y in ((0, plain.groups[0], done.groups[0]), (2, plain.groups[1], done.groups[1])):
            expected = color(x.flatten(0, 1), color_of(plain.plan, slice(first, first + len(x)))) * 255
            assert (expected.view(y.shape) - y).abs().max() < 0.51


# --- guards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [mangled, other_size, lambda data: bytes(len(data))], ids=["cut", "size", "zeros"])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_counted_and_replaced(
    beton: Path, source: BetonSource, tmp_path: Path, how: Callable[..., Any], workers: int
) -> None:
    damaged = broken(beton, tmp_path, [7, 8, 59], how)
    run = ffcv(damaged, max_bad_fraction=0.2, workers=workers)
    replaced = {7: 9, 8: 9, 59: 0}
    whole = [b for b in ffcv(source) if b.epoch == 0]
    for batch, good in zip([b for b in run if b.epoch == 0], whole, strict=True):
        assert batch.index.tolist() == [replaced.get(i, i) for i in good.index.tolist()]
        plan = plan_views(VIEWS, 3, 0, batch.index, source.size[batch.index])  # that of the replacement
        assert all(np.array_equal(getattr(batch.plan, name), getattr(plan, name)) for name in PLAN)
        for k, (i, j) in enumerate(zip(batch.index, good.index, strict=True)):
            if i == j:  # the others are untouched
                assert torch.equal(batch.groups[0][:, k], good.groups[0][:, k])
    assert set(run.bad) == {source.name(i) for i in (7, 8, 59)}
    assert_same(pillow(damaged, max_bad_fraction=0.2), ffcv(damaged, max_bad_fraction=0.2))


def verdicts(loader: DeviceLoader | FFCVLoader | PillowLoader) -> tuple[list[list[Any]], list[str]]:
    """The samples of each batch, and every bad image."""
    index = [batch.index.tolist() for batch in loader]
    return index, sorted(loader.bad)


@pytest.mark.parametrize("named", [True, False], ids=["with CRC", "name records damaged"])
def test_many_damaged_headers_have_one_verdict_in_every_loader(
    beton: Path, source: BetonSource, tmp_path: Path, named: bool
) -> None:
    """One byte of the header each: what a good neighbor is must not depend on who was decoded before, by whom."""
    rng = np.random.default_rng(0)

    def one_byte(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(rng.integers(0, 400))] ^= 0xFF
        return bytes(changed)

    damaged = broken(beton, tmp_path, range(0, 60, 3), one_byte)
    if not named:
        data = bytearray(damaged.path.read_bytes())
        for ptr, size in damaged.records["name"].tolist():
            data[ptr : ptr + size] = b"\xff[{" + bytes(size - 3)
        damaged.path.write_bytes(data)
        damaged = BetonSource(damaged.path)
    options = {"max_bad_fraction": 0.9, "epochs": 1}
    expected = verdicts(pillow(damaged, **options))
    assert 5 < len(expected[1]) <= 20
    assert len(expected[1]) > 15 or not named  # a CRC notices every changed byte; a few images are in no whole batch
    for workers in (0, 3):
        assert verdicts(ffcv(damaged, workers=workers, **options)) == expected
    device = DeviceLoader(damaged, VIEWS, LoaderOptions(**{**OPTIONS, **options}), device=torch.device("cpu"))
    assert verdicts(device) == expected
    whole, rest = list(ffcv(damaged, workers=3, **options)), ffcv(damaged, workers=2, **options)
    rest.seek(0, 3)
    assert_same([strip(b) for b in whole[3:]], [strip(b) for b in rest])


def strip(batch: Any) -> Any:
    return replace(batch, bad=[])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_end_the_run(beton: Path, tmp_path: Path, workers: int) -> None:
    damaged = broken(beton, tmp_path, range(0, 60, 3), mangled)
    with pytest.raises(UserError, match=r"of the \d+ images read so far cannot be used.*class\d/\d+\.jpg: "):
        list(ffcv(damaged, workers=workers))
    with pytest.raises(UserError, match=r"images read so far cannot be used"):
        list(ffcv(broken(beton, tmp_path, range(60), mangled), workers=workers))


def test_images_too_small_are_bad(tmp_path: Path) -> None:
    write_beton(ArraySource(np.zeros((40, 7, 30, 3), np.uint8)), tmp_path / "a.beton", BetonOptions(min_side=1))
    with pytest.raises(UserError, match=r"30 x 7 pixels, below data.min_side = 8"):
        next(iter(ffcv(BetonSource(tmp_path / "a.beton"))))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_goes_wrong_in_a_thread_reaches_the_caller(
    source: BetonSource, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    stored, threads = BetonSource.stored, threading.active_count()

    def mistaken(self: BetonSource, i: int) -> bytes:
        if i == 11:
            raise ZeroDivisionError("a mistake in a source")
        return stored(self, i)

    monkeypatch.setattr(BetonSource, "stored", mistaken)
    with pytest.raises(ZeroDivisionError, match="a mistake in a source"):
        list(ffcv(source, workers=workers))
    assert threading.active_count() == threads


def test_a_file_cut_while_it_is_read_is_no_crash(beton: Path, tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS."""
    copy = tmp_path / "copy.beton"
    copy.write_bytes(beton.read_bytes())
    stream = iter(ffcv(BetonSource(copy), workers=1, epochs=100))
    next(stream)
    with open(copy, "r+b") as file:
        file.truncate(2**23 + 1000)
    with pytest.raises(UserError, match="the file ends before it"):
        for _ in stream:
            pass


def test_batches_own_their_memory(source: BetonSource) -> None:
    """Nothing that came out changes while later batches are made, and no two batches share a byte."""
    kept = [(batch, [group.clone() for group in batch.groups]) for batch in ffcv(source, workers=3, epochs=4)]
    assert all(torch.equal(x, y) for batch, copies in kept for x, y in zip(batch.groups, copies, strict=True))
    places = sorted((batch.groups[0].data_ptr(), batch.groups[-1].data_ptr()) for batch, _ in kept)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(places))


def test_torchs_threads_are_left_alone(source: BetonSource) -> None:
    before = torch.get_num_threads()
    list(ffcv(source, workers=3, epochs=1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("leave", ["break", "raise", "drop", "end"])
def test_leaving_the_loop_ends_the_threads(source: BetonSource, leave: str) -> None:
    threads = threading.active_count()
    stream = iter(ffcv(source, workers=3, epochs=1 if leave == "end" else 10**6))
    try:
        for _ in stream:
            if leave == "break":
                break
            if leave == "raise":
                raise KeyError
            if leave == "drop":
                break
    except KeyError:
        pass
    del stream
    gc.collect()
    assert threading.active_count() == threads


@pytest.mark.long
def test_nothing_leaks_over_fifty_epochs_and_many_loops_left_early(source: Any) -> None:
    process, files = psutil.Process(), psutil.Process().num_fds()
    for _ in range(5):  # libraries and allocators get what they keep
        next(iter(ffcv(source, workers=2)))
    list(ffcv(source, workers=2, epochs=10))
    gc.collect()
    before, threads = process.memory_info().rss, process.num_threads()
    for batch in ffcv(source, workers=2, epochs=50, colored=True):
        assert batch.groups
    for _ in range(50):
        next(iter(ffcv(source, workers=2)))
    gc.collect()
    assert process.num_threads() == threads
    assert process.num_fds() <= files
    assert process.memory_info().rss - before < 20 * 2**20


def test_a_slow_caller_does_not_make_batches_pile_up(source: BetonSource, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    loader = ffcv(source, workers=2, epochs=100)
    assemble = loader.assemble
    monkeypatch.setattr(loader, "assemble", lambda task: (started.append(task), assemble(task))[1])
    stream = cast("Generator[Batch]", iter(loader))
    next(stream)
    time.sleep(0.3)
    assert len(started) <= 4
    stream.close()


def test_a_beton_is_a_source_for_everyone_else(source: BetonSource, photos: Path) -> None:
    plain = FolderSource(photos)
    assert np.array_equal(np.asarray(source.read(5)), np.asarray(plain.read(5)))
    assert isinstance(source.read(5), Image.Image)


def test_large_photographs_shrink_as_pillow_shrinks_them(tmp_path: Path) -> None:
    """Twenty-fold: many taps, and the scratch grows from image to image."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()
    for i, (height, width) in enumerate([(100, 90), (1300, 200), (400, 1500), (1100, 1200)]):
        small = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    write_beton(FolderSource(folder), tmp_path / "large.beton", BetonOptions(max_side=None))
    large = BetonSource(tmp_path / "large.beton")
    assert_same(ffcv(large, batch_size=2), pillow(large, batch_size=2))


def test_processes_can_be_forked_while_the_threads_work(source: BetonSource) -> None:
    """As the online k-NN does: its workers are forked in the middle of a training epoch."""
    stream = cast("Generator[Batch]", iter(ffcv(source, workers=2, epochs=50)))
    for _ in range(3):
        next(stream)
        forked = list(pillow(source, epochs=1, workers=1))
        assert len(forked) == 7
    stream.close()
