"""What a run says while it works: metrics.jsonl, TensorBoard, run.log, and a progress bar or plain lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class Silence:
    """The journal of the ranks after the first."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None: ...

    def record(self, step: int, values: dict[str, Any]) -> None: ...

    def progress(self, step: int, numbers: str) -> None: ...


class Journal:
    """Opened for the length of one process; continues the files of the process before it.

    Args:
        folder: the run's folder.
        steps, start: length of the run and the step it continues from.
        console: where people look. A terminal gets a bar, anything else a line every `every` seconds.
    """

    def __init__(self, folder: Path, steps: int, start: int, console: Console, every: float = 10.0) -> None:
        self._metrics: IO[str] = (folder / "metrics.jsonl").open("a")
        self._log: IO[str] = (folder / "run.log").open("a")
        self._board = SummaryWriter(str(folder), purge_step=start + 1)
        self._console = console
        self._every = every
        self._spoken = float("-inf")
        self._steps = steps
        self._begun, self._start = time.monotonic(), start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("pretrain", total=steps, completed=start, numbers="")

    def __enter__(self) -> Journal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._board.close()
        self._metrics.close()
        self._log.close()

    def say(self, text: str) -> None:
        """A sentence for people: on the console and in run.log."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def record(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics after `step` finished steps."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def progress(self, step: int, numbers: str) -> None:
        """Move the bar to `step`, or print a line when one is due."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._spoken >= self._every or step == self._steps):
            self._spoken = now
            left = (now - self._begun) / max(1, step - self._start) * (self._steps - step)
            minutes, seconds = divmod(round(left), 60)
            self.say(f"step {step}/{self._steps}  {numbers}  {minutes}:{seconds:02d} left")
