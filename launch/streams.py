"""Standard output and error that outlive their reader: `nearfar pretrain ... | head` trains on, and loses nothing."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class PipeSafe:
    """A text stream that falls silent when its pipe is closed, instead of ending whatever prints to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.silenced = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        """Whatever is still buffered, here and in child processes, is discarded without an error."""
        self.silenced = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def reader_left(stream: TextIO) -> bool:
    """Is `stream` a pipe that nobody reads any more?"""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file
        return False
    if getattr(stream, "silenced", False):
        return True
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def outliving_their_reader() -> Iterator[None]:
    """Within it, closed pipes and characters that the terminal's encoding lacks do not raise."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # a file name need not be valid in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    out, err = (cast(TextIO, PipeSafe(stream)) if stream is not None else None for stream in before)
    sys.stdout, sys.stderr = out, err  # None, where a shell closed it
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream is not None:
                stream.flush()
