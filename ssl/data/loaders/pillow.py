"""The loader for every source: Pillow, in worker processes; each image is decoded once for all its views."""

import atexit
import signal
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from nearfar.ssl.data.loaders.base import Batch, Loader, Task
from nearfar.ssl.data.transforms.crops import render
from nearfar.ssl.data.views import plan_views


class PillowLoader(Loader):
    """`Loader` over any source; `workers` are processes.

    A worker that dies is a RuntimeError. Leaving the loop, however, ends the workers; they ignore the signals that tell
    a run to save and stop, so that batches keep coming until it has. Workers are forked on Linux (the source is shared,
    not copied), and start in the platform's own way elsewhere.
    """

    title = "pillow loader"

    def assemble(self, task: Task) -> Batch:
        images: list[Image.Image] = []
        decoded = 0

        def use(_: int, i: int) -> None:
            nonlocal decoded
            image = self.source.read(i)
            decoded += 1
            self.check_size(i, image.height, image.width)
            images.append(image)

        taken = self.take(task.index, use)
        size = np.array([(image.height, image.width) for image in images]).reshape(-1, 2)
        plan = plan_views(self.views, self.options.seed, task.epoch, taken.index[: len(images)], size)
        groups = []
        if taken.complete:
            groups = [render(images, plan.views(slice(self.views.global_crops)), self.views.global_crops_size)]
            if self.views.local_crops_number:
                groups.append(
                    render(images, plan.views(slice(self.views.global_crops, None)), self.views.local_crops_size)
                )
        return self.batch(task, taken, groups, plan, decoded)

    def batches(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        if self.options.workers == 0:
            yield from super().batches(tasks)
            return
        stream = iter(
            DataLoader(
                _Batches(self),
                batch_size=None,
                sampler=_Once(tasks),
                collate_fn=_unchanged,
                num_workers=self.options.workers,
                worker_init_fn=_start_worker,
                pin_memory=torch.cuda.is_available(),
                multiprocessing_context="fork" if sys.platform.startswith("linux") else None,
            )
        )
        stop = partial(_stop, stream)
        atexit.register(stop)  # before multiprocessing's own, which sends the SIGTERM that workers ignore, and waits
        try:
            yield from _watched(stream)
        finally:
            stop()
            atexit.unregister(stop)


class _Batches(Dataset[Batch]):
    """What DataLoader hands to its workers: any of them may do any task."""

    def __init__(self, loader: PillowLoader) -> None:
        self._loader = loader

    def __getitem__(self, task: Task) -> Batch:
        return self._loader.assemble(task)


class _Once:
    """Tasks as the sampler that DataLoader wants: something to iterate, which it does once."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return self._tasks


def _unchanged(batch: Any) -> Any:
    return batch


def _watched(stream: Any) -> Iterator[Batch]:
    """The batches of a DataLoader's iterator; errors from a dead worker's half-sent batch name its death."""
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
    """Ask a DataLoader's workers to leave when they are done with a batch; kill those that are not within seconds."""
    stream._shutdown_workers()
    for process in stream._workers:
        process.kill()
        process.join()


def _start_worker(_: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
