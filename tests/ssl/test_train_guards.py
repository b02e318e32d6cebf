"""What goes wrong in the loop: it stops before the weights are touched, says why, and what is saved continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from nearfar.ssl import checkpoint, train
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.learning import dino
from nearfar.ssl.parallel import gpus
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training import base

Make = Callable[..., Run]
SameBits = Callable[..., None]
SameRuns = Callable[[Path, Path, int], None]


class Torn(ArraySource):
    """Noise of which some images cannot be read; these may be chosen later."""

    torn: set[int]

    def __init__(self, *torn: int) -> None:
        super().__init__(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
        self.torn = set(torn)

    def read(self, i: int) -> Any:
        if i in self.torn:
            raise BadImage(self.name(i), "torn")
        return super().read(i)


def saved_by(run: Run) -> checkpoint.Checkpoint:
    """The last checkpoint of a run, which must have one."""
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None
    return saved


def test_the_weights_must_fit_beside_what_is_on_the_gpu(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times the student's 4 bytes a parameter, the teacher's among them."""
    requested: list[int] = []

    def full(device: torch.device, needed: int, what: str) -> None:
        requested.append(needed)
        raise UserError(f"The GPU is full: {what}.")

    monkeypatch.setattr(gpus, "require_room", full)
    run = tiny()
    with pytest.raises(UserError, match="the weights and the optimizer's state"):
        train.pretrain(run, images, console=quiet)
    made = dino.build_dino_learner(resolve(run, len(images))[0])
    one = sum(parameter.numel() for parameter in made.student.parameters())
    assert requested == [4 * 5 * one] and not list(run.path.glob("checkpoints/*"))


def poisoned(seen: list[Batch]) -> Callable[..., list[Tensor]]:
    """`color_views` with one NaN in the eighth batch, in a local view of its third image; lists the batches."""
    color_views = base.color_views

    def color(batch: Batch, *rest: Any) -> list[Tensor]:
        groups = color_views(batch, *rest)
        seen.append(batch)
        if len(seen) == 8:
            groups[1][0, 2, 0, 3, 3] = float("nan")
        return groups

    return color


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch, same_runs: SameRuns
) -> None:
    clean, run = tiny(folder="clean"), tiny("train.save_every_steps=3")
    train.pretrain(clean, images, console=quiet)
    seen: list[Batch] = []
    with monkeypatch.context() as patch:
        patch.setattr(base, "color_views", poisoned(seen))
        with pytest.raises(UserError) as caught:
            train.pretrain(run, images, console=quiet)
    message = str(caught.value)
    assert "At step 7 the loss is nan" in message and "optim.lr" in message
    assert all(images.name(int(index)) in message for index in seen[-1].index[:4])
    saved = saved_by(run)
    assert saved.state["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())
    assert train.pretrain(run, images, console=quiet).finished  # the cause is gone
    same_runs(clean.path, run.path, 20)


@pytest.fixture
def a_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ask about a step after they have started the next one, as they do on a GPU."""
    set_up = train.set_up

    def behind(*parts: Any) -> train.Training:
        made = set_up(*parts)
        assert made.steps_behind == 0  # of a CPU
        made.steps_behind = 1
        return made

    monkeypatch.setattr(train, "set_up", behind)


@pytest.mark.usefixtures("a_step_behind")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_step_that_is_asked_about_late_is_still_the_one_that_is_named(
    tiny: Make,
    images: ArraySource,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    batch_norm: bool,
    same_bits: SameBits,
) -> None:
    """With a checkpoint due after every step: none holds what followed the bad one."""
    settings = ["train.log_every_steps=100", "train.save_every_steps=1", f"head.batch_norm={batch_norm}"]
    clean, run = tiny(*settings, folder="clean"), tiny(*settings, "train.keep_last=99")
    train.pretrain(clean, images, console=quiet)
    seen: list[Batch] = []
    with monkeypatch.context() as patch:
        patch.setattr(base, "color_views", poisoned(seen))
        with pytest.raises(UserError, match="At step 7 the loss is nan") as caught:
            train.pretrain(run, images, console=quiet)
    assert len(seen) == 9 and all(images.name(int(index)) in str(caught.value) for index in seen[7].index[:4])
    assert saved_by(run).state["step"] == 7
    assert train.pretrain(run, images, console=quiet).finished
    same_bits(saved_by(clean).tensors, saved_by(run).tensors)


@pytest.mark.usefixtures("a_step_behind")
def test_a_stop_that_is_heard_late_saves_all_that_was_done(
    tiny: Make, images: ArraySource, quiet: Console, same_bits: SameBits
) -> None:
    run, whole = tiny("train.log_every_steps=100"), tiny("train.log_every_steps=100", folder="whole")
    outcome = train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    assert saved_by(run).state["step"] == outcome.step == 2
    train.pretrain(run, images, console=quiet)
    train.pretrain(whole, images, console=quiet)
    same_bits(saved_by(run).tensors, saved_by(whole).tensors)


def test_a_run_that_blows_up_says_so_and_saves_no_weights_that_are_not_finite(
    tiny: Make, images: ArraySource, quiet: Console
) -> None:
    run = tiny("optim.lr=1e38", "optim.warmup_epochs=0", "optim.weight_decay=10", "train.save_every_steps=1")
    with pytest.raises(
        UserError, match=r"(At|After) step \d+ .*not finite.*(There is no checkpoint|is step-0)"
    ) as caught:
        train.pretrain(run, images, console=quiet)
    saved = checkpoint.latest(run.path / "checkpoints")
    assert ("There is no checkpoint" in str(caught.value)) == (saved is None)
    assert saved is None or all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())


def test_a_first_step_that_is_not_finite_claims_no_checkpoint(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    color_views = base.color_views
    monkeypatch.setattr(base, "color_views", lambda *a: [group * float("nan") for group in color_views(*a)])
    with pytest.raises(UserError, match=r"There is no checkpoint in .* yet: the same command starts afresh"):
        train.pretrain(tiny(), images, console=quiet)


def test_memory_that_does_not_suffice_is_a_sentence(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "color_views", lambda *_: torch.empty(2**60))
    with pytest.raises(UserError, match=r"not enough memory.*train\.batch_size"):
        train.pretrain(tiny(), images, console=quiet)


def test_other_runtime_errors_stay_what_they_are(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(base, "color_views", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train.pretrain(tiny(), images, console=quiet)


def test_a_failed_start_may_be_corrected(tiny: Make, images: ArraySource, quiet: Console) -> None:
    with pytest.raises(UserError, match="40 images cannot fill one batch of 64"):
        train.pretrain(tiny("train.batch_size=64"), images, console=quiet)
    with pytest.raises(UserError, match="no backbone called"):
        train.pretrain(tiny("backbone.name=vit_tinny_patch8"), images, console=quiet)
    assert not tiny().path.exists()  # not even with a lock in it
    assert train.pretrain(tiny(), images, console=quiet).finished


def test_bad_images_are_named_once_and_the_run_goes_on(tiny: Make, quiet: Console) -> None:
    source = Torn(17)
    run = tiny("data.max_bad_fraction=0.1", "train.log_every_steps=1000")  # said at their step, not with the metrics
    assert train.pretrain(run, source, console=quiet).finished
    lines = (run.path / "run.log").read_text().splitlines()
    (named,) = [number for number, line in enumerate(lines) if "Bad image image 17: torn." in line]
    (ended,) = [number for number, line in enumerate(lines) if " step 20/20" in line]
    assert named < ended


def test_too_many_bad_images_end_it_with_the_checkpoint_kept(tiny: Make, quiet: Console) -> None:
    source = Torn()
    run = tiny()
    train.pretrain(run, source, should_stop=lambda: True, console=quiet)
    source.torn = set(range(1, 40, 2))
    with pytest.raises(UserError, match=r"cannot be used, more than data.max_bad_fraction"):
        train.pretrain(run, source, console=quiet)
    assert saved_by(run).state["step"] == 1
