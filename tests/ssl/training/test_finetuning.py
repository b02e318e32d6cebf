"""Supervised training: loss and step against float64 formulas, resume to the bit, ranks as one, mistakes in words."""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar.launch.verbs.forking import recipe_and_settings
from nearfar.ssl import checkpoint
from nearfar.ssl.data.labels import class_names
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import ClassifierLearner, build_classifier_learner, soft_cross_entropy
from nearfar.ssl.learning.mixing import Mixing
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.run import fork
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.finetune_settings import FinetuneRun, resolve_finetune
from nearfar.ssl.train import finetune
from nearfar.ssl.training.base import Observers
from nearfar.ssl.training.finetuning import ClassifierStepper

Make = Callable[..., FinetuneRun]
TINY = [
    "name=tiny", "data.workers=0", "augment.size=16", "backbone.name=vit_tiny_patch4", "backbone.embed_dim=24",
    "backbone.depth=2", "backbone.num_heads=2", "backbone.lgp=true", "backbone.gaug=true", "backbone.prr=true",
    "optim.lr=3e-3", "train.epochs=3", "train.batch_size=8", "train.device=cpu", "train.precision=fp32",
    "train.threads=1", "train.log_every_steps=1",
]  # fmt: skip
MIXED = ["classifier.mixup=0.8", "classifier.cutmix=1.0", "classifier.label_smoothing=0.1", "backbone.drop_path=0.2"]
CLASSES = ["red", "green", "blue"]


def colored(count: int, seed: int = 0) -> ArraySource:
    """Noisy tiles of three colors, 20x20: what a classifier learns in seconds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 20, 20, 3))
    images[np.arange(count), :, :, labels] += 100
    return ArraySource(images.astype(np.uint8), labels, classes=CLASSES)


@pytest.fixture
def tiny(tmp_path: Path) -> Make:
    def make(*settings: str, folder: str = "runs") -> FinetuneRun:
        return finetune_settings.load(None, [*TINY, f"folder={tmp_path / folder}", *settings])

    return make


# The loss and the step from the formulas


def test_loss_of_soft_targets_and_its_gradient() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 4, dtype=torch.float64)
    targets /= targets.sum(1, keepdim=True)
    loss = soft_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    x, t = logits.detach().numpy(), targets.numpy()
    probabilities = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    assert loss.item() == pytest.approx(-(t * np.log(probabilities)).sum(1).mean(), abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), (probabilities - t) / 5, atol=1e-12)


def test_loss_is_computed_in_float32_under_half_precision() -> None:
    logits = torch.randn(4, 3)
    targets = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    assert soft_cross_entropy(logits.bfloat16(), targets).dtype is torch.float32


def reference_mix(images: Tensor, labels: Tensor, lam: float, classes: int, smoothing: float) -> tuple[Any, Any]:
    """Mixup with the neighbor in the batch, in float64, from the formulas; every image at its own place."""
    x = images.double().numpy()
    partner = np.arange(len(x)) ^ 1
    hot = np.eye(classes)[labels.numpy()] * (1 - smoothing) + smoothing / classes
    return lam * x + (1 - lam) * x[partner], lam * hot + (1 - lam) * hot[partner]


def test_mixup_against_the_formula(tiny: Make) -> None:
    settings = tiny("classifier.mixup=0.8", "classifier.label_smoothing=0.2").classifier
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 1])
    mixed, targets = Mixing(settings, 3, seed=5)(images, labels, step=7)
    # The first target says which lambda was drawn; everything else must follow from it.
    lam = (float(targets[0, 0]) - 0.2 / 3) / 0.8
    assert 0 < lam < 1
    want, want_targets = reference_mix(images, labels, lam, 3, 0.2)
    process = np.array([0, 2, 4, 5, 3, 1])  # neighbors are put where timm mixes them
    np.testing.assert_allclose(mixed.numpy(), want[process], atol=1e-6)
    np.testing.assert_allclose(targets.numpy(), want_targets[process], atol=1e-6)


@pytest.mark.parametrize("which", ["classifier.mixup=0.8", "classifier.cutmix=1.0"])
def test_mixing_is_a_function_of_seed_and_step(tiny: Make, which: str) -> None:
    mixing = Mixing(tiny(which).classifier, 3, seed=0)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    before = np.random.get_state()[1].copy()
    first = [mixing(images, labels, step) for step in (1, 2)]
    np.random.rand(3)
    again = Mixing(tiny(which).classifier, 3, seed=0)(images, labels, 1)
    assert torch.equal(first[0][0], again[0]) and torch.equal(first[0][1], again[1])
    assert not torch.equal(first[0][1], first[1][1])
    np.random.seed(0)
    assert (np.random.get_state()[1] == before).all()  # conftest seeded it with 0, and mixing left it alone


def test_without_mixing_labels_are_smoothed(tiny: Make) -> None:
    images = torch.rand(3, 3, 4, 4)
    same, targets = Mixing(tiny("classifier.label_smoothing=0.3").classifier, 3, 0)(images, torch.tensor([2, 0, 1]), 0)
    assert same is images
    np.testing.assert_allclose(targets[0].numpy(), [0.1, 0.1, 0.8], atol=1e-6)


def learner_of(run: FinetuneRun) -> ClassifierLearner:
    return build_classifier_learner(resolve_finetune(run, 24)[0], CLASSES).double()


def test_a_step_against_the_formulas(tiny: Make) -> None:
    """One step of AdamW on the head in float64: bias and weight as the formulas give them."""
    learner = learner_of(tiny("backbone.drop_path=0"))
    stepper = ClassifierStepper(learner, adamw(learner.student), 0.0)
    images, targets = torch.randn(1, 6, 3, 16, 16).double(), torch.rand(1, 6, 3).double().softmax(-1)
    with torch.no_grad():
        tokens = learner.student.backbone(images[0])
        probabilities = learner.student(images[0]).softmax(-1)
    error = (probabilities - targets[0]) / 6
    before = {name: p.detach().clone() for name, p in learner.student.head.named_parameters()}
    numbers = stepper([images, targets], {"lr": 0.01, "weight_decay": 0.5, "teacher_momentum": 0.0}).report.read()
    assert numbers.loss == pytest.approx(-(targets[0] * probabilities.log()).sum(-1).mean().item(), abs=1e-12)
    for name, gradient, decay in (("weight", error.T @ tokens.cls, 0.5), ("bias", error.sum(0), 0.0)):
        want = before[name] * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(learner.student.head.get_parameter(name).detach(), want, atol=1e-10, rtol=0)
        assert torch.equal(learner.teacher.head.get_parameter(name), learner.student.head.get_parameter(name))


def test_the_average_of_the_weights(tiny: Make) -> None:
    learner = learner_of(tiny())
    start = learner.student.head.weight.detach().clone()
    with torch.no_grad():
        learner.student.head.weight += 1
    learner.after_step(0.75)
    torch.testing.assert_close(learner.teacher.head.weight, start + 0.25, atol=1e-12, rtol=0)


def test_parts_of_a_step_give_the_gradient_of_the_whole(tiny: Make) -> None:
    views = [torch.randn(1, 8, 3, 16, 16).double(), torch.rand(1, 8, 3).double().softmax(-1)]
    ends = []
    for parts in (1, 4):
        learner = learner_of(tiny("backbone.drop_path=0"))
        stepper = ClassifierStepper(learner, adamw(learner.student), 0.0, accumulate_steps=parts)
        report = stepper(views, {"lr": 0.01, "weight_decay": 0.0, "teacher_momentum": 0.0}).report.read()
        ends.append((report.loss, report.grad_norm))
    assert ends[0] == pytest.approx(ends[1], rel=1e-10)


# Runs


def test_it_learns(tiny: Make, quiet: Any) -> None:
    scores: list[float] = []
    run = tiny("train.epochs=10", "train.batch_size=12", "backbone.drop_path=0", "classifier.mixup=0.2")
    outcome = finetune(run, colored(96), console=quiet)
    assert outcome.finished
    classifier = checkpoint.load_classifier(outcome.folder)
    assert classifier.classes == CLASSES
    held_out = colored(60, seed=1)
    images = torch.from_numpy(held_out.images[:, 2:18, 2:18]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    answers = classifier((images - mean[:, None, None]) / std[:, None, None]).argmax(1).numpy()
    scores.append(float((answers == held_out.labels).mean()))
    assert scores[0] > 0.9
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and "train_top1" in lines[-1]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.ssl.training.test_finetuning import colored
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.train import finetune
finetune(finetune_settings.load(None, sys.argv[2:]), colored(40))
"""


def test_killed_at_once_it_continues_to_the_bit(tiny: Make, tmp_path: Path, same_runs: Callable, quiet: Any) -> None:
    settings = [*MIXED, "train.epochs=6", "optim.ema_decay=0.9", "train.save_every_steps=4"]
    whole, killed = tiny(*settings, folder="whole"), tiny(*settings, folder="killed")
    finetune(whole, colored(40), console=quiet)
    root = Path(__file__).resolve().parents[3]
    words = [*TINY, *settings, f"folder={tmp_path / 'killed'}"]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), *words], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(killed.path.glob("checkpoints/step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(killed.path.glob("checkpoints/step-*"))
    assert finetune(killed, colored(40), console=quiet).finished
    same_runs(whole.path, killed.path, 30)
    one, two = (checkpoint.load_classifier(run.path).state_dict() for run in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def a_rank(rank: int, port: int, settings: list[str], out: Path) -> None:
    world = Ranks(rank, 2, rank, 1, f"tcp://127.0.0.1:{port}")
    with distributed.joined(world, device="cpu"):
        torch.save(two_steps(settings, rank, 2), out / f"{rank}.pt")


def two_steps(settings: list[str], rank: int, size: int) -> dict[str, Tensor]:
    """Two mixed steps in float64 on this rank's slice of 8 images; the weights afterwards."""
    run = resolve_finetune(finetune_settings.load(None, settings), 24)[0]
    learner = learner_of(run)
    stepper = ClassifierStepper(learner, adamw(learner.student), 0.5)
    mixing, generator = Mixing(run.classifier, 3, 0), torch.Generator().manual_seed(0)
    for step in range(2):
        images = torch.randn(8, 3, 16, 16, generator=generator).double()
        labels = torch.randint(3, (8,), generator=generator)
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        mixed, targets = mixing(images[mine], labels[mine], step)
        values = {"lr": 0.01, "weight_decay": 0.1, "teacher_momentum": 0.5}
        assert stepper([mixed[None], targets[None]], values).report.read().finite
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


def test_two_ranks_are_one(tmp_path: Path, free_port: int) -> None:
    settings = [*TINY, "classifier.mixup=0.8", "classifier.cutmix=1.0", "backbone.drop_path=0"]
    torch.multiprocessing.start_processes(a_rank, (free_port, settings, tmp_path), nprocs=2, start_method="spawn")
    alone = two_steps(settings, 0, 1)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in alone.items():
            torch.testing.assert_close(shared[name], tensor, atol=1e-12, rtol=1e-10, msg=name)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# What is saved


def test_a_classifier_loads_strictly_and_gives_its_backbone(tiny: Make, quiet: Any, tmp_path: Path) -> None:
    folder = finetune(tiny("train.epochs=1"), colored(24), console=quiet).folder
    whole = checkpoint.load_classifier(folder)
    for weights in (folder / checkpoint.CLASSIFIER, *(folder / "checkpoints").iterdir()):
        again = checkpoint.load_classifier(weights).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.state_dict().items())
        backbone = checkpoint.load(weights).state_dict()
        assert all(torch.equal(backbone[name], t) for name, t in whole.backbone.state_dict().items())
    about, tensors = checkpoint.about(folder), dict(whole.state_dict())
    del tensors["head.bias"]
    checkpoint.export_tensors(tmp_path / "cut.safetensors", tensors, about)
    with pytest.raises(UserError, match=r"head.bias"):
        checkpoint.load_classifier(tmp_path / "cut.safetensors")
    checkpoint.export(tmp_path / "bare.safetensors", whole.backbone, {"step": 1})
    with pytest.raises(UserError, match="without a classifier"):
        checkpoint.load_classifier(tmp_path / "bare.safetensors")


def test_a_run_starts_from_another(tiny: Make, quiet: Any) -> None:
    first = finetune(tiny("train.epochs=1"), colored(24), console=quiet).folder
    second = tiny("name=second", f"backbone.weights={first}")
    resolved = resolve_finetune(second, 24)[0]
    assert resolved.optim.layerwise_decay == 0.75 and resolve_finetune(tiny(), 24)[0].optim.layerwise_decay == 1
    started = build_classifier_learner(resolved, ["a", "b"]).student.backbone.state_dict()
    trained = checkpoint.load(first).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in trained.items())


def test_it_records_the_weights_that_it_began_with(tiny: Make, quiet: Any) -> None:
    first = finetune(tiny("train.epochs=1"), colored(24), console=quiet).folder
    second = finetune(tiny("name=second", "train.epochs=1", f"backbone.weights={first}"), colored(24), console=quiet)
    (origin,) = checkpoint.about(second.folder)["lineage"]
    file = first / "classifier.safetensors"
    assert origin["from"] == str(file) and origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.about(first)["lineage"] == []


def test_kept_are_the_best_by_its_own_score_and_each_multiple(tiny: Make, quiet: Any) -> None:
    scores = iter([50.0, 90.0, 60.0, 70.0, 80.0])
    settings = [
        "train.epochs=5",
        "train.keep_best=true",
        "train.keep_every=4",
        "train.keep_last=1",
        "eval.every_epochs=1",
    ]
    observers = Observers(probe=lambda classifier, run: {"val_top1": next(scores)})
    run = tiny(*settings)
    finetune(run, colored(24), observers, console=quiet)  # 3 steps an epoch
    kept = [checkpoint_names.step_of(path) for path in checkpoint_names.finished(run.path / "checkpoints")]
    assert kept == [4, 6, 8, 12, 15]


def test_no_pretraining_is_a_fork_of_it(tiny: Make, quiet: Any) -> None:
    first = finetune(tiny("train.epochs=1"), colored(24), console=quiet).folder
    with pytest.raises(UserError, match=r"is a supervised run, .*set backbone\.weights="):
        fork.read(str(first))
    arguments = argparse.Namespace(recipe="name=forked", settings=[], start_from=str(first))
    with pytest.raises(UserError, match=r"is a supervised run, .*set backbone\.weights="):
        recipe_and_settings(arguments)


def test_a_folder_keeps_its_kind_of_run(tiny: Make, quiet: Any) -> None:
    run = tiny("train.epochs=1")
    finetune(run, colored(24), console=quiet)
    with pytest.raises(UserError, match="holds a run of nearfar finetune, and not of nearfar pretrain"):
        RunFolder(run.path).saved_settings()
    with pytest.raises(UserError, match=r"classifier.mixup: 0.0 -> 0.5"):
        finetune(tiny("train.epochs=1", "classifier.mixup=0.5"), colored(24), console=quiet)
    with pytest.raises(UserError, match=r"holds a run with other settings \(train.epochs: 1 -> 2\)"):
        finetune(tiny("train.epochs=2"), colored(24), console=quiet)


# Mistakes


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (None, None, "have no labels, and a classifier needs them"),
        ([0] * 6, ["cat"], "two classes or more, but in pics all 6 images are of class cat"),
        ([0, 0, 2, 2, 0, 2], ["cat", "dog", "owl"], "1 of the 3 classes of pics have no image: dog"),
        ([0, 0, 2, 2, 0, 2], None, "1 of the 3 classes of pics have no image: 1"),
        ([0, 1, -1, 0, 1, 0], None, "must be class numbers from 0 on, but -1"),
    ],
)
def test_labels_that_teach_nothing(labels: Any, classes: Any, message: str, tiny: Make, quiet: Any) -> None:
    source = ArraySource(np.zeros((6, 20, 20, 3), np.uint8), labels, classes=classes)
    with pytest.raises(UserError, match=message):
        class_names(source, "pics")
    with pytest.raises(UserError):
        finetune(tiny(), source, console=quiet)
    assert not tiny().path.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augment.size=18"], "augment.size=18 is not a multiple of the patch size 4 (nearest: 16)"),
        (["train.batch_size=9", "classifier.mixup=1"], "mix pairs of images"),
        (["train.shard=true"], "nearfar finetune does not split networks"),
        (["train.start_from=runs/a"], "are for pretraining: name the run whose backbone"),
        (["train.restart_schedule=true"], "are for pretraining: name the run whose backbone"),
        (["head.prototypes=3"], "head is unknown"),
        (["augment.scale=0.5,1.5"], "cannot exceed 1"),
        (["eval.size=32", "eval.resize=16"], "eval.resize=16 is smaller than the crop"),
    ],
)
def test_settings_that_contradict_each_other(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        finetune_settings.load(None, [*TINY, *settings])
    assert message in str(error.value)


def test_a_loss_that_is_not_finite_is_told_and_nothing_is_saved(
    tiny: Make, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("train.save_every_steps=1")
    whole = ClassifierLearner.forward

    def broken(self: ClassifierLearner, images: Tensor, targets: Tensor) -> Any:
        answers = whole(self, images, targets)
        return answers._replace(loss=answers.loss * float("nan"))

    monkeypatch.setattr(ClassifierLearner, "forward", broken)
    with pytest.raises(UserError, match=r"At step 0 the loss is nan.*nearfar finetune"):
        finetune(run, colored(24), console=quiet)
    assert not list(run.path.glob("checkpoints/step-*"))
