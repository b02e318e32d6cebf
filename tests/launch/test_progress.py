"""How far a job is, where there is no terminal for a bar."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from nearfar.launch.progress import progress, summed


def test_a_line_every_tenth_whatever_the_steps() -> None:
    output = StringIO()
    with progress(1000, "Reading", Console(file=output, width=80)) as tell:
        add = summed(tell)
        for _ in range(15):
            add(64)
        add(40)
    lines = output.getvalue().splitlines()
    assert lines[0] == "Reading: 128 of 1,000" and lines[-1] == "Reading: 1,000 of 1,000"
    assert len(lines) == 10


def test_few_images_and_none() -> None:
    output = StringIO()
    for total in (0, 3):
        with progress(total, "Reading", Console(file=output, width=80)) as tell:
            for done in range(total + 1):
                tell(done)
    assert output.getvalue().splitlines() == ["Reading: 1 of 3", "Reading: 2 of 3", "Reading: 3 of 3"]
