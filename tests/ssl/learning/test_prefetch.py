"""The order in which a batch is made and handed over, and a run that stays the same; the stream only takes notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nearfar.ssl import train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.prefetch import Prefetch, side_stream
from nearfar.ssl.settings.run import Run


class Notes:
    """A side stream that computes at once, and notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def mark(self) -> int:
        assert self.inside
        self.calls.append("mark")
        return len(self.calls)

    def hand_over(self, mark: int, tensors: list[Tensor]) -> None:
        assert not self.inside
        assert self.calls[mark - 1] == "mark"
        self.calls.append(("hand over", [float(tensor) for tensor in tensors]))


def prefetch(batches: Iterator[Any], side: Notes | None, calls: list[object]) -> Prefetch:
    def fetch() -> Any:
        assert side is None or side.inside  # the device loader makes its batches on the current stream
        calls.append("fetch")
        return next(batches)

    def views(batch: int) -> list[Tensor]:
        assert side is None or side.inside
        calls.append("views")
        return [torch.tensor(10.0 * batch)]

    return Prefetch(fetch, views, side)


def test_a_batch_is_begun_after_a_step_and_handed_over_before_the_next() -> None:
    side = Notes()
    ahead = prefetch(iter((1, 2)), side, side.calls)
    made = ["fetch", "views", "mark"]
    batch, (view,) = ahead.take()
    assert (batch, float(view)) == (1, 10)
    assert side.calls == [*made, ("hand over", [10.0])]
    side.calls.clear()
    ahead.begin()
    ahead.begin()  # at most one ahead
    assert side.calls == made
    batch, (view,) = ahead.take()
    assert (batch, float(view)) == (2, 20)
    assert side.calls == [*made, ("hand over", [20.0])]
    ahead.begin()
    with pytest.raises(StopIteration):
        ahead.take()


def test_an_error_waits_until_its_batch_is_asked_for() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise UserError("too many bad images")

    side = Notes()
    ahead = prefetch(broken(), side, side.calls)
    assert ahead.take()[0] == 1
    ahead.begin()
    with pytest.raises(UserError, match="too many bad images"):
        ahead.take()


def test_without_a_side_stream_nothing_is_done_ahead() -> None:
    assert side_stream(torch.device("cpu")) is None
    calls: list[object] = []
    ahead = prefetch(iter((1, 2)), None, calls)
    ahead.begin()
    assert calls == []
    assert ahead.take()[0] == 1
    ahead.begin()
    assert calls == ["fetch", "views"]


def test_a_run_with_prefetch_has_the_same_bits_and_shows_its_first_views_once(
    tiny: Callable[..., Run], images: ArraySource, quiet: Console, same_runs: Callable[[Path, Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shown: list[list[Tensor]] = []

    def show(batch: Any, colored: list[Tensor], folder: Path) -> None:
        assert all(len(group) == len(views) for group, views in zip(batch.groups, colored, strict=True))
        shown.append([group.clone() for group in colored])

    folders: list[Path] = []
    for side in (None, Notes()):
        monkeypatch.setattr(train, "side_stream", lambda device, side=side: side)
        if side is not None:
            monkeypatch.setattr(side, "hand_over", lambda mark, tensors, side=side: side.calls.append("hand over"))
        run = tiny("train.epochs=2", folder=f"runs{len(folders)}")
        train.pretrain(run, images, train.Observers(views=show), console=quiet)
        folders.append(run.path)
        if side is not None:
            assert side.calls == ["mark", "hand over"] * 10
    same_runs(folders[0], folders[1], 10)
    assert len(shown) == 2
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))
