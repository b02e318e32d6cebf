"""The loop: every step as docs/methods.md section 5 says, re-computed in float64 from the formulas alone."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nearfar.ssl import checkpoint, train
from nearfar.ssl.backbones import Backbone, Tokens
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning import dino
from nearfar.ssl.parallel import gpus
from nearfar.ssl.settings.defaults import ResolvedRun, resolve
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training import base

Make = Callable[..., Run]
SameBits = Callable[..., None]
Weights = dict[str, Tensor]


class TwoLayers(Backbone):
    """The smallest network that keeps the contract; every parameter has a gradient, also under batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.num_heads = 12, 8, 1
        self.arch = {"name": "two_layers"}
        self.embed = nn.Conv2d(3, 10, 8, 8)
        self.second = nn.Linear(10, 12)
        self.norm = nn.LayerNorm(10)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        x = self.embed(images)
        patches = F.gelu(self.second(self.norm(x.flatten(2).transpose(1, 2))))
        return Tokens(patches[:, :0], patches, (x.shape[2], x.shape[3]))


# The same from the formulas


def project(w: Weights, views: list[Tensor], batch_norm: bool) -> Tensor:
    """Views (B, 3, s, s), any sizes -> cosines (V, B, K)."""
    features = []
    for view in views:
        patches = F.unfold(view, 8, stride=8).transpose(1, 2)
        x = patches @ w["backbone.embed.weight"].flatten(1).T + w["backbone.embed.bias"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w["backbone.norm.weight"] + w["backbone.norm.bias"]
        features.append(gelu(x @ w["backbone.second.weight"].T + w["backbone.second.bias"]).mean(1))
    h = torch.cat(features)
    layers = [value for name, value in w.items() if name.startswith("head.mlp")]
    for _ in range(2):
        h = h @ layers.pop(0).T
        if batch_norm:
            h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * layers.pop(0)
        h = gelu(h + layers.pop(0))
    h = h @ layers.pop(0).T + layers.pop(0)
    w_ = w["head.prototypes"]
    cosines = (h / h.norm(dim=1, keepdim=True)) @ (w_ / w_.norm(dim=1, keepdim=True)).T
    return cosines.view(len(views), -1, cosines.shape[1])


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


class Oracle:
    """DINO, AdamW and EMA written out; settings as in `golden`."""

    def __init__(self, weights: Weights, batch_norm: bool) -> None:
        self.student = {name: value.clone() for name, value in weights.items()}
        self.teacher = {name: value.clone() for name, value in weights.items()}
        self.center = torch.zeros(20, dtype=torch.float64)
        self.moments = {name: (torch.zeros_like(v), torch.zeros_like(v), 0) for name, v in weights.items()}
        self.batch_norm = batch_norm
        self.clipped: list[bool] = []

    def step(self, step: int, views: list[Tensor]) -> float:
        t = step / 20  # 4 epochs of 5 steps
        lr = 0.01 * step / 1 if step < 2 else half_cosine(0.01, 1e-6, (step - 2) / 18)
        wd, momentum = half_cosine(0.04, 0.4, t), half_cosine(0.9, 1.0, t)
        teacher_temp = 0.04 if step < 5 else 0.07  # two epochs of warm-up
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        views = [(view - mean.view(3, 1, 1)) / std.view(3, 1, 1) for view in views]

        q = project(self.teacher, views[:2], self.batch_norm)
        target = ((q - self.center) / teacher_temp).softmax(-1)
        trained = {name: value.requires_grad_() for name, value in self.student.items()}
        s = project(trained, views, self.batch_norm)
        total, pairs = torch.zeros(()), 0
        for iq in range(2):
            for v in range(len(views)):
                if v != iq:
                    total = total + (-target[iq] * (s[v] / 0.1).log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        loss = total / pairs
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

        with torch.no_grad():
            for name, gradient in gradients.items():
                if name == "head.prototypes" and step < 2:  # frozen
                    continue
                norm = float(gradient.norm())
                self.clipped.append(norm > CLIP)
                g = gradient * min(1.0, CLIP / (norm + 1e-6))
                m, u, k = self.moments[name]
                m, u, k = 0.9 * m + 0.1 * g, 0.999 * u + 0.001 * g * g, k + 1
                self.moments[name] = m, u, k
                w = self.student[name].detach()
                decay = 0.0 if w.ndim == 1 else wd
                w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**k)) / ((u / (1 - 0.999**k)).sqrt() + 1e-8)
                self.student[name] = w
            self.center = 0.9 * self.center + 0.1 * q.mean((0, 1))
            for name, w in self.student.items():
                self.teacher[name] = momentum * self.teacher[name] + (1 - momentum) * w.detach()
            self.student = {name: w.detach() for name, w in self.student.items()}
        return float(loss.detach())


CLIP = 1.0  # half of the 58 gradients with batch norm are longer, of the 50 without it more than half


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_golden_steps(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch, batch_norm: bool
) -> None:
    """Loss, all weights of student and teacher, center and AdamW's moments, after 1, 2 and 4 steps of the real loop."""
    run = tiny(
        f"head.batch_norm={batch_norm}",
        "optim.lr=0.01",
        "optim.warmup_epochs=0.4",
        "optim.teacher_momentum=0.9",
        f"optim.clip_grad={CLIP}",
        "optim.freeze_last_layer_epochs=0.4",
        "loss.teacher_temp=0.07",
        "loss.warmup_teacher_temp_epochs=2",
        "train.save_every_steps=1",
        "train.keep_last=99",
    )
    seen: list[list[Tensor]] = []

    def uncolored(batch: Batch, _: torch.device) -> list[Tensor]:
        groups = [group.double() / 255 for group in batch.groups]
        seen.append([view for group in groups for view in group])
        return groups

    monkeypatch.setattr(base, "color_views", uncolored)
    monkeypatch.setattr(dino, "create", lambda name, **_: TwoLayers())
    start = {name: p.detach().clone() for name, p in dino.build_dino_learner(_resolved(run)).student.named_parameters()}
    outcome = train.pretrain(run, images, should_stop=lambda: len(seen) == 4, console=quiet)
    assert outcome.step == 4 and not outcome.finished

    oracle, losses = Oracle(start, batch_norm), []
    for step in range(4):
        losses.append(oracle.step(step, seen[step]))
        found = checkpoint.read(outcome.folder / "checkpoints" / f"step-{step + 1:09d}").tensors
        for name in start:
            for who, weights in (("student", oracle.student), ("teacher", oracle.teacher)):
                saved = found[f"learner/{who}.{name}"]
                assert saved.dtype == torch.float64
                torch.testing.assert_close(saved, weights[name], rtol=1e-9, atol=1e-11, msg=f"{step} {who} {name}")
            m, v, k = oracle.moments[name]
            if k:
                torch.testing.assert_close(found[f"optimizer/exp_avg/{name}"], m, rtol=1e-8, atol=1e-12)
                torch.testing.assert_close(found[f"optimizer/exp_avg_sq/{name}"], v, rtol=1e-8, atol=1e-14)
                assert float(found[f"optimizer/step/{name}"]) == k
            else:
                assert f"optimizer/exp_avg/{name}" not in found
        torch.testing.assert_close(found["learner/loss.center"], oracle.center, rtol=1e-9, atol=1e-12)
    logged = [line["loss"] for line in read_metrics(outcome.folder / "metrics.jsonl")]
    np.testing.assert_allclose(logged, losses, rtol=1e-9)
    assert (
        len(oracle.clipped) / 4 < sum(oracle.clipped) < len(oracle.clipped)
    )  # the limit met some tensors and spared others
    assert not torch.equal(start["head.prototypes"], oracle.student["head.prototypes"])


def _resolved(run: Run) -> ResolvedRun:
    return resolve(run, 40)[0]


# What a run leaves behind


def test_a_whole_run_leaves_what_it_promises(
    tiny: Make, images: ArraySource, quiet: Console, same_bits: SameBits
) -> None:
    seen: list[tuple[Any, ...]] = []
    observers = train.Observers(
        views=lambda batch, colored, folder: seen.append((batch, colored, folder)),
        probe=lambda backbone, run: {"knn_top1": 50.0 + backbone.training},
    )
    run = tiny("train.log_every_steps=3", "eval.knn_every_epochs=2")
    outcome = train.pretrain(run, images, observers, console=quiet)
    assert outcome.finished and outcome.step == outcome.steps == 20 and outcome.folder == run.path

    ((batch, colored, folder),) = seen
    assert folder == run.path and batch.epoch == batch.step == 0
    assert [tuple(group.shape) for group in colored] == [(2, 8, 3, 32, 32), (2, 8, 3, 16, 16)]
    assert all(group.min() >= 0 and group.max() <= 1 for group in colored)

    metrics = read_metrics(run.path / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [3, 6, 9, 12, 15, 18, 20]
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "weight_decay",
        "teacher_momentum",
        "teacher_temp",
        "grad_norm",
        "img_per_s",
        "data_wait",
        "save_wait",
        "entropy",
        "feature_std",
        "rankme",
        "kl",
        "prototypes_used",
        "time",
    }
    assert all(set(line) == keys for line in metrics if "loss" in line)
    probed = [line for line in metrics if "knn_top1" in line]
    assert probed == [{"step": 10, "epoch": 2.0, "knn_top1": 50.0}, {"step": 20, "epoch": 4.0, "knn_top1": 50.0}]
    last = metrics[-2]  # of the last step, number 19 of 20, two of which warm up: just short of the final values
    assert last["lr"] == pytest.approx(half_cosine(1e-3, 1e-6, 17 / 18))
    assert last["weight_decay"] == pytest.approx(half_cosine(0.04, 0.4, 19 / 20)) and last["teacher_momentum"] < 1

    tensors = checkpoint.read(run.path / "checkpoints" / "step-000000020").tensors
    exported = checkpoint.load(run.path)
    teacher = "learner/teacher.backbone."
    saved = {name.removeprefix(teacher): tensor for name, tensor in tensors.items() if name.startswith(teacher)}
    same_bits(exported.state_dict(), saved)
    assert list(run.path.glob("events.out.tfevents*"))
    log = (run.path / "run.log").read_text()
    assert "derived loss.teacher_temp = 0.04" in log and "4 epochs = 20 steps; cpu, float32" in log
    assert log.count("15 steps left: about ") == 1 == log.count("steps left: about ")


def test_what_observers_do_changes_nothing(
    tiny: Make, images: ArraySource, quiet: Console, same_bits: SameBits
) -> None:
    def probe(backbone: Backbone, run: Run) -> dict[str, float]:
        torch.manual_seed(1)
        backbone(torch.randn(2, 3, 32, 32))
        return {"knn_top1": float(torch.rand(()))}

    def look(*_: object) -> None:
        torch.rand(9)

    watched, alone = tiny("eval.knn_every_epochs=1", folder="a"), tiny(folder="b")
    train.pretrain(watched, images, train.Observers(look, probe), console=quiet)
    train.pretrain(alone, images, console=quiet)
    one, two = (checkpoint.latest(run.path / "checkpoints") for run in (watched, alone))
    assert one is not None and two is not None
    same_bits(one.tensors, two.tensors)


def test_a_finished_run_does_nothing_again(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny()
    train.pretrain(run, images, train.Observers(probe=lambda *a: {"knn_top1": 50.0}), console=quiet)

    def state() -> dict[str, bytes]:
        files = [run.path / "metrics.jsonl", run.path / "teacher.safetensors", *run.path.glob("checkpoints/*/*")]
        states = {str(file): file.read_bytes() for file in files}
        return states | {str(file): file.read_bytes() for file in run.path.glob("events.out.tfevents*")}

    before = state()
    calls: list[Any] = []
    watch = train.Observers(views=lambda *a: calls.append(a), probe=lambda *a: calls.append(a) or {})
    outcome = train.pretrain(run, images, watch, console=quiet)
    assert outcome.finished and state() == before and not calls
    assert "already finished (step 20)" in (run.path / "run.log").read_text()


def test_the_seed_of_a_step_differs_from_step_to_step_and_from_run_to_run() -> None:
    seeds = {base.step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(3)}
    assert len(seeds) == 750
    assert 0 <= base.step_seed(2**40, 2**40, 2**20) < 2**63
    torch.manual_seed(base.step_seed(2**20 - 1, 2**31 - 1, 2**12 - 1))


# What goes wrong


def test_the_weights_must_fit_beside_what_is_on_the_gpu(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times the student's 4 bytes a parameter, the teacher's among them."""
    asked: list[int] = []

    def full(device: torch.device, needed: int, what: str) -> None:
        asked.append(needed)
        raise UserError(f"The GPU is full: {what}.")

    monkeypatch.setattr(gpus, "require_room", full)
    run = tiny()
    with pytest.raises(UserError, match="the weights and the optimizer's state"):
        train.pretrain(run, images, console=quiet)
    made = dino.build_dino_learner(resolve(run, len(images))[0])
    one = sum(parameter.numel() for parameter in made.student.parameters())
    assert asked == [4 * 5 * one] and not list(run.path.glob("checkpoints/*"))


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
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch, same_bits: SameBits
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
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())
    assert train.pretrain(run, images, console=quiet).finished  # the cause is gone
    one, two = (checkpoint.latest(r.path / "checkpoints") for r in (clean, run))
    assert one is not None and two is not None
    same_bits(one.tensors, two.tensors)


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
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == 7
    assert train.pretrain(run, images, console=quiet).finished
    one, two = (checkpoint.latest(r.path / "checkpoints") for r in (clean, run))
    assert one is not None and two is not None
    same_bits(one.tensors, two.tensors)


@pytest.mark.usefixtures("a_step_behind")
def test_a_stop_that_is_heard_late_saves_all_that_was_done(
    tiny: Make, images: ArraySource, quiet: Console, same_bits: SameBits
) -> None:
    run, whole = tiny("train.log_every_steps=100"), tiny("train.log_every_steps=100", folder="whole")
    outcome = train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == outcome.step == 2
    train.pretrain(run, images, console=quiet)
    train.pretrain(whole, images, console=quiet)
    one, two = (checkpoint.latest(r.path / "checkpoints") for r in (run, whole))
    assert one is not None and two is not None
    same_bits(one.tensors, two.tensors)


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


def test_the_metrics_are_on_the_disk_before_their_checkpoint(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, save = os.fsync, checkpoint.save

    def noted(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().name == "metrics.jsonl":
            synced.append(os.fstat(handle).st_size)
        fsync(handle)

    def checked(folder: Path, step: int, *rest: Any) -> Path:
        on_disk = (folder.parent / "metrics.jsonl").read_bytes()[: synced[-1]].splitlines()
        assert [json.loads(line)["step"] for line in on_disk][:step] == list(range(1, step + 1))
        return save(folder, step, *rest)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(checkpoint, "save", checked)
    train.pretrain(tiny("train.save_every_steps=7"), images, console=quiet)
    assert len(synced) == 3


def test_the_last_line_says_what_to_do_next(tiny: Make, images: ArraySource, quiet: Console) -> None:
    run = tiny()
    train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    train.pretrain(run, images, train.Observers(probe=lambda *_: {"knn_top1": 25.0}), console=quiet)
    lines = (run.path / "run.log").read_text().splitlines()
    assert any("Stopped after step 1 of 20. The same command continues" in line for line in lines)
    assert f"Next: `nearfar eval all {run.path} --train LABELED" in lines[-1]
    assert "Little or nothing was learned: the online k-NN did not rise" in lines[-2]
    told = {found[1] for line in lines if (found := re.search(r"A checkpoint takes ([\d.]+) KB", line))}
    tensors = checkpoint.read(run.path / "checkpoints" / "step-000000020").tensors
    (size,) = (float(text) * 1e3 for text in told)
    assert size == pytest.approx(sum(tensor.nbytes for tensor in tensors.values()), rel=0.02)


def test_bad_images_are_named_once_and_the_run_goes_on(tiny: Make, quiet: Console) -> None:
    from nearfar.ssl.errors import BadImage

    class Torn(ArraySource):
        def read(self, i: int) -> Any:
            if i == 17:
                raise BadImage(self.name(i), "torn")
            return super().read(i)

    source = Torn(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    run = tiny(
        "data.max_bad_fraction=0.1", "train.log_every_steps=1000"
    )  # told at their step, not at the next line of metrics
    assert train.pretrain(run, source, console=quiet).finished
    lines = (run.path / "run.log").read_text().splitlines()
    (told,) = [number for number, line in enumerate(lines) if "Bad image image 17: torn." in line]
    (ended,) = [number for number, line in enumerate(lines) if " step 20/20" in line]
    assert told < ended


def test_too_many_bad_images_end_it_with_the_checkpoint_kept(tiny: Make, quiet: Console) -> None:
    from nearfar.ssl.errors import BadImage

    class Torn(ArraySource):
        torn = False

        def read(self, i: int) -> Any:
            if self.torn and i % 2:
                raise BadImage(self.name(i), "torn")
            return super().read(i)

    source = Torn(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    run = tiny()
    train.pretrain(run, source, should_stop=lambda: True, console=quiet)
    source.torn = True
    with pytest.raises(UserError, match=r"cannot be used, more than data.max_bad_fraction"):
        train.pretrain(run, source, console=quiet)
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None and saved.state["step"] == 1


def test_metrics_are_json_lines(tiny: Make, images: ArraySource, quiet: Console, tmp_path: Path) -> None:
    run = tiny()
    train.pretrain(run, images, should_stop=lambda: True, console=quiet)
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def estimates(
    monkeypatch: pytest.MonkeyPatch, *, first: int = 0, steps: int = 100, **events: Any
) -> list[tuple[int, str]]:
    """(step, line) of what `Meter` says of the time in a run whose steps take 2 s, but the first two 60 s.

    frozen: steps before which the backbone is frozen, and takes 1 s; scored, saved: seconds by step.
    """
    clock, said, warm = Clock(), [], list[int]()
    monkeypatch.setattr(train, "time", clock)
    loop: Any = SimpleNamespace(
        step=first, saver=SimpleNamespace(seconds=0.0), schedule=SimpleNamespace(steps=steps), backbone_frozen=False,
        log=SimpleNamespace(say=lambda line: said.append((loop.step, line)), warmed_up=lambda step: warm.append(step)),
    )  # fmt: skip
    meter = train.Meter(loop)
    while loop.step < steps:
        loop.step += 1
        loop.backbone_frozen = loop.step < events.get("frozen", 0)
        clock.now += 60 if loop.step <= first + 2 else 1 if loop.backbone_frozen else 2
        meter.estimate()
        if loop.step in events.get("scored", {}):
            clock.now += events["scored"][loop.step]
            meter.scored()
        saving = events.get("saved", {}).get(loop.step, 0)
        clock.now, loop.saver.seconds = clock.now + saving, loop.saver.seconds + saving
    return said


def test_the_length_of_a_run_is_told_from_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    told = partial(estimates, monkeypatch)
    assert told() == [(5, "95 steps left: about 3.2 minutes at 2.00 s a step, without scores.")]
    assert told(first=50) == [(55, "45 steps left: about 90 seconds at 2.00 s a step, without scores.")]
    assert told(steps=5) == []
    assert told(scored={4: 500}, saved={3: 70})[0][0] == 9 and len(told(scored={4: 500})) == 1
    assert told(saved={3: 70}) == told() and told(scored={5: 500, 10: 500}) == told()
    assert [step for step, _ in told(frozen=20)] == [24] and "2.00 s" in told(frozen=20)[0][1]
