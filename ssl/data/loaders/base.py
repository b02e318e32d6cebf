"""Images -> batches of geometric views: each image is decoded once for all its views; color follows in augment.py."""

import atexit
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nearfar.ssl.config import Views
from nearfar.ssl.data.decode import size_problem
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.views import ViewPlan, epoch_order, plan_views
from nearfar.ssl.errors import BadImage, UserError

_BICUBIC = Image.Resampling.BICUBIC


@dataclass
class Batch:
    """The geometric views of B samples; color is still to be done, by `augment.color` with `plan`."""

    groups: list[Tensor]  # uint8 (2, B, 3, s, s) global views, and (V - 2, B, 3, s, s) local ones if there are any
    plan: ViewPlan
    index: NDArray[np.int64]  # (B,) the samples, after unreadable ones were replaced
    label: NDArray[np.int64] | None  # (B,)
    epoch: int
    step: int  # within the epoch
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason of each unreadable image met
    decoded: int = 0
    colored: bool = False  # whether the loader did the color as well; then `augment.color` must not

    @property
    def views(self) -> list[Tensor]:
        """All V views, uint8 (B, 3, s, s) each."""
        return [view for group in self.groups for view in group]

    def pin_memory(self) -> "Batch":
        """What DataLoader asks for where there is a GPU: views in memory that can be copied to it in the background."""
        return replace(self, groups=[group.pin_memory() for group in self.groups])


@dataclass(frozen=True)
class Task:
    """What a batch shall be made of."""

    epoch: int
    step: int
    index: NDArray[np.int64]


class _Batches(Dataset[Batch]):
    """Executes tasks; lives in the worker processes. Without state, so that any worker may do any task."""

    def __init__(self, source: Source, views: Views, seed: int, min_side: int, patience: int) -> None:
        self.source, self.views, self.seed, self.min_side, self.patience = (
            source,
            views,
            seed,
            min_side,
            patience,
        )

    def __getitem__(self, task: Task) -> Batch:
        index, decoded = task.index.copy(), 0
        images: list[Image.Image] = []
        bad: dict[str, str] = {}

        def use(i: int) -> None:
            nonlocal decoded
            image = self.source.read(i)
            decoded += 1
            check_size(self.source, i, image.height, image.width, self.min_side)
            images.append(image)

        for k, wanted in enumerate(task.index):
            found = first_good(int(wanted), len(self.source), use, bad, self.patience)
            if found is None:  # nothing readable: the loader will not go on from here
                break
            index[k] = found
        groups, label = [], None
        size = np.array([(image.height, image.width) for image in images]).reshape(-1, 2)
        plan = plan_views(self.views, self.seed, task.epoch, index[: len(images)], size)
        if len(images) == len(index):
            groups = [render(images, plan.views(slice(2)), self.views.global_crops_size)]
            if self.views.local_crops_number:
                groups.append(render(images, plan.views(slice(2, None)), self.views.local_crops_size))
            label = None if self.source.labels is None else self.source.labels[index]
        return Batch(groups, plan, index, label, task.epoch, task.step, list(bad.items()), decoded)


def first_good(wanted: int, n: int, use: Callable[[int], None], bad: dict[str, str], patience: int) -> int | None:
    """The first of the samples wanted, wanted + 1, ... (cyclic, of n) that `use` takes without a BadImage.

    The others are put down in `bad`; None when all are bad, or that many are that the run will end.
    """
    for ahead in range(n):
        i = (wanted + ahead) % n
        try:
            use(i)
            return i
        except BadImage as error:
            bad[error.name] = error.why
        if len(bad) >= patience:
            return None
    return None


def check_size(source: Source, i: int, height: int, width: int, min_side: int) -> None:
    """Raises BadImage for an image of a size that cannot be used."""
    if why := size_problem(height, width, min_side):
        raise BadImage(source.name(i), why)


def render(images: list[Image.Image], plan: ViewPlan, size: int) -> Tensor:
    """Crop, resize (Pillow's antialiased bicubic), flip: n images, a plan of V views -> uint8 (V, n, 3, size, size)."""
    n, count = plan.flip.shape
    out = np.empty((count, n, 3, size, size), np.uint8)
    for k, image in enumerate(images):
        for v, (top, left, height, width) in enumerate(plan.box[k].tolist()):
            # Cropped first: resize(box=...) would let the filter see pixels outside the crop.
            view = image.crop((left, top, left + width, top + height)).resize((size, size), _BICUBIC)
            pixels = np.asarray(view)
            out[v, k] = (pixels[:, ::-1] if plan.flip[k, v] else pixels).transpose(2, 0, 1)
    return torch.from_numpy(out)


class Loader:
    """All batches of a run, from the seek position on, as one stream: workers stay alive between epochs.

    Global batch g of an epoch is samples [g*B*world_size, (g+1)*B*world_size) of `epoch_order`, of which rank r
    takes its r-th slice of B; an incomplete last batch is dropped. The result does not depend on `workers`.

    A bad image (unreadable, or with a side below `min_side`) is replaced by the next good one, in the cyclic order of
    the source, with the views of that one; its name is in `Batch.bad` and in `bad`. A UserError ends the run when more
    than `max_bad_fraction` of the images seen so far are bad, and they are at least 20, or a quarter of a smaller
    source.

    A worker that dies is a RuntimeError. Leaving the loop, however, ends the workers; they ignore the signals that ask
    a run to save and stop, so that batches keep coming until it has. Workers are forked on Linux (the source is shared,
    not copied), and start in the platform's own way elsewhere.
    """

    word = "folder loader"  # what the run's first lines call it

    def __init__(
        self,
        source: Source,
        views: Views,
        *,
        batch_size: int,
        epochs: int,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.01,
        min_side: int = 8,
    ) -> None:
        self.source, self.batch_size, self.epochs, self.seed, self.workers = (
            source,
            batch_size,
            epochs,
            seed,
            workers,
        )
        self.rank, self.world_size, self.max_bad_fraction = rank, world_size, max_bad_fraction
        self.steps_per_epoch = len(source) // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{len(source)} images do not fill one batch of {batch_size * world_size} ({batch_size} on each of "
                f"{world_size} processes). Choose a smaller batch size, or give more images."
            )
        self.decoded = 0
        self.bad: dict[str, str] = {}
        self._seen = np.zeros(len(source), bool)
        self._start = (0, 0)
        self._patience = min(20, math.ceil(len(source) / 4))
        self._batches = _Batches(
            source, views, seed, min_side, max(self._patience, int(max_bad_fraction * len(source)) + 1)
        )

    def seek(self, epoch: int, step: int) -> None:
        """Let the next iteration begin with this step of this epoch."""
        if not (0 <= epoch <= self.epochs and 0 <= step < self.steps_per_epoch):
            raise ValueError(f"no step {step} of epoch {epoch} in {self.epochs} epochs of {self.steps_per_epoch} steps")
        self._start = (epoch, step)

    def _tasks(self) -> Iterator[Task]:
        first, step = self._start
        for epoch in range(first, self.epochs):
            order = epoch_order(self.seed, epoch, len(self.source))
            for s in range(step if epoch == first else 0, self.steps_per_epoch):
                begin = (s * self.world_size + self.rank) * self.batch_size
                yield Task(epoch, s, order[begin : begin + self.batch_size])

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            for task in self._tasks():
                yield self._checked(self._batches[task])
            return
        stream = iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=_Sampler(self),
                collate_fn=_same,
                num_workers=self.workers,
                worker_init_fn=_start_worker,
                pin_memory=torch.cuda.is_available(),
                multiprocessing_context="fork" if sys.platform.startswith("linux") else None,
            )
        )
        stop = partial(_stop, stream)
        atexit.register(stop)  # before multiprocessing's own, which sends the SIGTERM that workers ignore, and waits
        try:
            for batch in _watched(stream):
                yield self._checked(batch)
        finally:
            stop()
            atexit.unregister(stop)

    def _checked(self, batch: Batch) -> Batch:
        self.decoded += batch.decoded
        self.bad.update(batch.bad)
        self._seen[batch.index] = True
        seen = int(self._seen.sum()) + len(self.bad)
        if not batch.groups or (len(self.bad) >= self._patience and len(self.bad) > self.max_bad_fraction * seen):
            some = "; ".join(f"{name}: {why}" for name, why in list(self.bad.items())[:5])
            raise UserError(
                f"{len(self.bad)} of the {seen} images read so far cannot be used, more than "
                f"data.max_bad_fraction = {self.max_bad_fraction} allows. "
                f"{'Some of them' if len(self.bad) > 5 else 'They are'}: {some}. "
                "Allow a larger share, or mend or remove them (a run that has saved a checkpoint keeps its images: "
                "then choose another name=)."
            )
        return batch


class _Sampler:
    """What DataLoader hands to its workers; an object, because it is iterated anew in each iteration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Task]:
        return self._loader._tasks()


def _same(batch: Any) -> Any:
    return batch


def _watched(stream: Any) -> Iterator[Batch]:
    """The batches of a DataLoader's iterator; whatever a dead worker's half-sent batch raises is told as its death."""
    while True:
        try:
            batch = next(stream)
        except StopIteration:
            return
        except Exception as error:
            ending = connection.wait([process.sentinel for process in stream._workers], timeout=1)
            for process in stream._workers:
                process.join(1 if process.sentinel in ending else 0)
                if process.exitcode:
                    raise RuntimeError(
                        f"A data worker died with exit code {process.exitcode} (-9: often too little memory, "
                        "-7: too little shared memory, /dev/shm)."
                    ) from error
            raise
        yield batch


def _stop(stream: Any) -> None:
    """Ask a DataLoader's workers to leave when they are done with a batch; kill the one that is not within seconds."""
    stream._shutdown_workers()
    for process in stream._workers:
        process.kill()
        process.join()


def _start_worker(_: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def eval_view(image: Image.Image, size: int, resize: int | None = None) -> Tensor:
    """The view for evaluation: shorter side to `resize` (antialiased bicubic), central crop -> uint8 (3, size, size).

    `resize` defaults to round(size * 8 / 7), as 256 for 224, except that an image of size x size is taken as it is.
    Agrees with torchvision's Resize and CenterCrop.
    """
    if resize is None:
        resize = size if image.size == (size, size) else round(size * 8 / 7)
    if resize < size:
        raise ValueError(f"resize = {resize} is below the crop's size = {size}")
    width, height = image.size
    short = min(width, height)
    width, height = int(resize * width / short), int(resize * height / short)
    top, left = round((height - size) / 2), round((width - size) / 2)
    view = image.resize((width, height), _BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())
