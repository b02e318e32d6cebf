"""The log of a run: metrics.jsonl, TensorBoard, run.log, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


class NoLog:
    """The log of the ranks after the first."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None: ...

    def record(self, step: int, values: dict[str, Any]) -> None: ...

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

    Raises:
        UserError: the files cannot be written.
    """

    def __init__(self, folder: Path, steps: int, start: int, console: Console, every: float = 10.0) -> None:
        # Here, so that whoever takes steps without a log (a benchmark, a later rank) needs neither package.
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._metrics: IO[str] = (folder / "metrics.jsonl").open("a")
            self._log: IO[str] = (folder / "run.log").open("a")
            # A finished run that is only called again has nothing to show, and each writer makes a file.
            self._board = None if start >= steps else SummaryWriter(str(folder), purge_step=start + 1)
        except OSError as error:
            raise UserError(f"The log of the run cannot be written to {folder}: {error}.") from None
        self._board_of_late_score = partial(SummaryWriter, str(folder))
        self._console = console
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
        if self._board:
            self._board.close()
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
        self._board = self._board or self._board_of_late_score()  # of a score that a finished run still lacked
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def progress(self, step: int, numbers: str) -> None:
        """Move the bar to `step`; every few seconds write a line, and print it where there is no bar."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if now - self._last_line < self._every and step != self._steps:
            return
        self._last_line = now
        left = (now - self._begun) / max(1, step - self._start) * (self._steps - step)
        if not self._warm:  # from here on: the first steps also start workers and compile
            self._begun, self._start, self._warm = now, step, True
        line = f"step {step}/{self._steps}  {numbers}  {_time_left(left)}"
        if self._console.is_terminal:
            self._write(line)
        else:
            self.say(line)

    def settings(self, values: dict[str, Any]) -> None:
        """The settings of the run for TensorBoard's table of runs, beside their loss and k-NN score."""
        if self._board is None:
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {}
        for section, part in values.items():
            for key, value in part.items() if isinstance(part, dict) else ():
                plain = isinstance(value, bool | int | float | str)
                shown[f"{section}.{key}"] = value if plain else str(value)
        writer = self._board._get_file_writer()
        for summary in hparams(shown, {"loss": None, "knn_top1": None}):
            writer.add_summary(summary)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture (H, W, 3), uint8, for TensorBoard."""
        if self._board:
            self._board.add_image(name, pixels, step, dataformats="HWC")

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
