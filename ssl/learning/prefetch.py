"""The next batch and its views, made on a side stream while the GPU computes the step before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nearfar.ssl.data.loaders.base import Batch


class Side(Protocol):
    """What `Prefetch` needs of a stream beside the one that computes."""

    def entered(self) -> AbstractContextManager[Any]:
        """Within it, work is queued on the side stream."""

    def mark(self) -> Any:
        """The end of the work queued there so far."""

    def hand_over(self, mark: Any, tensors: list[Tensor]) -> None:
        """The stream that computes waits, on the device, for `mark`, and may then use the tensors made before it."""


class SideStream:
    """A CUDA stream as `Side`. The host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        # Once, for what was made before (a loader's images); never again, or each batch would wait for the step.
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def entered(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def hand_over(self, mark: torch.cuda.Event, tensors: list[Tensor]) -> None:
        computing = torch.cuda.current_stream(self.stream.device)
        computing.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(computing)  # so that its memory is not used again before that stream is done with it


class _Prefetched(NamedTuple):
    batch: Batch
    views: list[Tensor]
    mark: Any


class Prefetch:
    """Batches with their views, at most one ahead.

    `begin`, called after a step was queued, takes the next batch and queues the copies and colors of its views on the
    side stream; `take` hands it over. Without a side stream (on a CPU) `begin` does nothing and `take` makes the views
    then and there. The views are the same either way, and so is the run: nothing here draws random numbers.
    """

    def __init__(
        self, fetch: Callable[[], Batch], views: Callable[[Batch], list[Tensor]], side: Side | None = None
    ) -> None:
        """
        Args:
            fetch: the next batch; raises StopIteration after the last one.
            views: a batch -> what the step takes, on the device.
        """
        self._fetch, self._views, self._side = fetch, views, side
        self._begun: _Prefetched | Exception | None = None

    def begin(self) -> None:
        """Start on the next batch. What goes wrong is raised by `take`, after the step before was read and saved."""
        if self._side is None or self._begun is not None:
            return
        try:
            with self._side.entered():  # a loader may make its batches on the device too
                batch = self._fetch()
                self._begun = _Prefetched(batch, self._views(batch), self._side.mark())
        except Exception as error:
            self._begun = error

    def take(self) -> tuple[Batch, list[Tensor]]:
        """The next batch and its views, for the current stream."""
        if self._side is None:
            batch = self._fetch()
            return batch, self._views(batch)
        self.begin()
        begun, self._begun = self._begun, None
        if isinstance(begun, Exception):
            raise begun
        assert begun is not None
        self._side.hand_over(begun.mark, begun.views)
        return begun.batch, begun.views


def side_stream(device: torch.device) -> SideStream | None:
    """A side stream on a GPU; None on a CPU, where there is none."""
    return SideStream(device) if device.type == "cuda" else None
