"""A step that was not finite is saved, and computing it again names the part that failed first."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nearfar.launch import cli
from nearfar.launch.verbs.forking import recipe_and_settings
from nearfar.ssl import checkpoint, config, replay, train
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.run import failed_step
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training import base

Make = Callable[..., Run]


def poisoned(step: int, color_views: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """`color_views` with one NaN in the second local view of the third image of a step."""

    def color(batch: Batch, *rest: Any) -> list[Tensor]:
        groups = color_views(batch, *rest)
        if 5 * batch.epoch + batch.step == step:
            groups[1][1, 2, 0, 3, 3] = float("nan")
        return groups

    return color


def stopped(run: Run, images: ArraySource, quiet: Console, patch: pytest.MonkeyPatch, step: int) -> str:
    """The message of a run that ends at a bad view."""
    with patch.context() as here:
        here.setattr(base, "color_views", poisoned(step, base.color_views))
        with pytest.raises(UserError) as caught:
            train.pretrain(run, images, console=quiet)
    return str(caught.value)


def test_the_step_is_computed_again_as_it_was_and_the_machine_suspected_where_it_succeeds(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, run = tiny(folder="clean"), tiny("train.save_every_steps=3")
    train.pretrain(clean, images, console=quiet)
    stopped(run, images, quiet, monkeypatch, 7)
    first, verdict = replay.replay(failed_step.read(run.path), images)
    line = next(line for line in read_metrics(clean.path / "metrics.jsonl") if line["step"] == 8 and "loss" in line)
    assert f"loss {line['loss']:.6g}, gradient's norm {line['grad_norm']:.6g}; in the run they were nan" in first
    assert "Everything is finite this time" in verdict and "What differs" not in verdict


def test_the_record_holds_the_batch_and_the_state_and_the_message_names_both_ways_on(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch, same_bits: Callable[..., None]
) -> None:
    run = tiny("train.save_every_steps=1", "train.keep_last=9")
    message = stopped(run, images, quiet, monkeypatch, 7)
    record = run.path / "not_finite" / "step-000000007"
    assert f"`nearfar replay {record}`" in message
    saved, before = failed_step.read(record), checkpoint.latest(run.path / "checkpoints")
    assert before is not None and before.state["step"] == saved.state["step"] == 7
    statistics = {name for name in before.tensors if "running_" in name or "num_batches" in name}
    same_bits(*({k: v for k, v in each.tensors.items() if k not in statistics} for each in (before, saved)))
    failed = saved.state["failed"]
    assert (failed["epoch"], failed["step_of_epoch"], failed["loss"]) == (1, 2, "nan")
    assert len(set(failed["samples"])) == 8 and failed["names"] == [images.name(i) for i in failed["samples"]]
    assert not list(record.glob("*.p*"))  # no pickle
    way_on = re.search(r"half the rate: `([^`]+)`", message)
    assert way_on
    again = config.load(*recipe_and_settings(cli.parsed(shlex.split(way_on[1])[1:])))
    assert again.path != run.path and again.optim.lr == 5e-4
    assert again.train.start_from == str(run.path) and not again.train.restart_schedule
    assert train.pretrain(again, images, console=quiet).finished


def test_a_bad_view_is_named_with_its_image(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("head.batch_norm=false")
    stopped(run, images, quiet, monkeypatch, 3)
    saved = failed_step.read(run.path)
    monkeypatch.setattr(replay, "color_views", poisoned(3, replay.color_views))
    verdict = replay.replay(saved, images)[-1]
    assert f"view 4 (local) of the image {saved.state['failed']['names'][2]}." in verdict


def test_a_run_that_blows_up_is_told_that_its_weights_had_overflowed_before(
    tiny: Make, images: ArraySource, quiet: Console
) -> None:
    run = tiny("optim.lr=1e38", "optim.warmup_epochs=0", "optim.weight_decay=0", "head.batch_norm=false")
    with pytest.raises(UserError, match="There is no checkpoint"):
        train.pretrain(run, images, console=quiet)
    verdict = replay.replay(failed_step.read(run.path), images)[-1]
    assert re.search(r"not finite: the weights before the step, of which student\.\S+ is the first of \d+", verdict)


@pytest.fixture
def learner(tiny: Make) -> Learner:
    return build_dino_learner(resolve(tiny("head.batch_norm=false", "backbone.drop_path=0"), 40)[0])


def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((2, 4, 3, side, side), generator=generator) for side in (32, 16)]


def first(learner: Learner) -> list[str]:
    with replay.watched(learner) as found:
        learner(views(), 0.04).loss.backward()
    return found[:1]


def test_a_healthy_step_has_no_finding_and_leaves_no_hook(learner: Learner) -> None:
    assert first(learner) == []
    assert not any(module._forward_hooks for module in learner.modules())


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_the_block_whose_output_overflows_is_named(learner: Learner, who: str) -> None:
    network = getattr(learner, who)
    with torch.no_grad():
        dict(network.named_parameters())["backbone.model.blocks.1.mlp.fc1.weight"].fill_(3e38)
    (block,) = first(learner)
    assert block.startswith(f"the output of {who}.backbone.blocks.1.mlp.fc1, whose input is finite (at most ")


def test_the_head_the_loss_and_a_gradient_are_told_apart(learner: Learner) -> None:
    handle = learner.student.head.register_forward_hook(lambda _, __, out: out * float("inf"))
    assert first(learner)[0].startswith("the output of student.head")
    handle.remove()
    handle = learner.register_forward_hook(lambda _, __, out: out._replace(loss=out.loss * float("nan")))
    assert first(learner) == ["the loss, while all outputs of the networks are finite"]
    handle.remove()
    weight = dict(learner.student.named_parameters())["backbone.model.blocks.0.attn.proj.weight"]
    weight.register_hook(lambda gradient: gradient * float("inf"))
    assert first(learner) == ["the gradient of student.backbone.blocks.0.attn.proj.weight"]


def test_what_is_no_record_is_refused_in_words(
    tiny: Make, images: ArraySource, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds no record of a step that was not finite"):
        failed_step.read(tmp_path)
    run = tiny("train.save_every_steps=1")
    stopped(run, images, quiet, monkeypatch, 3)
    with pytest.raises(UserError, match="is the checkpoint of a step that went well"):
        failed_step.read(run.path / "checkpoints" / "step-000000003")
    with pytest.raises(UserError, match="begun on other images"):
        replay.replay(failed_step.read(run.path), ArraySource(255 - images.images, labels=images.labels))
    (run.path / "not_finite" / "step-000000003" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged: state\.json"):
        failed_step.read(run.path)


def test_a_record_from_before_there_was_an_end_of_the_momentum(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny()
    stopped(run, images, quiet, monkeypatch, 3)
    record = failed_step.read(run.path)
    del record.state["run"]["optim"]["teacher_momentum_end"]
    assert replay.settings_of(record).optim.teacher_momentum_end == 1
    assert "gradient's norm" in replay.replay(record, images)[0]


def test_a_full_disk_does_not_hide_what_happened(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny()

    def full(*_: object, **__: object) -> Path:
        raise UserError("no space")

    monkeypatch.setattr(failed_step.checkpoint, "save", full)
    message = stopped(run, images, quiet, monkeypatch, 3)
    assert "At step 3 the loss is nan" in message and "nearfar replay" not in message
