"""A .beton -> batches of views, by libjpeg-turbo and compiled loops instead of Pillow.

The same order, plan, replacements and batches as the Pillow loader; pixels equal to Pillow's but for a gray level here
and there (see compiled_crops.py). Each image is decoded once, and all its views go into one flat buffer.

What it takes from FFCV is the file format and the JPEG library, not the Loader. That one lets an exception in its
thread block `next()` forever, reuses a ring of buffers while they may still be in use, sets torch's thread count, and
shows a pipeline neither epoch nor position, of which a plan is a function. Here a batch is a task of a thread pool
(decoding and loops run without the GIL) and owns its memory; what goes wrong in a thread is raised in the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import local
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions, Task
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.errors import BadImage
from nearfar.ssl.settings.run import ViewSettings

if TYPE_CHECKING:
    from nearfar.ssl.data.transforms.compiled_crops import Scratch


class FFCVLoader(Loader):
    """`Loader` over a .beton; `workers` are threads.

    With `colored`, the color half of the views is done as well (compiled_colors.py), and `Batch.colored` says so.
    A JPEG for which libjpeg-turbo gives even a warning is bad: what it fills in for missing or damaged bytes is not the
    image. Leaving the loop ends the threads.
    """

    title = "ffcv loader"

    def __init__(
        self, source: BetonSource, views: ViewSettings, options: LoaderOptions, *, colored: bool = False
    ) -> None:
        libjpeg.require("The ffcv loader")
        super().__init__(source, views, options)
        self.beton, self.colored = source, colored
        self._sides = np.array(
            [views.global_crops_size] * views.global_crops + [views.local_crops_size] * views.local_crops_number
        )
        self._of_this_thread = local()

    def batches(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        workers = self.options.workers
        if workers == 0:
            yield from super().batches(tasks)
            return
        # Compiled (or read from numba's cache) before there are threads: two that call a function for the first time
        # together can leave its table of types damaged, and a later call then ends in a KeyError.
        self.assemble(Task(0, 0, np.arange(2) % len(self.source)))
        pool = ThreadPoolExecutor(workers, "nearfar-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(self.assemble, task))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def assemble(self, task: Task) -> Batch:
        """Plan the whole batch by the sizes in the file, then decode and render; plan replaced images again."""
        from nearfar.ssl.data.transforms.compiled_crops import make_views

        if not hasattr(self._of_this_thread, "decoder"):
            self._of_this_thread.decoder = _ImageDecoder(self.beton, int(self._sides.max()))
        decoder: _ImageDecoder = self._of_this_thread.decoder
        n, decoded, seed = len(task.index), 0, self.options.seed
        plan = plan_views(self.views, seed, task.epoch, task.index, self.beton.size[task.index])
        areas = 3 * self._sides**2
        # Group by group, view by view, sample by sample: where view v of sample k begins is start[v] + k * areas[v].
        start = np.concatenate([[0], np.cumsum(areas * n)])
        pixels = torch.empty(int(start[-1]), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        out = pixels.numpy()

        def use(k: int, i: int) -> None:
            nonlocal decoded
            height, width = self.beton.size[i].tolist()
            self.check_size(i, height, width)
            decoder.decode(i, height, width)
            decoded += 1
            if i != task.index[k]:
                plan.set_sample(k, plan_views(self.views, seed, task.epoch, [i], [(height, width)]))
            make_views(
                tuple(decoder.scratch), height, width, plan.box[k], plan.flip[k], self._sides,
                start[:-1] + k * areas, out, self.colored, plan.jitter[k], plan.factors[k], plan.order[k],
                plan.gray[k], plan.sigma[k], plan.solarize[k], plan.solarize_threshold,
            )  # fmt: skip

        taken = self.take(task.index, use)
        groups = []
        if taken.complete:
            size, small, number = self.views.global_crops_size, self.views.local_crops_size, self.views.global_crops
            split = int(start[number])
            groups = [pixels[:split].view(number, n, 3, size, size)]
            if self.views.local_crops_number:
                groups.append(pixels[split:].view(self.views.local_crops_number, n, 3, small, small))
        return replace(self.batch(task, taken, groups, plan, decoded), colored=self.colored)


class _ImageDecoder:
    """The decoder and scratch of a thread."""

    scratch: Scratch

    def __init__(self, source: BetonSource, side: int) -> None:
        self.source, self.side = source, side
        self.jpeg_decoder = libjpeg.Decoder()
        self.largest = (0, 0)  # height and width that the scratch is made for

    def decode(self, i: int, height: int, width: int) -> None:
        """Image i into scratch.pixels. Raises BadImage."""
        from nearfar.ssl.data.transforms.compiled_crops import make_scratch, pitch

        data, row = self.source.checked(i), pitch(width)
        if height > self.largest[0] or width > self.largest[1]:
            self.largest = (max(height, self.largest[0]), max(width, self.largest[1]))
            self.scratch = make_scratch(*self.largest, self.side)
        pixels = self.scratch.pixels.view(np.uint8)
        if not self.source.raw(i):
            try:
                self.jpeg_decoder.decode(data, pixels, height, width, row)
            except libjpeg.JPEGError as error:
                raise BadImage(self.source.name(i), str(error)) from error
        elif len(data) != 3 * height * width:
            raise BadImage(self.source.name(i), f"{len(data)} bytes are not {width} x {height} pixels")
        else:
            pixels[: height * row].reshape(height, row)[:, : 3 * width] = _rows(data, height, width)


def _rows(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(height, 3 * width)
