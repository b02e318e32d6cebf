"""A step on a GPU: the numbers of the CPU, and no wait for the device between two lines of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar.ssl import checkpoint, train
from nearfar.ssl.backbones.attention import cuda_compiler_missing
from nearfar.ssl.checkpoint import Checkpoint
from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions
from nearfar.ssl.data.loaders.device import DeviceLoader
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.transforms.colors import color_views
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.learning.compiled import compile_backbone
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.prefetch import Prefetch, side_stream
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.run import resume
from nearfar.ssl.settings.defaults import ResolvedRun
from nearfar.ssl.settings.run import Run

VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
Make = Callable[..., ResolvedRun]


def made(run: ResolvedRun, device: torch.device, *, bf16: bool = False) -> tuple[Learner, Stepper]:
    learner = build_dino_learner(run).to(device)
    autocast = {"autocast": lambda: torch.autocast(device.type, torch.bfloat16)} if bf16 else {}
    return learner, Stepper(learner, adamw(learner.student), run.optim.clip_grad, **autocast)


def views_of(run: ResolvedRun, device: torch.device, batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, run.views.global_crops_size), (run.views.local_crops_number, run.views.local_crops_size))
    return [torch.randn((v, batch, 3, side, side), generator=generator).to(device) for v, side in sizes]


def close(found: Tensor, expected: Tensor, relative: float, whole: float) -> bool:
    """Within a share of its own norm, or, for what is 0 but for rounding, of the largest of its kind."""
    difference = (found.cpu().double() - expected.double()).norm()
    return bool(difference <= relative * expected.double().norm() + 1e-6 * whole)


@pytest.mark.parametrize(
    "settings",
    [
        ["backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false", "head.batch_norm=false"],
        ["head.batch_norm=true"],
        ["loss.centering=sinkhorn_knopp", "loss.koleo_weight=0.1", "head.batch_norm=false"],
        ["backbone.name=vim_tiny_patch8", "backbone.gaug=false", "backbone.prr=false", "head.batch_norm=false"],
    ],
    ids=["plain", "ideas", "sinkhorn and koleo", "Vim"],
)
def test_a_step_has_the_gradients_and_the_teacher_of_the_cpu(
    tiny_run: Make, device: torch.device, settings: list[str]
) -> None:
    run = tiny_run(*settings)
    found, expected = made(run, device), made(run, torch.device("cpu"))
    start = {name: value.clone() for name, value in found[0].teacher.named_parameters()}
    numbers = [stepper(views_of(run, each), VALUES).report.read() for (_, stepper), each in
               ((found, device), (expected, torch.device("cpu")))]  # fmt: skip
    assert all(each.finite for each in numbers)
    assert numbers[0].loss == pytest.approx(numbers[1].loss, rel=1e-4)
    assert numbers[0].grad_norm == pytest.approx(numbers[1].grad_norm, rel=1e-3)
    # AdamW's first moment after one step is a tenth of the clipped gradient.
    ours, theirs = (
        [state["exp_avg"] for state in stepper.optimizer.state.values()] for _, stepper in (found, expected)
    )
    whole = max(float(moment.norm()) for moment in theirs)
    assert len(ours) > 20 and all(close(a, b, 1e-3, whole) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(found[0].loss.center.cpu(), expected[0].loss.center, rtol=1e-4, atol=1e-6)
    students = dict(found[0].student.named_parameters())
    for name, teacher in found[0].teacher.named_parameters():
        torch.testing.assert_close(teacher, 0.9 * start[name] + 0.1 * students[name].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        ["backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false"],
        [],
        ["backbone.name=vim_tiny_patch8", "backbone.gaug=false", "backbone.prr=false"],
    ],
    ids=["plain", "ideas", "Vim"],
)
def test_a_compiled_step_has_the_gradients_of_one_that_is_not(
    tiny_run: Make, device: torch.device, settings: list[str]
) -> None:
    """By inductor on a GPU; on a CPU by its tracing alone, which takes no compiler."""
    if device.type == "cuda" and (why := cuda_compiler_missing()):
        pytest.skip(why)
    torch._dynamo.reset()
    run = tiny_run("head.batch_norm=false", *settings)
    found, expected = made(run, device), made(run, device)
    for backbone in (found[0].student.backbone, found[0].teacher.backbone):
        compile_backbone(backbone, device, "inductor" if device.type == "cuda" else "aot_eager")
    numbers = [stepper(views_of(run, device), VALUES).report.read() for _, stepper in (found, expected)]
    assert numbers[0].loss == pytest.approx(numbers[1].loss, rel=1e-4)
    ours, theirs = (
        [state["exp_avg"] for state in stepper.optimizer.state.values()] for _, stepper in (found, expected)
    )
    whole = max(float(moment.norm()) for moment in theirs)
    assert len(ours) > 20 and all(close(a, b.cpu(), 1e-3, whole) for a, b in zip(ours, theirs, strict=True))
    torch._dynamo.reset()


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """The host may start work on the device and may not wait for it (torch raises where it would)."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def noise(n: int = 40, side: int = 40) -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8))


def loader_of(run: ResolvedRun, device: torch.device, kind: str) -> Loader:
    options = LoaderOptions(batch_size=4, epochs=3)
    if kind == "device":
        return DeviceLoader(noise(), run.views, options, device=device)
    return PillowLoader(noise(), run.views, options)


def pinned(batches: Iterator[Batch], device: torch.device) -> Callable[[], Batch]:
    """As a loader with workers hands them over."""

    def fetch() -> Batch:
        batch = next(batches)
        there = batch.groups[0].device.type  # the device loader's are on the GPU already
        return batch.pin_memory() if device.type == "cuda" and there == "cpu" else batch

    return fetch


@pytest.mark.parametrize("settings", [[], ["loss.centering=sinkhorn_knopp", "loss.koleo_weight=0.1"]])
@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_is_waited_for_between_two_lines_of_metrics(
    tiny_run: Make, device: torch.device, settings: list[str], bf16: bool
) -> None:
    """Copies, colors, prefetch, forward, backward, clipping, AdamW, center, teacher, and the numbers' way back."""
    if device.type == "cuda":
        pytest.importorskip("triton", reason="colors without Triton pick their samples on the host")
    run = tiny_run(*settings)
    _, stepper = made(run, device, bf16=bf16)

    def views(batch: Batch) -> list[Tensor]:
        return [normalize(group) for group in color_views(batch, device)]

    batches = iter(loader_of(run, device, "pillow"))
    ahead = Prefetch(pinned(batches, device), views, side_stream(device))
    reports = []

    def step() -> None:
        _, made_views = ahead.take()
        reports.append(stepper(made_views, VALUES, votes=lambda: (0.0, 0.0)).report)
        ahead.begin()

    for _ in range(8):  # compiles, chooses kernels, makes moments; blurs of every width
        step()
    with no_waiting(device):
        for _ in range(8):
            step()
    assert all(report.read().finite for report in reports)


@pytest.mark.cuda
def test_the_search_for_waits_finds_one() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(x.device):
        float(x.sum())


@pytest.mark.parametrize("kind", ["pillow", "device"])
def test_views_made_ahead_are_those_made_in_turn(tiny_run: Make, device: torch.device, kind: str) -> None:
    """To the bit, while the device is kept busy, and read late, after the memory of earlier ones was used again."""
    run = tiny_run()

    def views(batch: Batch) -> list[Tensor]:
        return [normalize(group) for group in color_views(batch, device)]

    expected = [[group.cpu() for group in views(batch)] for batch in loader_of(run, device, kind)]
    ahead = Prefetch(pinned(iter(loader_of(run, device, kind)), device), views, side_stream(device))
    busy, sums = torch.randn(2048 if device.type == "cuda" else 8, 64, device=device), []
    for number in range(len(expected)):
        _, groups = ahead.take()
        for _ in range(50):
            busy = torch.tanh(busy @ busy.T @ busy)
        sums.append([group + 0 for group in groups])  # on the stream that computes, behind all that work
        del groups
        if number + 1 < len(expected):
            ahead.begin()
    assert len(sums) == 30
    for found, group in zip(sums, expected, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, group, strict=True))


def test_a_checkpoint_continues_on_the_device(tiny_run: Make, device: torch.device, tmp_path: Path) -> None:
    """All that was saved comes back to the bit, on the device, and the next steps lose as the uninterrupted ones."""
    run = tiny_run()
    learner, stepper = made(run, device)
    views = views_of(run, device)
    for _ in range(2):
        stepper(views, VALUES).report.read()
    names = {parameter: name for name, parameter in learner.student.named_parameters()}

    def everything(learner: Learner, stepper: Stepper) -> dict[str, Tensor]:
        of = {parameter: name for name, parameter in learner.student.named_parameters()}
        found = {f"learner/{name}": tensor for name, tensor in learner.state_dict().items()}
        return found | {
            f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer_tensors(stepper.optimizer, of).items()
        }

    saved = {name: tensor.cpu().clone() for name, tensor in everything(learner, stepper).items()}
    assert len(names) > 20 and len(saved) > 3 * len(names)
    path = checkpoint.save(tmp_path, 2, saved, {"step": 2, "data": "noise"})
    other, again = made(run, device)
    read: Checkpoint = checkpoint.read(path)
    assert resume.restore(read, other, again.optimizer, "noise") == 2
    restored = everything(other, again)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name].cpu(), saved[name]) for name in saved)
    assert {tensor.device.type for name, tensor in other.state_dict().items()} == {device.type}
    for _ in range(3):
        straight, continued = stepper(views, VALUES).report.read(), again(views, VALUES).report.read()
        assert continued.loss == pytest.approx(straight.loss, rel=1e-4)
        assert continued.grad_norm == pytest.approx(straight.grad_norm, rel=1e-2)


@pytest.mark.parametrize("kind", ["pillow", "device"])
def test_a_run_that_was_stopped_continues_on_the_device(
    tiny: Callable[..., Run], device: torch.device, tmp_path: Path, kind: str
) -> None:
    """The whole loop, with workers and prefetch: every step once, and the losses of the uninterrupted run."""
    pytest.importorskip("rich")
    pytest.importorskip("tensorboard")
    losses = []
    for stops in (False, True):
        run = tiny(
            f"folder={tmp_path / str(stops)}", f"train.device={device.type}", "train.epochs=2", "data.workers=1",
            f"data.loader={kind}", "backbone.drop_path=0.2",
        )  # fmt: skip
        steps: list[int] = []
        if stops:
            ended = train.pretrain(run, noise(), should_stop=lambda steps=steps: steps.append(0) or len(steps) == 4)
            assert 4 <= ended.step < 6 and not ended.finished
        assert train.pretrain(run, noise()).finished
        lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, 11))
        losses.append([line["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
