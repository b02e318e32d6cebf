"""A .beton -> batches of views: the loader of data.py with libjpeg-turbo and compiled loops in place of Pillow.

The same order, plan, replacements and batches as the folder loader; pixels equal to Pillow's but for a gray level here
and there (cpu_views.py says when). Each image is decoded once, and all its views go into one flat buffer.

What it takes from FFCV is the file format and the JPEG library, not the Loader. That one lets an exception in its
thread block `next()` for ever, reuses a ring of buffers while they may still be in use, sets torch's thread count, and
shows a pipeline neither epoch nor position, of which a plan is a function. Here a batch is a task of a thread pool
(decoding and loops run without the GIL) and owns its memory; what goes wrong in a thread is raised in the caller.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from threading import local
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.ssl.config import Views
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.loaders.base import Batch, Loader, Task, check_size, first_good
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.views import ViewPlan, plan_views
from nearfar.ssl.errors import BadImage


class FFCVLoader(Loader):
    """`data.Loader` over a .beton, to which its docstring applies; `workers` are threads here.

    With `colored`, the color half of the views is done as well (cpu_color.py), and `Batch.colored` says so.
    A JPEG of which libjpeg-turbo says so much as a warning is bad: what it makes up for missing or mangled bytes is
    not the image. Leaving the loop ends the threads.
    """

    word = "ffcv loader"

    def __init__(
        self, source: BetonSource, views: Views, *, colored: bool = False, min_side: int = 8, **options: Any
    ) -> None:
        libjpeg.require("The ffcv loader")
        super().__init__(source, views, min_side=min_side, **options)
        self._task_room = _Room(source, views, self.seed, min_side, self._batches.patience, colored)

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            for task in self._tasks():
                yield self._checked(self._task_room.batch(task))
            return
        # Compiled (or read from numba's cache) before there are threads: two that call a function for the first time
        # together can leave its table of types damaged, and a later call then ends in a KeyError.
        self._task_room.batch(Task(0, 0, np.arange(2) % len(self.source)))
        pool = ThreadPoolExecutor(self.workers, "nearfar-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for task in self._tasks():
                ahead.append(pool.submit(self._task_room.batch, task))
                if len(ahead) > self.workers:
                    yield self._checked(ahead.popleft().result())
            while ahead:
                yield self._checked(ahead.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Room:
    """Executes tasks, in any thread; each thread has its own decoder and scratch."""

    def __init__(
        self, source: BetonSource, views: Views, seed: int, min_side: int, patience: int, colored: bool
    ) -> None:
        self.source, self.views, self.seed, self.min_side, self.patience = source, views, seed, min_side, patience
        self.colored = colored
        self.sides = np.array(
            [views.global_crops_size] * 2 + [views.local_crops_size] * views.local_crops_number
        )  # (V,)
        self._mine = local()

    def batch(self, task: Task) -> Batch:
        """Plan the whole batch by the sizes in the file, then decode and render; plan anew what is replaced."""
        from nearfar.ssl.data.transforms.compiled_crops import make_views

        if not hasattr(self._mine, "artist"):
            self._mine.artist = _Artist(self.source, int(self.sides.max()))
        artist: _Artist = self._mine.artist
        n, index, decoded = len(task.index), task.index.copy(), 0
        bad: dict[str, str] = {}
        plan = plan_views(self.views, self.seed, task.epoch, index, self.source.size[index])
        areas = 3 * self.sides**2
        # Group by group, view by view, sample by sample: where view v of sample k begins is start[v] + k * areas[v].
        start = np.concatenate([[0], np.cumsum(areas * n)])
        pixels = torch.empty(int(start[-1]), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        out = pixels.numpy()

        for k, wanted in enumerate(task.index.tolist()):

            def use(i: int, k: int = k, wanted: int = wanted) -> None:
                nonlocal decoded
                height, width = self.source.size[i].tolist()
                check_size(self.source, i, height, width, self.min_side)
                if i != wanted:
                    _replace(plan, k, plan_views(self.views, self.seed, task.epoch, [i], [(height, width)]))
                artist.decode(i, height, width)
                decoded += 1
                make_views(
                    tuple(artist.scratch), height, width, plan.box[k], plan.flip[k], self.sides,
                    start[:-1] + k * areas, out, self.colored, plan.jitter[k], plan.factors[k], plan.order[k],
                    plan.gray[k], plan.sigma[k], plan.solarize[k], self.views.solarize_threshold,
                )  # fmt: skip

            found = first_good(wanted, len(self.source), use, bad, self.patience)
            if found is None:  # nothing readable: the loader will not go on from here
                return Batch([], plan, index, None, task.epoch, task.step, list(bad.items()), decoded)
            index[k] = found
        size, small, split = self.views.global_crops_size, self.views.local_crops_size, int(start[2])
        groups = [pixels[:split].view(2, n, 3, size, size)]
        if self.views.local_crops_number:
            groups.append(pixels[split:].view(self.views.local_crops_number, n, 3, small, small))
        label = None if self.source.labels is None else self.source.labels[index]
        return Batch(groups, plan, index, label, task.epoch, task.step, list(bad.items()), decoded, self.colored)


def _replace(plan: ViewPlan, k: int, other: ViewPlan) -> None:
    """Sample k is now the one of `other`."""
    for field in fields(plan):
        getattr(plan, field.name)[k] = getattr(other, field.name)[0]


class _Artist:
    """The decoder and scratch of a thread."""

    def __init__(self, source: BetonSource, side: int) -> None:
        self.source, self.side = source, side
        self.decoder = libjpeg.Decoder()
        self.reach = (0, 0)

    def decode(self, i: int, height: int, width: int) -> None:
        """Image i into scratch.pixels. Raises BadImage."""
        from nearfar.ssl.data.transforms.compiled_crops import make_scratch, pitch

        if height > self.reach[0] or width > self.reach[1]:
            self.reach = (max(height, self.reach[0]), max(width, self.reach[1]))
            self.scratch = make_scratch(*self.reach, self.side)
        data, place, row = self.source.checked(i), self.scratch.pixels.view(np.uint8), pitch(width)
        if not self.source.raw(i):
            try:
                self.decoder.decode(data, place, height, width, row)
            except libjpeg.JPEGError as error:
                raise BadImage(self.source.name(i), str(error)) from error
        elif len(data) != 3 * height * width:
            raise BadImage(self.source.name(i), f"{len(data)} bytes are not {width} x {height} pixels")
        else:
            place[: height * row].reshape(height, row)[:, : 3 * width] = _rows(data, height, width)


def _rows(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(height, 3 * width)
