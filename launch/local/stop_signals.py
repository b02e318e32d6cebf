"""Signals -> a flag that the training loop reads between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class ScoringStoppedError(Exception):
    """A stop was asked for while features were read; there is no score."""


class StopFlag:
    """Context manager: SIGTERM, Ctrl-C and SIGUSR2 ask for a stop at the next step; a second Ctrl-C stops at once.

    Forked children inherit handlers; only the process that installed them answers. A flag inside another one's context
    knows what that one heard, and passes on what it hears itself.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the last one
        self.signals: set[signal.Signals] = set()
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        if outer := self._outer(SIGNALS[0]):
            self.received, self.signals = outer.received, set(outer.signals)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self.signals.add(self.received)
        if outer := self._outer(number):
            outer._handle(number, frame)

    def _outer(self, number: int) -> StopFlag | None:
        flag = getattr(self._previous.get(number), "__self__", None)
        return flag if isinstance(flag, StopFlag) else None
