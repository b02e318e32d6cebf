"""Images -> batches at evaluation size, in order: by libjpeg-turbo and compiled loops in threads where the images are
JPEGs and FFCV is installed, else by Pillow in worker processes. The pixels are the same either way.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.decode import is_upright, size_problem
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.eval_view import Window, center_window, eval_view
from nearfar.ssl.errors import BadImage
from nearfar.ssl.parallel.distributed import available_cores, from_environment

_MOST_WORKERS = 16


@dataclass(frozen=True)
class Decoding:
    """How images are read; none of it changes a feature.

    batch_size: images per batch. workers: threads or processes that decode, 0 for this one, None for as many as
    `default_workers` says. progress: called with the number of images of each batch. shared: together with all ranks
    of the job, which run `nearfar.eval.features.extraction.compute_share` meanwhile.
    """

    batch_size: int = 64
    workers: int | None = None
    progress: Callable[[int], object] | None = None
    shared: bool = False


@dataclass(frozen=True)
class DecodedBatch:
    images: Tensor | None  # uint8 (B, 3, H, W); None when no image of the batch could be read
    index: list[int]
    masks: list[np.ndarray | None]
    bad: list[tuple[str, str]]
    rescaled: list[str]  # masks of another resolution than their image, in words

    def pin_memory(self) -> "DecodedBatch":
        """Called by DataLoader: copies from pinned memory to a GPU are asynchronous."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


class View(NamedTuple):
    """Height and width of what is made of an image: a center crop (`eval_view`), or the whole image, resized."""

    size: tuple[int, int]
    resize: int | None
    whole: bool

    def window(self, height: int, width: int) -> Window:
        if self.whole:
            return Window(*self.size, 0, 0, *self.size)
        return center_window(height, width, self.size[0], self.resize)

    def of(self, image: Image.Image) -> Tensor:
        """By Pillow, uint8 (3, H, W)."""
        if not self.whole:
            return eval_view(image, self.size[0], self.resize)
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def default_workers(device: torch.device, batches: int) -> int:
    """One for each core of this process, or for each fourth where the network itself computes on the cores; none for a
    single batch, since there is nothing to decode meanwhile."""
    cores = from_environment().cores or available_cores()
    preferred = cores if device.type == "cuda" else max(1, cores // 4)
    return max(0, min(preferred, _MOST_WORKERS, batches - 1))


def batches(
    source: Source, view: View, numbers: Sequence[Sequence[int]], *, workers: int, pinned: bool
) -> Iterator[DecodedBatch]:
    """A batch for each entry of `numbers`, which are rows of `source`; pinned: in memory that a GPU copies from."""
    if decodes_compiled(source):
        yield from _by_threads(_CompiledImages(source, view), numbers, workers, pinned)
        return
    yield from DataLoader(
        _Images(source, view),
        batch_sampler=[list(rows) for rows in numbers],
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=quiet_worker,
        pin_memory=pinned,
        generator=torch.Generator(),  # else the loader draws from, and so changes, the global random state
    )


def decodes_compiled(source: Source) -> bool:
    """Whether libjpeg-turbo and compiled loops read this source: FFCV is installed, and its first image is a JPEG."""
    if not libjpeg.available() or find_spec("numba") is None:
        return False
    try:
        data = source.encoded(0)
    except BadImage:
        return False
    return data is not None and data.startswith(b"\xff\xd8")


def fitting_mask(source: Source, i: int, size: tuple[int, int]) -> tuple[np.ndarray | None, str | None]:
    """The mask of image i, of size (height, width), at any resolution, and in words where that is not the image's.

    Raises BadImage where its shape is another (say turned by 90 degrees).
    """
    mask = source.mask(i)
    if mask is None or mask.shape == size:
        return mask, None
    (height, width), (image_height, image_width) = mask.shape, size
    if abs(height * image_width - width * image_height) > max(height * image_width, width * image_height) / 20:
        why = f"its mask of {width} x {height} does not fit an image of {image_width} x {image_height}"
        raise BadImage(source.name(i), why)
    return mask, f"{source.name(i)}: {image_width} x {image_height}, its mask {width} x {height}"


class _Images(Dataset):
    """One image (and its mask) at evaluation size, or the reason why there is none."""

    def __init__(self, source: Source, view: View) -> None:
        self.source, self.view = source, view

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> DecodedBatch:
        try:
            pixels, size = self.read(i)
            mask, rescaled = fitting_mask(self.source, i, size) if self.view.whole else (None, None)
        except BadImage as error:
            return DecodedBatch(None, [], [], [(error.name, error.why)], [])
        return DecodedBatch(pixels, [i], [mask], [], [rescaled] if rescaled else [])

    def read(self, i: int) -> tuple[Tensor, tuple[int, int]]:
        """Its pixels, uint8 (3, H, W), and the height and width of the image they are of. Raises BadImage."""
        image = self.source.read(i)
        return self.view.of(image), (image.height, image.width)


class _CompiledImages(_Images):
    """`_Images` by libjpeg-turbo and compiled loops; Pillow reads (or refuses) anything but a plain, clean JPEG."""

    def __init__(self, source: Source, view: View) -> None:
        super().__init__(source, view)
        self._of_this_thread = local()

    def read(self, i: int) -> tuple[Tensor, tuple[int, int]]:
        data = self.source.encoded(i)
        if data is not None and _plain(data):
            if not hasattr(self._of_this_thread, "reader"):
                self._of_this_thread.reader = _JPEGReader()
            try:
                return self._of_this_thread.reader.read(data, self.view)
            except libjpeg.JPEGError:
                pass
        return super().read(i)


def _plain(data: bytes) -> bool:
    """A JPEG in color or gray that needs no turning."""
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:  # its header only
            return (
                image.mode in ("RGB", "L")
                and is_upright(image)
                and size_problem(image.height, image.width, min_side=1) is None
            )
    except MemoryError:
        raise
    except Exception:  # damaged files make Pillow raise nearly anything; whoever reads the image next names the reason
        return False


class _JPEGReader:
    """The decoder and the scratch memory of one thread."""

    def __init__(self) -> None:
        self.decoder = libjpeg.Decoder()
        self.largest = (0, 0, 0)  # height and width of images, side of what they are resized to

    def read(self, data: bytes, view: View) -> tuple[Tensor, tuple[int, int]]:
        """Raises JPEGError."""
        from nearfar.ssl.data.transforms.compiled_crops import pitch
        from nearfar.ssl.data.transforms.compiled_eval_view import make_eval_scratch, make_eval_view

        height, width = self.decoder.size(data)
        window = view.window(height, width)
        needed = (height, width, max(window.new_height, window.new_width))
        if any(a > b for a, b in zip(needed, self.largest, strict=True)):
            a, b = needed, self.largest
            self.largest = (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))
            self.scratch = make_eval_scratch(*self.largest)
        pixels: NDArray[np.uint8] = self.scratch.pixels.view(np.uint8)
        self.decoder.decode(data, pixels, height, width, pitch(width))
        out = np.empty((3, window.height, window.width), np.uint8)
        make_eval_view(self.scratch, height, width, window, out)
        return torch.from_numpy(out), (height, width)


def _by_threads(
    images: _CompiledImages, numbers: Sequence[Sequence[int]], workers: int, pinned: bool
) -> Iterator[DecodedBatch]:
    """One batch per task of a thread pool: decoding and the compiled loops release the GIL."""

    def assemble(rows: Sequence[int]) -> DecodedBatch:
        batch = _collate([images[i] for i in rows])
        return batch.pin_memory() if pinned else batch

    tasks = (partial(assemble, rows) for rows in numbers)
    if workers == 0:
        yield from (task() for task in tasks)
        return
    _compile()
    pool = ThreadPoolExecutor(workers, "nearfar-decoder")
    ahead: deque[Future[DecodedBatch]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(task))
            if len(ahead) > workers + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _compile() -> None:
    """Compile before threads start: two first calls at once can damage numba's table of types for the function."""
    from nearfar.ssl.data.transforms.compiled_eval_view import make_eval_scratch, make_eval_view

    scratch = make_eval_scratch(8, 8, 8)
    make_eval_view(scratch, 8, 8, Window(8, 8, 0, 0, 8, 8), np.empty((3, 8, 8), np.uint8))


def _collate(items: list[DecodedBatch]) -> DecodedBatch:
    images = [item.images for item in items if item.images is not None]
    return DecodedBatch(
        torch.stack(images) if images else None,
        [i for item in items for i in item.index],
        [mask for item in items for mask in item.masks],
        [bad for item in items for bad in item.bad],
        [note for item in items for note in item.rescaled],
    )


def quiet_worker(_: int) -> None:
    # the main process handles signals, and stops its workers when it leaves
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
