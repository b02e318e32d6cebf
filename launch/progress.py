"""Progress of a long job over a known number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nearfar.ssl.wording import printable


@contextmanager
def progress(total: int, what: str, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line for every tenth; yields a function that takes the number done."""
    what = printable(what)
    if not console.is_terminal:
        last = 0

        def report(done: int) -> None:
            nonlocal last
            if 10 * done // max(1, total) > last:
                last = 10 * done // max(1, total)
                console.print(f"{what}: {done:,} of {total:,}", highlight=False, markup=False, soft_wrap=True)

        yield report
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def summed(report: Callable[[int], None]) -> Callable[[int], None]:
    """Adapt `report`, which takes the number of images done, to work that reports the images of each batch."""
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        report(done)

    return add
