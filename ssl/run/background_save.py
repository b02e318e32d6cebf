"""Checkpoints off the critical path: the training copies its state and goes on, and a thread writes the copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor

from nearfar.ssl.errors import UserError
from nearfar.ssl.run.announce import no_room_for_copy

Named = Iterable[tuple[str, Tensor]]
Write = Callable[[int, dict[str, Tensor]], None]  # a step and its tensors, to the disk


class Snapshot:
    """A copy of named tensors in the host's memory: one more copy of all that a checkpoint holds.

    The memory is kept from one copy to the next, since new pages cost more than the copying. For tensors on a GPU it is
    pinned, and they are copied without waiting for the GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Named) -> dict[str, Tensor]:
        """Start copying; what is done to the tensors afterwards does not change the copy. `wait` before reading it.

        Raises:
            UserError: there is not enough memory for the copy.
        """
        copies: dict[str, Tensor] = {}
        self._copied = None
        for name, tensor in tensors:
            copies[name] = self._buffer(name, tensor)
            copies[name].copy_(tensor.detach(), non_blocking=True)
            if tensor.device.type == "cuda" and self._copied is None:
                self._copied = torch.cuda.Event()
        self._buffers = copies  # what is not saved any more is not kept
        if self._copied is not None:
            self._copied.record()  # in the stream of the copies: training, which comes after them, cannot overtake
        return copies

    def wait(self) -> None:
        """Until all is copied."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == like.shape and kept.dtype == like.dtype:
            return kept
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        except (MemoryError, RuntimeError) as error:  # of torch, whose messages tell the one from the other
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            raise UserError(no_room_for_copy(name, like.numel() * like.element_size(), error)) from error


class Saver:
    """Context manager that writes checkpoints, one at a time; leaving it waits for the last one to be written.

    An error of the writing is raised by the next `check`, `save` or `wait`, or on leaving; only where another error
    ends the context already, it is told instead.
    """

    def __init__(self, write: Write, say: Callable[[str], None], background: bool = True) -> None:
        """
        Args:
            write: writes a checkpoint, whole or not at all; in the background it runs in a thread of its own.
            say: where to tell an error that cannot be raised.
            background: False writes at once, without a copy.
        """
        self._write, self._say, self._background = write, say, background
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.seconds = 0.0  # for which `save` and `wait` have kept the training waiting
        self.count = 0  # of checkpoints

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, tensors: Named) -> None:
        """Save these tensors as those of `step`; waits until the checkpoint before is written."""
        self.wait()
        begun = time.monotonic()
        try:
            self.count += 1
            if not self._background:
                self._write(step, dict(tensors))
                return
            copies = self._snapshot.take(tensors)
            # A daemon, so that a second Ctrl-C ends the process at once; what it leaves half-written is never read.
            self._thread = threading.Thread(target=self._run, args=(step, copies), name="checkpoint", daemon=True)
            self._thread.start()
        finally:
            self.seconds += time.monotonic() - begun

    def check(self) -> None:
        """Raise the error with which the last writing ended, if it did; does not wait."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until nothing is being written; then as `check`."""
        if self._thread is not None:
            begun = time.monotonic()
            self._thread.join()
            self._thread = None
            self.seconds += time.monotonic() - begun
        self.check()

    def _run(self, step: int, copies: dict[str, Tensor]) -> None:
        try:
            self._snapshot.wait()
            self._write(step, copies)
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            self._say(str(failure))
