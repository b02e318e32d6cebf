"""Checkpoints: bit-exact, atomic, strict, without pickle; any damage falls back to the one before and is told."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.optim import parameter_groups
from nearfar.ssl.settings.defaults import resolve

SameBits = Callable[..., None]
ARCH = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
STATE: dict[str, Any] = {"step": 7, "note": "ä ∞", "lr": 0.1}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "learner/a": torch.randn(40, 30, generator=g),
        "learner/wide": torch.randn(5, generator=g, dtype=torch.float64),
        "learner/half": torch.randn(3, 2, generator=g).bfloat16(),
        "learner/count": torch.tensor(12),
        "learner/turned": torch.randn(6, 4, generator=g).T,
        "learner/special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "optimizer/step/a": torch.tensor(3.0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, steps 5 and 7."""
    checkpoint.save(tmp_path / "c", 5, tensors(5), {**STATE, "step": 5})
    checkpoint.save(tmp_path / "c", 7, tensors(7), STATE)
    return tmp_path / "c"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing and reading


def test_round_trip_is_bit_exact(folder: Path, same_bits: SameBits) -> None:
    found = checkpoint.latest(folder)
    assert found is not None and found.path.name == "step-000000007"
    same_bits(found.tensors, tensors(7))
    assert found.state == STATE


def test_learner_and_optimizer_round_trip_bit_exact(tmp_path: Path, same_bits: SameBits) -> None:
    settings = ["views.global_crops_size=32", "views.local_crops_number=0", "head.hidden_dim=16", "head.prototypes=20"]
    settings += [f"backbone.{key}={value}" for key, value in ARCH.items() if key != "img_size"]
    run = resolve(config.load(None, [*settings, "head.batch_norm=true"]), 2_000)[0]

    def made() -> tuple[Any, torch.optim.AdamW, dict[Any, str]]:
        learner = build_dino_learner(run)
        optimizer = torch.optim.AdamW(parameter_groups(learner.student), lr=1e-3, fused=True)
        return learner, optimizer, {p: name for name, p in learner.student.named_parameters()}

    learner, optimizer, by_name = made()
    for _ in range(3):
        learner([torch.randn(2, 4, 3, 32, 32)], 0.04).loss.backward()
        learner.student.head.prototypes.grad = None  # frozen: no optimizer state yet
        optimizer.step()
    saved = checkpoint.optimizer_tensors(optimizer, by_name)
    assert not any("prototypes" in name for name in saved)
    everything = {f"learner/{k}": v for k, v in learner.state_dict().items()} | {
        f"optimizer/{k}": v for k, v in saved.items()
    }
    checkpoint.save(tmp_path, 3, everything, {})

    other, second, names_there = made()
    read = checkpoint.read(tmp_path / "step-000000003").tensors
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}}
    for name, tensor in read.items():
        parts[name.partition("/")[0]][name.partition("/")[2]] = tensor
    checkpoint.load_strict(other, parts["learner"], "it")
    checkpoint.load_optimizer(second, names_there, parts["optimizer"])
    same_bits(dict(other.state_dict()), dict(learner.state_dict()))
    same_bits(checkpoint.optimizer_tensors(second, names_there), saved)


def test_a_checkpoint_holds_safetensors_and_json_and_nothing_that_unpickles(folder: Path) -> None:
    path = folder / "step-000000007"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())
    json.loads((path / "manifest.json").read_text())
    with safe_open(path / "tensors.safetensors", "pt") as handle:
        assert set(handle.keys()) == set(tensors())
    for file in path.iterdir():
        assert file.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1000):
        checkpoint.save(tmp_path, step, tensors(), STATE, keep=3)
    assert names(tmp_path) == ["step-000000002", "step-000000003", "step-000001000"]
    checkpoint.save(tmp_path, 1001, tensors(), STATE, keep=1)
    assert names(tmp_path) == ["step-000001001"]


def test_the_same_step_may_be_written_again(folder: Path, same_bits: SameBits) -> None:
    checkpoint.save(folder, 7, tensors(70), STATE)
    assert names(folder) == ["step-000000005", "step-000000007"]
    same_bits(checkpoint.read(folder / "step-000000007").tensors, tensors(70))


def test_no_checkpoint_is_no_mistake(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None


# Interrupted writing


@pytest.mark.parametrize("fails_at", range(1, 5))
def test_a_write_that_breaks_leaves_the_earlier_ones_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, same_bits: SameBits
) -> None:
    calls = iter(range(1, 100))

    def fsync(_: int) -> None:
        if next(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"No space left.*step-000000007 is intact.*Free some space"):
        checkpoint.save(folder, 9, tensors(9), STATE)
    assert names(folder) == ["step-000000005", "step-000000007"]
    same_bits(checkpoint.read(folder / "step-000000007").tensors, tensors(7))


def test_a_process_killed_while_writing_leaves_the_earlier_ones(folder: Path, same_bits: SameBits) -> None:
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        checkpoint.save(folder, 9, tensors(9), STATE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    left, *whole = names(folder)
    assert left.startswith(".writing-step-000000009") and whole == ["step-000000005", "step-000000007"]
    found = checkpoint.latest(folder)
    assert found is not None
    same_bits(found.tensors, tensors(7))
    checkpoint.save(folder, 11, tensors(11), STATE)
    assert names(folder) == ["step-000000007", "step-000000011"]  # what was half-written is swept up


def test_no_space_left_in_the_middle_of_a_file(folder: Path, same_bits: SameBits) -> None:
    """A real limit of the system on the size of a file, met while the tensors are written."""
    written = folder.parent / "messages"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        messages = []
        for write in (
            lambda: checkpoint.save(folder, 9, {"a": torch.zeros(100_000)}, {}),
            lambda: checkpoint.export(folder.parent / "teacher.safetensors", create("vit_tiny_patch16", depth=1), {}),
        ):
            try:
                write()
            except UserError as error:
                messages.append(str(error))
        written.write_text("\n".join(messages))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    first, second = written.read_text().splitlines()
    assert "step 9 could not be written" in first and "step-000000007 is intact" in first
    assert "teacher.safetensors could not be written" in second and "start the same command again" in second
    assert names(folder.parent) == ["c", "messages"]
    assert names(folder) == ["step-000000005", "step-000000007"]
    same_bits(checkpoint.read(folder / "step-000000007").tensors, tensors(7))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match=r"could not be written.*no earlier checkpoint exists"):
        checkpoint.save(tmp_path / "c", 1, tensors(), STATE)


# Damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors, a flipped byte": (lambda p: flip(p / "tensors.safetensors"), "was changed after it was written"),
    "tensors, cut off": (lambda p: cut(p / "tensors.safetensors"), r"bytes instead of"),
    "tensors, empty": (lambda p: (p / "tensors.safetensors").write_bytes(b""), "has 0 bytes"),
    "tensors, missing": (lambda p: (p / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "state, a flipped byte": (lambda p: flip(p / "state.json"), "state.json was changed"),
    "state, missing": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "manifest, missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
    "manifest, cut off": (lambda p: cut(p / "manifest.json"), "manifest.json"),
    "manifest, empty": (lambda p: (p / "manifest.json").write_bytes(b""), "manifest.json"),
    "manifest, not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json"),
    "manifest, other JSON": (lambda p: (p / "manifest.json").write_text("[1, 2]"), "manifest.json"),
    "manifest, nothing in it": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json"),
    "all files gone": (lambda p: [os.remove(file) for file in p.iterdir()], "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_any_damage_falls_back_to_the_one_before_and_says_so(folder: Path, kind: str, same_bits: SameBits) -> None:
    damage, reason = DAMAGE[kind]
    damage(folder / "step-000000007")
    messages: list[str] = []
    found = checkpoint.latest(folder, messages.append)
    assert found is not None and found.state["step"] == 5
    same_bits(found.tensors, tensors(5))
    (message,) = messages
    assert reason in message and "step-000000007" in message and "continuing from step-000000005" in message
    assert names(folder) == ["step-000000005", "step-000000007.damaged"]
    checkpoint.save(folder, 7, tensors(7), STATE)  # the run gets there again
    again = checkpoint.latest(folder, messages.append)
    assert again is not None and len(messages) == 1
    same_bits(again.tensors, tensors(7))


def test_every_byte_of_the_tensors_and_the_state_is_guarded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1})
    for name in ("tensors.safetensors", "state.json"):
        whole = (path / name).read_bytes()
        for k in range(len(whole)):
            broken = bytearray(whole)
            broken[k] ^= 0x20
            (path / name).write_bytes(broken)
            with pytest.raises(checkpoint.DamagedError):
                checkpoint.read(path)
        (path / name).write_bytes(whole)
    checkpoint.read(path)


def test_several_damaged_ones_are_all_set_aside(folder: Path) -> None:
    checkpoint.save(folder, 9, tensors(9), STATE, keep=3)
    cut(folder / "step-000000009" / "state.json")
    flip(folder / "step-000000007" / "tensors.safetensors")
    messages: list[str] = []
    found = checkpoint.latest(folder, messages.append)
    assert found is not None and found.path.name == "step-000000005" and len(messages) == 2


def test_all_damaged_is_a_mistake_that_names_each_and_destroys_none(folder: Path) -> None:
    cut(folder / "step-000000005" / "tensors.safetensors")
    flip(folder / "step-000000007" / "tensors.safetensors")
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact") as caught:
        checkpoint.latest(folder)
    assert "step-000000005" in str(caught.value) and "step-000000007" in str(caught.value)
    assert names(folder) == ["step-000000005", "step-000000007"]


# Strict loading


def test_strict_loading_names_what_does_not_fit_and_changes_nothing(same_bits: SameBits) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del wrong["0.bias"]
    wrong["2.weight"] = torch.zeros(1)
    wrong["1.weight"] = torch.zeros(2, 5)
    with pytest.raises(UserError) as caught:
        checkpoint.load_strict(module, wrong, "run/x")
    for part in ("run/x", "missing: 0.bias", "unexpected: 2.weight", "misshapen: 1.weight (2, 5) instead of (2, 4)"):
        assert part in str(caught.value)
    same_bits(before, module.state_dict())


def test_strict_loading_lists_a_few_and_counts_the_rest() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(6)))
    with pytest.raises(UserError, match=r"0.bias, 0.weight, 1.bias, 1.weight, 2.bias, 2.weight and 6 more"):
        checkpoint.load_strict(module, {}, "x")


def test_optimizer_state_that_does_not_fit_is_named() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([p])
    with pytest.raises(UserError, match="optimizer state for gone"):
        checkpoint.load_optimizer(optimizer, {p: "here"}, {"exp_avg/gone": torch.zeros(3)})
    with pytest.raises(UserError, match=r"exp_avg/here has shape \(4,\) instead of \(3,\)"):
        checkpoint.load_optimizer(optimizer, {p: "here"}, {"exp_avg/here": torch.zeros(4)})


# The exported teacher


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Any]:
    torch.manual_seed(0)
    backbone = create("vit_tiny_patch16", lgp=True, gaug=True, prr=True, registers=2, **ARCH)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    checkpoint.export(tmp_path / "teacher.safetensors", backbone, {"step": 3})
    return tmp_path / "teacher.safetensors", backbone


def test_load_needs_no_architecture(exported: tuple[Path, Any], same_bits: SameBits) -> None:
    file, backbone = exported
    for path in (file, str(file), file.parent):  # a file, its name, a run folder
        loaded = checkpoint.load(path)
        same_bits(dict(loaded.state_dict()), dict(backbone.state_dict()))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        images = torch.randn(2, 3, 40, 24)
        assert torch.equal(loaded(images).patches, backbone.eval()(images).patches)
    assert checkpoint.about(file)["step"] == 3 and checkpoint.about(file)["arch"] == backbone.arch


def test_an_export_of_a_timm_model(tmp_path: Path, same_bits: SameBits) -> None:
    backbone = create("timm/resnet18", img_size=32)
    checkpoint.export(tmp_path / "r.safetensors", backbone, {})
    same_bits(dict(checkpoint.load(tmp_path / "r.safetensors").state_dict()), dict(backbone.state_dict()))


def test_load_from_a_checkpoint_folder_takes_the_teacher(
    exported: tuple[Path, Any], tmp_path: Path, same_bits: SameBits
) -> None:
    _, backbone = exported
    teacher = {f"learner/teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    student = {f"learner/student.backbone.{k}": v + 1 for k, v in backbone.state_dict().items()}
    run = tmp_path / "run"
    step = checkpoint.save(run / "checkpoints", 4, teacher | student, {"step": 4, "arch": backbone.arch})
    for path in (step, run):
        same_bits(dict(checkpoint.load(path).state_dict()), dict(backbone.state_dict()))
    flip(step / "tensors.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(step)


def test_what_cannot_be_loaded_is_told(exported: tuple[Path, Any], tmp_path: Path) -> None:
    file, backbone = exported
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no weights in it"):
        checkpoint.load(tmp_path / "empty")
    for name, content in (("cut", file.read_bytes()[:-7]), ("text", b"hello"), ("none", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a complete safetensors file"):
            checkpoint.load(tmp_path / name)
    checkpoint.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="was not written by nearfar"):
        checkpoint.load(tmp_path / "foreign.safetensors")
    about = {"nearfar": json.dumps({"arch": {**backbone.arch, "depth": 3}})}
    checkpoint.save_file(backbone.state_dict(), tmp_path / "deeper.safetensors", about)
    with pytest.raises(UserError, match=r"do not fit this model: missing: .*blocks.2"):
        checkpoint.load(tmp_path / "deeper.safetensors")


def test_an_export_replaces_the_one_before_at_once(exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file, backbone = exported
    before = file.read_bytes()

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.export(file, backbone, {"step": 9})
    assert file.read_bytes() == before and names(file.parent) == ["teacher.safetensors"]


def test_a_run_may_be_copied_to_another_place(folder: Path, tmp_path: Path, same_bits: SameBits) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    found = checkpoint.latest(tmp_path / "copy")
    assert found is not None
    same_bits(found.tensors, tensors(7))


# Names, modes, and files that lie


@pytest.mark.parametrize("stranger", ["step-best-copy", "step-00000000x", "step-0000000001", "step-٠٠٠٠٠٠٠٠٩"])
def test_a_folder_of_another_name_is_never_counted_read_or_removed(folder: Path, stranger: str) -> None:
    shutil.copytree(folder / "step-000000005", folder / stranger)
    (folder / "step-000000099").touch()  # a file is no checkpoint either
    checkpoint.save(folder, 9, tensors(9), STATE, keep=1)
    assert names(folder) == sorted([stranger, "step-000000009", "step-000000099"])
    found = checkpoint.latest(folder)
    assert found is not None and found.path.name == "step-000000009"
    assert checkpoint_names.newest_step(folder) == 9 and checkpoint_names.newest_step(folder / "nowhere") == 0


def test_checkpoints_and_exports_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path / "c", 1, tensors(), STATE)
        checkpoint.export(tmp_path / "t.safetensors", create("vit_tiny_patch16", **{**ARCH, "depth": 1}), {})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (path, *path.iterdir(), tmp_path / "t.safetensors")}
    assert modes.pop(path.name) == 0o750 and set(modes.values()) == {0o640} and len(modes) == 4


def test_no_flipped_byte_of_an_exported_header_is_a_traceback(exported: tuple[Path, Any], tmp_path: Path) -> None:
    file, _ = exported
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    metadata = whole.index(b"__metadata__")
    broken = tmp_path / "broken.safetensors"
    refused = 0
    for offset in [*range(8), *range(metadata, metadata + 600, 3), *range(8, 8 + header, 211)]:
        for flip in (0x01, 0x80):
            broken.write_bytes(whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1 :])
            try:
                checkpoint.load(broken)
            except UserError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{"])
def test_metadata_that_is_no_object_is_told(tmp_path: Path, text: str) -> None:
    checkpoint.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"nearfar": text})
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.about(tmp_path / "w.safetensors")


def test_a_name_longer_than_names_can_be_is_told() -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        checkpoint.load("n" * 300)
