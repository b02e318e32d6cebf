"""The log of a run: metrics.jsonl, a tracker (TensorBoard), run.log, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from nearfar.ssl.errors import UserError
from nearfar.ssl.run.tracking import Track, open_tracker

if TYPE_CHECKING:
    from rich.console import Console


class NoLog:
    """The log of the ranks after the first."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None: ...

    def record(self, step: int, values: dict[str, Any]) -> None: ...

    def warmed_up(self, step: int) -> None: ...

    def progress(self, step: int, numbers: str) -> None: ...

    def settings(self, values: dict[str, Any]) -> None: ...

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None: ...

    def sync(self) -> None: ...


class RunLog(NoLog):
    """Opened for the length of one process; continues the files of the process before it.

    Args:
        folder: the run's folder.
        steps, start: length of the run and the step it continues from.
        console: a terminal shows a progress bar, anything else the lines of run.log.
        every: seconds between two lines of progress.
        track: where numbers and pictures go besides the files.

    Raises:
        UserError: the files cannot be written, or the tracker is not installed.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        console: Console,
        every: float = 10.0,
        track: Track = "tensorboard",
    ) -> None:
        # Here, so that whoever takes steps without a log (a benchmark, a later rank) does not need the package.
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self._console = console

        try:
            self._metrics: IO[str] = (folder / "metrics.jsonl").open("a")
            self._log: IO[str] = (folder / "run.log").open("a")
            # A finished run that is only called again has nothing to show, and each tracker makes a file.
            self._late_tracker = partial(open_tracker, track, folder, start, self.say)
            self._tracker = None if start >= steps else self._late_tracker()
        except OSError as error:
            raise UserError(f"The log of the run cannot be written to {folder}: {error}.") from None
        self._every = every
        self._last_line = float("-inf")
        self._steps = steps
        self._begun, self._start, self._warm = time.monotonic(), start, False
        # What must not be cut off on a narrow terminal comes first; the numbers take what is left.
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("pretrain", total=steps, completed=start, numbers="")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._tracker:
            self._tracker.close()
        self._metrics.close()
        self._log.close()

    def say(self, text: str) -> None:
        """A line to read, on the console and in run.log."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._write(text)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics after `step` finished steps."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        self._tracker = self._tracker or self._late_tracker()  # of a score that a finished run still lacked
        self._tracker.record(step, values)

    def warmed_up(self, step: int) -> None:
        """From here on steps are like those to come: the ones before also started workers and compiled."""
        self._begun, self._start, self._warm = time.monotonic(), step, True

    def progress(self, step: int, numbers: str) -> None:
        """Move the bar to `step`; every few seconds write a line, and print it where there is no bar."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if now - self._last_line < self._every and step != self._steps:
            return
        self._last_line = now
        left = (now - self._begun) / max(1, step - self._start) * (self._steps - step)
        if not self._warm:
            self.warmed_up(step)
        line = f"step {step}/{self._steps}  {numbers}  {_time_left(left)}"
        if self._console.is_terminal:
            self._write(line)
        else:
            self.say(line)

    def settings(self, values: dict[str, Any]) -> None:
        """The settings of the run, for the tracker's table of runs."""
        if self._tracker:
            self._tracker.settings(values)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture (H, W, 3), uint8, for the tracker."""
        if self._tracker:
            self._tracker.picture(name, step, pixels)

    def sync(self) -> None:
        """fsync the metrics: no checkpoint may exist before the lines of its steps."""
        os.fsync(self._metrics.fileno())

    def _write(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()


def _time_left(seconds: float) -> str:
    """`m:ss left`; from ten minutes on with the hour, and from a day on the day, at which the run is to end."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"
    if seconds < 600:
        return left
    form = "%H:%M" if seconds < 86400 else "%Y-%m-%d %H:%M"
    return f"{left}, ends about {time.strftime(form, time.localtime(time.time() + seconds))}"
