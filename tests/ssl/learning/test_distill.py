"""Distillation: its losses against plain loops in float64, whom they teach, and a teacher that is no part of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.distill import Distiller, FrozenTeacher, ProjectedStudent, patch_cosine_loss
from nearfar.ssl.learning.losses import cosine_loss
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.optimization import DistillSettings
from nearfar.ssl.settings.run import Run
from nearfar.ssl.train import pretrain
from nearfar.ssl.training import choose_learner

Make = Callable[..., Run]
VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def small(name: str = "vit_tiny_patch8", **settings: Any) -> Backbone:
    return create(name, **(SMALL | settings))


def frozen(backbone: Backbone, **settings: Any) -> FrozenTeacher:
    return FrozenTeacher(backbone, "frozen", "0", **settings)


def pair(make: Callable[[], Backbone], width: int) -> tuple[ProjectedStudent, ProjectedStudent]:
    return ProjectedStudent(make(), width), ProjectedStudent(make(), width)


def views(*sides: int, images: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, images, 3, side, side), generator=generator) for side in sides]


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """A teacher that is wider than the tiny student and has larger patches."""
    torch.manual_seed(7)
    backbone, path = small(patch_size=16, embed_dim=40, depth=1), tmp_path / "teacher.safetensors"
    checkpoint.export(path, backbone, {"step": 5, "run": {"head": {"pooling": "cls"}}})
    return path


@pytest.fixture
def distilled(tiny: Make, teacher_file: Path) -> Make:
    def make(*settings: str, **folders: str) -> Run:
        return tiny(f"distill.teacher={teacher_file}", "views.local_crops_number=0", *settings, **folders)

    return make


def built(run: Run) -> Distiller:
    learner = choose_learner.learner_of(resolve(run, 40)[0])
    assert isinstance(learner, Distiller)
    return learner


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(1 - a @ b / np.sqrt((a @ a) * (b @ b)))


def test_the_cosine_loss_is_a_mean_over_rows() -> None:
    a, b = torch.randn((2, 5, 7), dtype=torch.float64), torch.randn((2, 5, 7), dtype=torch.float64)
    rows = zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy(), strict=True)
    assert cosine_loss(a, b).item() == pytest.approx(np.mean([distance(x, y) for x, y in rows]), abs=1e-14)


@pytest.mark.parametrize("finer", ["student", "teacher"])
def test_the_finer_grid_is_halved_before_patches_are_compared(finer: str) -> None:
    """Halving by antialiased bilinear interpolation: a tent of 4 taps, 1 3 3 1, cut off at the edge."""
    fine, coarse = (torch.randn((2, 3, side, side), dtype=torch.float64) for side in (6, 3))
    taps = np.zeros((3, 6))
    for row in range(3):
        for position, weight in zip(range(2 * row - 1, 2 * row + 3), (1, 3, 3, 1), strict=True):
            if 0 <= position < 6:
                taps[row, position] = weight
    taps /= taps.sum(1, keepdims=True)
    found = []
    for image, other in zip(fine.numpy(), coarse.numpy(), strict=True):
        halved = np.stack([taps @ plane @ taps.T for plane in image])
        found += [distance(halved[:, y, x], other[:, y, x]) for y in range(3) for x in range(3)]
    args = (fine, coarse) if finer == "student" else (coarse, fine)
    assert patch_cosine_loss(*args).item() == pytest.approx(np.mean(found), abs=1e-12)


def test_equal_backbones_with_an_identity_projection_differ_by_nothing() -> None:
    backbone = small().double()
    student, average = pair(small, 24)
    student.backbone.load_state_dict(backbone.state_dict())
    for layer in (student.head.summary, student.head.patches):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    learner = Distiller(student, average, frozen(backbone)).double()
    groups = [group.double() for group in views(32, 16)]
    assert abs(learner(groups).loss.item()) < 1e-12
    with torch.no_grad():
        student.head.patches.weight.copy_(-student.head.patches.weight)  # the opposite of every patch: distance 2
    outputs = learner(groups)
    assert outputs.loss.item() == pytest.approx(2) and outputs.parts["patch_loss"].item() == pytest.approx(2)
    learner.patch_weight = 0.25
    assert learner(groups).loss.item() == pytest.approx(0.5)


def test_the_loss_is_that_of_a_plain_loop_over_views_and_images() -> None:
    """Views of two sizes, mean pooling, in float64: summary and patches of every view count alike."""
    backbone = small(embed_dim=40, num_heads=2).double()
    learner = Distiller(*pair(small, 40), frozen(backbone, pooling="mean"), patch_weight=0.5).double().train()
    groups = [group.double() for group in views(32, 16)]
    found = []
    with torch.no_grad():
        for image in (image for group in groups for image in group.flatten(0, 1)):
            ours, theirs = learner.student.backbone(image[None]), backbone(image[None])
            head = learner.student.head
            cls = distance(head.summary(ours.cls)[0].numpy(), theirs.mean[0].numpy())
            rows = zip(head.patches(ours.patches)[0].numpy(), theirs.patches[0].numpy(), strict=True)
            found.append(cls + 0.5 * np.mean([distance(x, y) for x, y in rows]))
    assert learner(groups).loss.item() == pytest.approx(np.mean(found), abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"lgp": True, "gaug": True, "prr": True},
        {"patch_size": 4},
        {"name": "vim_tiny_patch8", "lgp": True, "prr": True},
        {"name": "timm/vit_tiny_patch16_224"},
    ],
    ids=["lgp gaug prr", "smaller patches", "vim", "timm"],
)
def test_the_gradient_reaches_every_weight_and_every_pixel_of_any_student(settings: dict[str, Any]) -> None:
    """Another width and patch size than the teacher's (16); it itself and the moving average get none."""
    backbone = small(patch_size=16, embed_dim=40)
    learner = Distiller(*pair(lambda: small(**settings), 40), frozen(backbone)).train()
    learner.patch_weight = 1.0
    groups = [group.requires_grad_() for group in views(32)]
    learner(groups).loss.backward()
    silent = [name for name, p in learner.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if "norm" not in name and "bias" not in name and "mask" not in name] == []
    assert groups[0].grad is not None and (groups[0].grad != 0).double().mean() > 0.99
    assert all(p.grad is None for module in (backbone, learner.teacher) for p in module.parameters())


def test_the_frozen_teacher_is_no_part_of_the_state_but_goes_where_the_learner_goes(
    same_bits: Callable[..., None],
) -> None:
    backbone = small("timm/resnet18", embed_dim=None, depth=None, num_heads=None)
    learner = Distiller(*pair(small, backbone.embed_dim), frozen(backbone)).train()
    assert {name.split(".")[0] for name in learner.state_dict()} == {"student", "teacher"}
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    Stepper(learner, adamw(learner.student), 3.0)(views(32), VALUES)
    same_bits(before, backbone.state_dict())
    assert not backbone.training and learner.double() is learner
    assert {p.dtype for p in backbone.parameters()} == {torch.float64}


def test_the_average_that_is_exported_has_the_students_running_statistics() -> None:
    student = lambda: small("timm/resnet18", embed_dim=None, depth=None, num_heads=None)  # noqa: E731
    learner = Distiller(*pair(student, 24), frozen(small())).train()
    Stepper(learner, adamw(learner.student), 3.0)(views(32), VALUES | {"teacher_momentum": 0.0})
    theirs = learner.teacher.state_dict()
    assert all(torch.allclose(tensor, theirs[name]) for name, tensor in learner.student.state_dict().items())
    assert any(name.endswith("running_mean") and tensor.any() for name, tensor in theirs.items())


def test_a_student_begins_as_it_does_without_a_teacher(
    distilled: Make, tiny: Make, same_bits: Callable[..., None]
) -> None:
    alone = build_dino_learner(resolve(tiny(), 40)[0])
    same_bits(built(distilled()).student.backbone.state_dict(), alone.student.backbone.state_dict())


def test_distilling_turns_off_what_it_has_no_use_for_unless_the_user_writes_it() -> None:
    run = config.load(None, ["distill.teacher=somewhere"])
    assert (run.views.local_crops_number, run.backbone.drop_path) == (0, 0.0)
    run = config.load(None, ["distill.teacher=somewhere", "views.local_crops_number=3"])
    assert run.views.local_crops_number == 3 and config.load(None, []).views.local_crops_number == 8


def test_a_run_learns_and_is_loaded_like_any_other(
    distilled: Make, images: ArraySource, teacher_file: Path, quiet: Any
) -> None:
    run = distilled("optim.lr=3e-3", "distill.patch_weight=2")
    assert pretrain(run, images, console=quiet).finished
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert all({"summary_loss", "patch_loss", "rankme"} <= line.keys() for line in lines if "loss" in line)
    assert "Distilled from" in (run.path / "run.log").read_text()
    assert checkpoint.load(run.path).embed_dim == 24
    about = checkpoint.about(run.path)
    assert about["distilled_from"]["teacher"] == str(teacher_file) and len(about["distilled_from"]["digest"]) == 64
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and not [name for name in saved.tensors if "source" in name]


def test_a_stopped_run_goes_on_to_the_bit_and_so_does_one_whose_teacher_was_moved(
    distilled: Make, images: ArraySource, teacher_file: Path, same_bits: Callable[..., None]
) -> None:
    def final(run: Run) -> dict[str, Tensor]:
        saved = checkpoint.latest(run.path / "checkpoints")
        assert saved is not None and saved.state["step"] == 20
        return saved.tensors

    whole = distilled(folder="whole")
    pretrain(whole, images)
    stops = iter([False] * 6 + [True])
    halves = distilled(folder="halves")
    assert pretrain(halves, images, should_stop=lambda: next(stops)).step == 7
    moved = teacher_file.rename(teacher_file.with_name("moved.safetensors"))
    assert pretrain(distilled(f"distill.teacher={moved}", folder="halves"), images).finished
    same_bits(final(whole), final(halves))


def test_a_fork_of_it_goes_on_to_the_bit(distilled: Make, images: ArraySource, same_bits: Callable[..., None]) -> None:
    whole = distilled("train.keep_every=10", folder="whole")
    fork = distilled("name=fork", f"train.start_from={whole.path}@10", folder="whole")
    assert pretrain(whole, images).finished and pretrain(fork, images).finished
    ends = [checkpoint.latest(run.path / "checkpoints") for run in (whole, fork)]
    assert ends[0] is not None and ends[1] is not None
    same_bits(ends[0].tensors, ends[1].tensors)


def test_its_projections_can_learn_alone(distilled: Make) -> None:
    learner = built(distilled())
    for frozen in (True, False):
        learner.freeze_backbone(frozen)
        learner(views(32)).loss.backward()
        assert all((p.grad is None) == frozen for p in learner.student.backbone.parameters() if p.dim() > 1)
        assert all(p.grad is not None for p in learner.student.head.parameters())


def test_a_run_is_not_continued_with_another_teacher_or_none(
    distilled: Make, tiny: Make, images: ArraySource, teacher_file: Path
) -> None:
    stops = iter([False] * 2 + [True])
    run = distilled()
    pretrain(run, images, should_stop=lambda: next(stops))
    before = sorted((run.path / "checkpoints").iterdir())
    backbone = checkpoint.load(teacher_file)
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-3
    teacher_file.unlink()
    with pytest.raises(UserError, match=r"There is no teacher .* needs its teacher to continue"):
        pretrain(run, images)
    checkpoint.export(teacher_file, backbone, {"step": 5})
    with pytest.raises(UserError, match=r"The teacher file has changed: .* choose another name="):
        pretrain(run, images)
    assert sorted((run.path / "checkpoints").iterdir()) == before
    alone = ("views.local_crops_number=0", "backbone.drop_path=0.2")
    stops = iter([False, True])
    pretrain(tiny(*alone, folder="alone"), images, should_stop=lambda: next(stops))
    with pytest.raises(UserError, match="begun without a teacher"):
        pretrain(distilled(folder="alone"), images)


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        choose_learner.frozen_teacher(DistillSettings(**settings), 32)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1200
    return text


def test_teachers_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "There is no teacher nowhere" in refusal(teacher="nowhere")
    public = tmp_path / "dino.pth"
    torch.save(small().model.state_dict(), public)
    assert f"distill.teacher=NAME distill.teacher_weights={public}" in refusal(teacher=str(public))
    assert "no model called" in refusal(teacher="timm/vit_tny_patch16_224")
    assert "distill.teacher_weights=FILE" in refusal(teacher="vit_small_patch16")
    offline = refusal(teacher="timm/vit_tiny_patch16_224.augreg_in21k")
    assert "not in the cache" in offline and "distill.teacher_weights=FILE" in offline
    assert "needs the name of a network" in refusal(teacher=str(tmp_path), teacher_weights=str(public))
    assert "belong to another architecture" in refusal(teacher="vit_tiny_patch16", teacher_weights=str(public))


def test_teachers_that_do_not_fit_the_views_are_named_with_a_size_that_does(tmp_path: Path) -> None:
    large, ragged = tmp_path / "large.safetensors", tmp_path / "ragged.safetensors"
    checkpoint.export(large, small(patch_size=64, img_size=128), {"step": 1})
    checkpoint.export(ragged, small(patch_size=10, img_size=40), {"step": 1})
    assert "are smaller than them" in (text := refusal(teacher=str(large))) and "distill.teacher_size=64" in text
    assert "cannot be cut into them" in (text := refusal(teacher=str(ragged))) and "distill.teacher_size=30" in text
    assert "distill.teacher_size=32" in refusal(teacher=str(ragged), teacher_size=32)
    found = choose_learner.frozen_teacher(DistillSettings(teacher=str(ragged), teacher_size=40), 32)
    assert found.zoom == 1.25 and found.tokens(torch.zeros(1, 3, 32, 32)).grid == (4, 4)
    assert found.tokens(torch.zeros(1, 3, 16, 16)).grid == (2, 2)


def test_a_public_file_is_a_teacher_with_the_name_of_its_network(tmp_path: Path) -> None:
    torch.manual_seed(3)
    public, theirs = tmp_path / "vit.pth", create("vit_tiny_patch16", img_size=224, depth=12)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in theirs.model.state_dict().items()}}, public)
    found = choose_learner.frozen_teacher(DistillSettings(teacher="vit_tiny_patch16", teacher_weights=str(public)), 32)
    image = torch.randn(1, 3, 32, 32)
    assert torch.allclose(found.tokens(image).cls, theirs.eval()(image).cls, atol=1e-6)


@pytest.mark.parametrize("weight", ["koleo_weight", "coding_rate_weight", "ibot_weight", "gram_weight"])
def test_other_losses_contradict_a_teacher(weight: str) -> None:
    with pytest.raises(UserError, match=f"loss.{weight}=1 and distill.teacher=x contradict"):
        config.load(None, ["distill.teacher=x", f"loss.{weight}=1"])


def test_settings_of_a_teacher_need_one() -> None:
    with pytest.raises(UserError, match=r"distill\.teacher_size belong to distill.teacher"):
        config.load(None, ["distill.teacher_size=32"])
