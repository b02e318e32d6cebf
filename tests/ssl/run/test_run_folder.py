"""The folder of a run: one owner, one config, metrics that match the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nearfar.ssl import config
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import Derived, ResolvedRun, as_resolved, resolve
from nearfar.ssl.settings.run import Run


def run(*overrides: str) -> Run:
    return config.load(None, ["name=r", *overrides])


def resolved_for(folder: RunFolder, run: Run, images: int) -> tuple[ResolvedRun, list[Derived]]:
    """As the trainer does."""
    return resolve(run, images, 4, saved=folder.saved_settings())


def begin(path: Path, *overrides: str) -> ResolvedRun:
    """A run that has a checkpoint."""
    with RunFolder(path) as folder:
        resolved, _ = resolved_for(folder, run(*overrides), 2_000)
        folder.record(resolved)
        (folder.checkpoints / "step-000000001").mkdir(parents=True)
    return resolved


# One owner


def test_a_second_owner_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r"):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on ") as caught:
            RunFolder(tmp_path / "r").__enter__()
        assert "choose another name=" in str(caught.value)
    with RunFolder(tmp_path / "r"):
        pass


def test_the_lock_goes_with_its_process_however_it_dies(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        RunFolder(tmp_path / "r").__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert "process" in (tmp_path / "r" / "lock").read_text()
    with RunFolder(tmp_path / "r"):
        pass


def test_a_forked_worker_neither_holds_the_lock_nor_frees_it(tmp_path: Path) -> None:
    ready, tell_ready = os.pipe()
    go, tell_go = os.pipe()
    with RunFolder(tmp_path / "r"):
        child = os.fork()
        if child == 0:
            os.close(tell_go)
            os.write(tell_ready, b".")
            os.read(go, 1)  # lives on until the parent is done
            os._exit(0)
        os.read(ready, 1)
        with pytest.raises(UserError, match="in use"):
            RunFolder(tmp_path / "r").__enter__()
    with RunFolder(tmp_path / "r"):  # the worker is alive
        pass
    os.close(tell_go)
    os.waitpid(child, 0)
    for handle in (ready, tell_ready, go):
        os.close(handle)


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(ZeroDivisionError), folder:
        raise ZeroDivisionError
    with folder:
        assert (tmp_path / "r" / "lock").read_text().count("\n") == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "r").__enter__()


# One config


def test_the_resolved_config_is_saved_and_found_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        resolved, derived = resolved_for(folder, run("train.threads=3"), 2_000)
        assert not (tmp_path / "r" / "config.yaml").exists()  # not before the start is accepted
        folder.record(resolved)
    assert derived and resolved.head.prototypes == 128
    assert as_resolved(ResolvedRun, config.load(tmp_path / "r" / "config.yaml")) == resolved


def test_a_continued_run_keeps_what_was_derived(tmp_path: Path) -> None:
    first = begin(tmp_path / "r", "train.threads=3")
    with RunFolder(tmp_path / "r") as folder:
        again, derived = resolved_for(folder, run(), 2_000_000)  # even where more would be derived now
    assert again == first and derived == []


def test_free_settings_may_change_and_are_saved(tmp_path: Path) -> None:
    begin(tmp_path / "r", "train.log_every_steps=10")
    with RunFolder(tmp_path / "r") as folder:
        again, _ = resolved_for(folder, run("train.log_every_steps=3", "data.workers=5"), 2_000)
        folder.record(again)
    assert again.train.log_every_steps == 3 and again.data.workers == 5
    assert as_resolved(ResolvedRun, config.load(tmp_path / "r" / "config.yaml")) == again


def test_other_settings_are_refused_by_name_and_the_config_stays(tmp_path: Path) -> None:
    first = begin(tmp_path / "r")
    with RunFolder(tmp_path / "r") as folder:
        with pytest.raises(UserError) as caught:
            resolved_for(folder, run("optim.clip_grad=1", "train.epochs=7"), 2_000)
        for part in ("optim.clip_grad: 3.0 -> 1.0", "train.epochs: 100 -> 7", "choose another name="):
            assert part in str(caught.value)
    assert as_resolved(ResolvedRun, config.load(tmp_path / "r" / "config.yaml")) == first


def test_a_start_that_failed_before_its_first_checkpoint_may_be_corrected(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        folder.record(resolved_for(folder, run("backbone.name=vit_smal_patch16"), 2_000)[0])
    with RunFolder(tmp_path / "r") as folder:
        again, derived = resolved_for(folder, run("backbone.name=vit_small_patch16"), 2_000_000)
    assert again.backbone.name == "vit_small_patch16" and derived and again.head.prototypes == 65536


def test_weights_alone_are_protected_from_other_settings(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        folder.record(resolved_for(folder, run(), 2_000)[0])
        (tmp_path / "r" / "teacher.safetensors").write_text("weights of months")
        with pytest.raises(UserError, match="other settings"):
            resolved_for(folder, run("optim.clip_grad=1"), 2_000)


def test_a_config_that_this_version_does_not_know_is_told(tmp_path: Path) -> None:
    begin(tmp_path / "r")
    with (tmp_path / "r" / "config.yaml").open("a") as file:
        file.write("future: {setting: 1}\n")
    with RunFolder(tmp_path / "r") as folder, pytest.raises(UserError, match="does not fit this version"):
        resolved_for(folder, run(), 2_000)


# Metrics


def test_metrics_past_the_checkpoint_are_forgotten_with_a_cut_off_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": step / 7}) for step in (1, 2, 2, 3, 4)]
    folder.metrics.write_text("\n".join([*lines, '{"step": 5, "lo']))
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 2, 2, 3, 4]
    folder.forget_metrics_after(2)
    assert folder.metrics.read_text() == "".join(f"{line}\n" for line in lines[:3])
    folder.forget_metrics_after(0)
    assert folder.metrics.read_text() == ""


def test_no_metrics_are_no_mistake(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.forget_metrics_after(0)
    assert read_metrics(folder.metrics) == [] and not folder.metrics.exists()


# What checkpoints know


def trained(path: Path, *overrides: str) -> ResolvedRun:
    """A run with a checkpoint that knows its settings."""
    resolved = begin(path, *overrides)
    state = {"run": resolved.model_dump(mode="json")}
    (path / "checkpoints" / "step-000000001" / "state.json").write_text(json.dumps(state))
    return resolved


def test_without_its_config_a_run_is_compared_with_its_checkpoint(tmp_path: Path) -> None:
    first = trained(tmp_path / "r", "optim.clip_grad=2")
    (tmp_path / "r" / "config.yaml").unlink()
    with RunFolder(tmp_path / "r") as folder:
        assert resolved_for(folder, run("optim.clip_grad=2"), 2_000_000) == (first, [])
        with pytest.raises(UserError, match=r"optim.clip_grad: 2.0 -> 3.0"):
            resolved_for(folder, run(), 2_000)


def test_a_config_that_was_edited_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "r")
    file = tmp_path / "r" / "config.yaml"
    file.write_text(file.read_text().replace("clip_grad: 3.0", "clip_grad: 1.0"))
    with RunFolder(tmp_path / "r") as folder, pytest.raises(UserError, match=r"was changed.*clip_grad: 3.0 -> 1.0"):
        resolved_for(folder, run("optim.clip_grad=1"), 2_000)


def test_a_name_longer_than_names_can_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        RunFolder(tmp_path / ("n" * 300)).saved_settings()
    with pytest.raises(UserError, match="File name too long"):
        RunFolder(tmp_path / ("n" * 300)).__enter__()


def test_a_failed_start_leaves_no_folder_but_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "runs" / "r"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "runs" / "mine"):
        raise ZeroDivisionError
    assert (tmp_path / "runs" / "mine").is_dir()


def test_metrics_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    with pytest.raises(UserError, match="cannot be read or written"):
        folder.forget_metrics_after(3)
