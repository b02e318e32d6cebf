"""A fork begins with another run's weights: unchanged, it ends with that run's bits; what cannot be is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from nearfar.ssl import checkpoint, train
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import START
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
STEPS = 20
KEPT = "train.keep_every=5"


@pytest.fixture
def source(tiny: Make, images: ArraySource, quiet: Console) -> Run:
    """A finished run with the checkpoints of steps 5, 10, 15 and 20."""
    run = tiny(KEPT, "loss.centering=centering", folder="source")
    assert train.pretrain(run, images, console=quiet).finished
    return run


def begun(run: Run, source: ArraySource, quiet: Console) -> checkpoint.Checkpoint:
    """Its first step taken, and the checkpoint of it."""
    train.pretrain(run, source, should_stop=lambda: True, console=quiet)
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None
    return saved


def refused(run: Run, source: ArraySource, quiet: Console) -> str:
    with pytest.raises(UserError) as caught:
        train.pretrain(run, source, console=quiet)
    assert not run.path.exists()  # nothing was left behind
    return str(caught.value)


def test_unchanged_it_ends_with_the_bits_of_the_run_that_it_left(
    tiny: Make, source: Run, images: ArraySource, quiet: Console, same_bits: Callable[..., None]
) -> None:
    run = tiny(KEPT, "loss.centering=centering", "name=fork", f"train.start_from={source.path}@10")
    outcome = train.pretrain(run, images, console=quiet)
    assert outcome.finished and outcome.step == STEPS
    whole, fork = (checkpoint.read(each.path / "checkpoints" / "step-000000020") for each in (source, run))
    same_bits(whole.tensors, fork.tensors)


def test_it_records_where_it_came_from_and_hands_that_on(
    tiny: Make, source: Run, images: ArraySource, quiet: Console
) -> None:
    first = tiny("name=first", f"train.start_from={source.path}@10", "train.restart_schedule=true", KEPT)
    begun(first, images, quiet)
    saved = begun(tiny("name=second", f"train.start_from={first.path}"), images, quiet)
    lineage = saved.state["lineage"]
    assert [(each["from"], each["step"]) for each in lineage] == [(str(source.path), 10), (str(first.path), 1)]
    manifest = json.loads((source.path / "checkpoints" / "step-000000010" / "manifest.json").read_text())
    assert lineage[0]["sha256"] == manifest["files"]["tensors.safetensors"]["sha256"]
    assert saved.state["run"]["train"]["start_from"] == f"{first.path}@1"  # the newest, pinned
    assert saved.state["step"] == 2


def test_at_step_0_it_has_the_weights_and_no_moments(
    tiny: Make, source: Run, images: ArraySource, quiet: Console, same_bits: Callable[..., None]
) -> None:
    """On other images, in other views: a last stage. The rate of a first step of warm-up is 0, so nothing moves yet."""
    run = tiny(
        "name=fork", f"train.start_from={source.path}@15", "train.restart_schedule=true", "optim.warmup_epochs=2",
        "views.global_crops_size=48", "views.local_crops_size=32", "optim.teacher_momentum=1",
    )  # fmt: skip
    saved = begun(run, Subset(images, list(range(30))), quiet)
    before = checkpoint.read(source.path / "checkpoints" / "step-000000015")
    assert saved.state["step"] == 1

    def networks(of: checkpoint.Checkpoint) -> dict[str, Tensor]:
        """But for the heads' MLPs, whose batch norms count the step."""
        learned = ("learner/student", "learner/teacher")
        return {key: tensor for key, tensor in of.tensors.items() if key.startswith(learned) and "mlp" not in key}

    same_bits(networks(before), networks(saved))
    steps = [tensor for name, tensor in saved.tensors.items() if name.startswith("optimizer/step/")]
    assert steps and all(tensor.item() == 1 for tensor in steps)
    assert saved.state["run"]["backbone"]["img_size"] == source.views.global_crops_size
    start = checkpoint.load(run.path / START).state_dict()
    same_bits(start, {name: before.tensors[f"learner/teacher.backbone.{name}"] for name in start})


def test_other_rate_and_parts_and_the_anchor_is_what_it_began_with(
    tiny: Make, source: Run, images: ArraySource, quiet: Console, same_bits: Callable[..., None]
) -> None:
    """iBOT and Gram anchoring are new: their parts start from scratch, and the anchor is the checkpoint's teacher."""
    run = tiny(
        "name=fork", f"train.start_from={source.path}@15", "optim.lr=1e-4", "loss.ibot_weight=1",
        "loss.gram_weight=1", "loss.gram_start_epoch=0", "loss.gram_teacher_epoch=0",
    )  # fmt: skip
    saved = begun(run, images, quiet)
    assert "Of the fork, mask_token, ibot, anchor start from scratch" in (run.path / "run.log").read_text()
    before = checkpoint.read(source.path / "checkpoints" / "step-000000015")
    names = [name for name in saved.tensors if name.startswith("learner/anchor.") and "mask_token" not in name]
    same_bits(
        {name: saved.tensors[name] for name in names},
        {name: before.tensors[name.replace("anchor.", "teacher.backbone.")] for name in names},
    )


def test_what_cannot_be_is_named_and_nothing_is_written(
    tiny: Make, source: Run, images: ArraySource, quiet: Console
) -> None:
    start = f"train.start_from={source.path}"
    message = refused(tiny("name=fork", f"{start}@7"), images, quiet)
    assert "no checkpoint of step 7" in message and "5, 10, 15, 20" in message
    message = refused(tiny("name=fork", f"{start}@10", "head.prototypes=64"), images, quiet)
    assert f"head.prototypes: {source.head.prototypes} -> 64" in message and "backbone.weights" in message
    message = refused(tiny("name=fork", f"{start}@10", "backbone.embed_dim=64"), images, quiet)
    assert "backbone.embed_dim" in message
    message = refused(tiny("name=fork", f"{start}@20"), images, quiet)
    assert "train.epochs=5 or more" in message and "restart_schedule" in message
    message = refused(tiny("name=fork", f"{start}@10", "train.batch_size=4"), images, quiet)
    assert "train.batch_size 8 -> 4" in message
    message = refused(tiny("name=fork", f"{start}@10", "optim.name=muon"), images, quiet)
    assert "the moments of adamw" in message and "restart_schedule" in message
    message = refused(tiny("name=fork", f"{start}@10"), Subset(images, list(range(32))), quiet)
    assert "other images" in message and "restart_schedule" in message
    message = refused(tiny("name=fork", "train.start_from=nowhere"), images, quiet)
    assert "There is no run folder nowhere" in message
    with pytest.raises(UserError, match=r"train\.start_from \(--from\) and backbone\.weights"):
        tiny(start, "backbone.weights=x.pth")


def test_a_fork_of_itself_and_a_damaged_checkpoint(
    tiny: Make, source: Run, images: ArraySource, quiet: Console
) -> None:
    (source.path / "checkpoints" / "step-000000010" / "state.json").write_text("{}")
    message = refused(tiny("name=fork", f"train.start_from={source.path}@10"), images, quiet)
    assert "step-000000010 is damaged" in message
    with pytest.raises(UserError, match=r"train\.start_from"):
        tiny("train.restart_schedule=true")


def test_the_same_command_continues_a_fork_whose_origin_is_gone(
    tiny: Make, source: Run, images: ArraySource, quiet: Console, tmp_path: Path
) -> None:
    run = tiny("name=fork", f"train.start_from={source.path}@10")
    begun(run, images, quiet)
    source.path.rename(tmp_path / "elsewhere")
    outcome = train.pretrain(run, images, console=quiet)
    assert outcome.finished and outcome.step == STEPS
    assert "Continuing from step 11 of 20." in (run.path / "run.log").read_text()
