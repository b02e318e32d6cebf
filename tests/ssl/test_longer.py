"""train.epochs raised on a run: the bits of one that was longer from its start, or why not and the command that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from nearfar.ssl import train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
# What would follow from the number of epochs.
FIXED = (
    "optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=0.5", "loss.warmup_teacher_temp_epochs=2",
    "optim.teacher_momentum=0.98",
)  # fmt: skip
WSD = (*FIXED, "optim.schedule=wsd", "optim.cooldown_epochs=2")
CONSTANT = (*FIXED, "optim.schedule=constant")


@pytest.mark.parametrize("schedule", [CONSTANT, WSD], ids=["constant", "wsd"])
def test_raised_it_ends_with_the_bits_of_a_run_that_was_longer_from_its_start(
    tiny: Make, images: ArraySource, quiet: Console, same_runs: Callable[[Path, Path, int], None], schedule: list[str]
) -> None:
    """A constant schedule after its end, wsd before its cooldown."""
    whole = tiny(*schedule, "train.epochs=6", folder="whole")
    assert train.pretrain(whole, images, console=quiet).finished
    stop = iter(range(1, 99))
    short = tiny(*schedule, "train.epochs=4")
    ends_at = 20 if schedule is CONSTANT else 9
    train.pretrain(short, images, should_stop=lambda: next(stop) == ends_at, console=quiet)
    longer = tiny(*schedule, "train.epochs=6")
    assert train.pretrain(longer, images, console=quiet).finished
    same_runs(longer.path, whole.path, 30)


def test_in_the_cooldown_and_under_cosine_the_message_says_to_fork(
    tiny: Make, images: ArraySource, quiet: Console
) -> None:
    for settings, why in ((WSD, "falling since epoch 2"), (FIXED, "optim.schedule=cosine")):
        run = tiny(*settings, f"name={settings is WSD}")
        train.pretrain(run, images, console=quiet)
        before = (run.path / "config.yaml").read_text()
        with pytest.raises(UserError) as caught:
            train.pretrain(tiny(*settings, f"name={settings is WSD}", "train.epochs=6"), images, console=quiet)
        assert why in str(caught.value)
        assert f"nearfar pretrain --from {run.path} name={run.name}-fork folder={run.folder} train.epochs=6" in str(
            caught.value
        )
        assert (run.path / "config.yaml").read_text() == before


def test_more_epochs_and_something_else_or_fewer_epochs(tiny: Make, images: ArraySource, quiet: Console) -> None:
    train.pretrain(tiny(*CONSTANT), images, console=quiet)
    for changed in (["train.epochs=6", "optim.lr=1e-4"], ["train.epochs=3"]):
        with pytest.raises(UserError, match=r"other settings .*train\.epochs: 4"):
            train.pretrain(tiny(*CONSTANT, *changed), images, console=quiet)


def test_stopped_before_its_first_longer_checkpoint_it_can_be_either(
    tiny: Make, images: ArraySource, quiet: Console
) -> None:
    """config.yaml says 6 epochs by then, and the checkpoints 4."""
    run, longer = tiny(*CONSTANT), tiny(*CONSTANT, "train.epochs=6")
    train.pretrain(run, images, console=quiet)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("epochs: 4,", "epochs: 6,"))
    assert train.pretrain(run, images, console=quiet).step == 20
    assert train.pretrain(longer, images, console=quiet).step == 30
