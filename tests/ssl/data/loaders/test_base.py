from __future__ import annotations

import collections
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Generator, Iterable
from multiprocessing import Value
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.loaders.base import Batch, LoaderOptions
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import ArraySource, Source
from nearfar.ssl.data.transforms.crops import render
from nearfar.ssl.data.views import epoch_order, plan_views
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=24, local_crops_size=16, local_crops_number=3)


def noise(n: int = 50, height: int = 20, width: int = 26, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def source(n: int = 50) -> ArraySource:
    return ArraySource(noise(n), labels=np.arange(n) % 7)


class Broken(ArraySource):
    """Some of its images cannot be read."""

    def __init__(self, n: int, bad: Iterable[int]) -> None:
        super().__init__(noise(n))
        self.broken = set(bad)

    def read(self, i: int) -> Image.Image:
        if i in self.broken:
            raise BadImage(self.name(i), "broken on purpose")
        return super().read(i)


def loader(data: Source | None = None, views: ViewSettings = VIEWS, **options: float) -> PillowLoader:
    return PillowLoader(data or source(), views, LoaderOptions(**{"batch_size": 8, "epochs": 2, "seed": 3, **options}))


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    one, two = list(first), list(second)
    assert [(b.epoch, b.step) for b in one] == [(b.epoch, b.step) for b in two]
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.index, b.index)
        assert np.array_equal(a.label, b.label)
        assert all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))
        assert np.array_equal(a.plan.factors, b.plan.factors)
        assert a.bad == b.bad


_others: set[int] = set()  # processes that earlier tests of other files left running, such as a resource tracker


@pytest.fixture(autouse=True)
def _know_the_others() -> None:
    _others.clear()
    _others.update(process.pid for process in psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    """The live processes that this test has started."""
    gc.collect()
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.pid not in _others and p.status() != psutil.STATUS_ZOMBIE]


def test_what_a_batch_is() -> None:
    batch = next(iter(loader()))
    assert [(g.dtype, tuple(g.shape)) for g in batch.groups] == [
        (torch.uint8, (2, 8, 3, 24, 24)),
        (torch.uint8, (3, 8, 3, 16, 16)),
    ]
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 24, 24)] * 2 + [(8, 3, 16, 16)] * 3
    assert batch.index.tolist() == epoch_order(3, 0, 50)[:8].tolist()
    assert batch.label.tolist() == (batch.index % 7).tolist()
    assert batch.plan.flip.shape == (8, 5)
    only_global = next(iter(loader(ArraySource(noise()), ViewSettings(global_crops_size=24, local_crops_number=0))))
    assert len(only_global.groups) == 1
    assert only_global.label is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")  # than there may be cores here
@pytest.mark.parametrize("workers", [1, 4])
def test_same_batches_for_every_worker_count(workers: int) -> None:
    bad = range(0, 50, 10)
    assert_same(
        loader(Broken(50, bad), max_bad_fraction=0.5), loader(Broken(50, bad), max_bad_fraction=0.5, workers=workers)
    )
    assert not children()


@pytest.mark.parametrize("bad", [[7], [3, 31]])
def test_no_bad_image_is_allowed_where_none_is_asked_for(bad: list[int]) -> None:
    """A few were, whatever data.max_bad_fraction = 0 says."""
    with pytest.raises(UserError, match=r"data\.max_bad_fraction = 0\.0 allows"):
        list(loader(Broken(50, bad), max_bad_fraction=0.0))
    assert len(list(loader(Broken(50, bad), max_bad_fraction=1e-9))) == 12


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 4), (1, 0), (1, 5), (2, 0)])
def test_seek_gives_the_tail_of_the_stream(workers: int, epoch: int, step: int) -> None:
    sought = loader(workers=workers)
    sought.seek(epoch, step)
    whole = list(loader())
    assert_same(sought, whole[epoch * 6 + step :])
    assert_same(sought, whole[epoch * 6 + step :])  # iterating again starts there again


def test_seek_refuses_places_that_do_not_exist() -> None:
    for position in ((0, 6), (3, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="no step"):
            loader().seek(*position)


@pytest.mark.parametrize("n", [48, 50])
def test_ranks_share_the_global_batch(n: int) -> None:
    one = list(loader(source(n)))
    ranks = [list(loader(source(n), batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    assert len(one) == len(ranks[0]) == len(ranks[1])
    for whole, left, right in zip(one, *ranks, strict=True):
        assert np.array_equal(whole.index, np.concatenate([left.index, right.index]))
        for g, group in enumerate(whole.groups):
            assert torch.equal(group, torch.cat([left.groups[g], right.groups[g]], 1))


def test_an_epoch_sees_every_image_once_and_drops_the_rest() -> None:
    batches = list(loader())
    assert loader().steps_per_epoch == 6
    for epoch in (0, 1):
        seen = np.concatenate([b.index for b in batches if b.epoch == epoch])
        assert len(seen) == len(set(seen.tolist())) == 48
    assert not np.array_equal(batches[0].index, batches[6].index)


class Counting(ArraySource):
    def __init__(self, n: int) -> None:
        super().__init__(noise(n))
        self.reads = Value("i", 0)  # shared with workers

    def read(self, i: int) -> Image.Image:
        with self.reads.get_lock():
            self.reads.value += 1
        return super().read(i)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("local_count", [0, 8])
def test_an_image_is_decoded_once_however_many_views(workers: int, local_count: int) -> None:
    data = Counting(50)
    run = loader(
        data,
        ViewSettings(global_crops_size=8, local_crops_size=8, local_crops_number=local_count),
        epochs=1,
        workers=workers,
    )
    assert len(list(run)) == 6
    assert run.decoded == data.reads.value == 48


def test_a_bad_image_is_replaced_by_the_next_good_one_and_named() -> None:
    data = Broken(40, [7, 8, 39])
    run = loader(data, max_bad_fraction=0.2, epochs=1)
    replaced = {7: 9, 8: 9, 39: 0}
    good = list(loader(ArraySource(data.images), epochs=1))
    for batch, whole in zip(run, good, strict=True):
        assert batch.index.tolist() == [replaced.get(i, i) for i in whole.index.tolist()]
        size = np.full((8, 2), (20, 26))
        plan = plan_views(VIEWS, 3, 0, batch.index, size)  # the views are those of the replacement
        assert np.array_equal(plan.box, batch.plan.box)
        assert torch.equal(batch.groups[0], render([data.read(i) for i in batch.index], plan.views(slice(2)), 24))
    assert run.bad == {f"image {i}": "broken on purpose" for i in (7, 8, 39)}


def test_too_small_images_are_bad() -> None:
    run = loader(ArraySource(noise(50, 7, 30)))
    with pytest.raises(UserError, match=r"30 x 7 pixels, below data.min_side = 8"):
        next(iter(run))
    assert next(iter(loader(ArraySource(noise(50, 7, 30)), min_side=7))).step == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [range(50), range(10, 50), range(0, 50, 3)])
def test_too_many_bad_images_end_the_run_and_are_listed(workers: int, bad: Iterable[int]) -> None:
    with pytest.raises(UserError, match=r"of the \d+ images read so far.*image \d+: broken on purpose"):
        list(loader(Broken(50, bad), workers=workers))
    assert not children()


def test_some_bad_images_do_not_end_it() -> None:
    assert len(list(loader(Broken(50, [3, 30])))) == 12  # above 1 %, but so few
    assert len(list(loader(Broken(50, range(0, 50, 2)), max_bad_fraction=0.6))) == 12


def test_a_share_of_bad_images_is_a_share_of_those_seen() -> None:
    data = Broken(400, range(0, 400, 10))  # 10 %
    with pytest.raises(UserError, match=r"20 of the|21 of the"):
        list(loader(data, ViewSettings(global_crops_size=8, local_crops_number=0), max_bad_fraction=0.05))
    assert (
        len(
            list(loader(data, ViewSettings(global_crops_size=8, local_crops_number=0), max_bad_fraction=0.15, epochs=1))
        )
        == 50
    )


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"50 images cannot fill one batch of 64 \(32 on each of 2"):
        loader(batch_size=32, world_size=2)


@pytest.mark.parametrize("how", ["break", "raise", "drop"])
def test_leaving_early_leaves_no_processes(how: str) -> None:
    run = loader(workers=2, epochs=100)
    if how == "break":
        for _ in run:
            break
    elif how == "raise":
        with contextlib.suppress(KeyError):
            for _ in run:
                raise KeyError
    else:
        stream = iter(run)
        next(stream)
        assert len(children()) == 2
        del stream
    assert not children()


def test_workers_outlive_epochs_and_ignore_signals() -> None:
    run = loader(workers=2, epochs=4)
    stream = iter(run)
    next(stream)
    processes = children()
    assert len(processes) == 2
    for process in processes:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(name)
    assert len(list(stream)) == 23
    assert_same(loader(workers=2, epochs=4), loader(epochs=4))


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    stream = cast("Generator[Batch]", iter(loader(workers=2, epochs=1000)))
    next(stream)
    children()[0].kill()
    with pytest.raises(RuntimeError, match="worker"):
        collections.deque(stream, maxlen=0)
    stream.close()
    assert not children()


class Mistaken(ArraySource):
    def read(self, i: int) -> Image.Image:
        if i == 1:
            raise ZeroDivisionError("a mistake in a source")
        return super().read(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_not_swallowed(workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a mistake in a source"):
        list(loader(Mistaken(noise()), workers=workers))
    assert not children()


def test_a_program_that_ends_in_the_middle_ends() -> None:
    """With the stream still open: workers that ignore SIGTERM must not keep the interpreter waiting."""
    program = textwrap.dedent("""
        import numpy as np
        from nearfar.ssl.settings.run import ViewSettings
        from nearfar.ssl.data.loaders.base import LoaderOptions
        from nearfar.ssl.data.loaders.pillow import PillowLoader
        from nearfar.ssl.data.sources.base import ArraySource
        data = ArraySource(np.zeros((50, 20, 20, 3), np.uint8))
        options = LoaderOptions(batch_size=8, epochs=100, workers=2)
        loader = PillowLoader(data, ViewSettings(global_crops_size=8, local_crops_number=0), options)
        stream = iter(loader)
        next(stream)
        print("over")
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={**os.environ}, check=False
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
    assert "Traceback" not in done.stderr


class TooLarge(ArraySource):
    def read(self, i: int) -> Image.Image:
        raise MemoryError("3 GiB for one image")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_memory_is_told(workers: int) -> None:
    with pytest.raises(UserError, match=r"not enough memory .*fewer data\.workers") as caught:
        list(loader(TooLarge(noise()), workers=workers))
    assert "Traceback" not in str(caught.value)
    assert not children()
