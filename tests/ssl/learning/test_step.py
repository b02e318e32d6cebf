"""A step of training: nothing in it waits for the device, and one that is not finite changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import build_classifier_learner
from nearfar.ssl.learning.dino import build_block_masks, build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.loss_scale import LossScale
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.mixing import Mixing, smoothed
from nearfar.ssl.learning.optim import adamw, optimizer_of
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.settings import finetune_settings
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.optimization import OptimSettings
from nearfar.ssl.settings.run import Run
from nearfar.ssl.training.choose_learner import learner_of
from nearfar.ssl.training.finetuning import ClassifierStepper

Make = Callable[..., Run]
VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
# A GPU answers these only when all that was asked of it before is done.
WAITS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::_linalg_svd", "aten::linalg_lstsq",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put_", "aten::index_select", "aten::gather", "aten::scatter_"}
IN_PLACE = {"aten::_fused_adamw_", "aten::_fused_sgd_"}
EVERY_KIND = [
    ["head.batch_norm=false"],
    ["backbone.lgp=true", "backbone.gaug=true", "backbone.prr=true", "backbone.drop_path=0.2"],
    ["loss.centering=sinkhorn_knopp", "loss.koleo_weight=0.1", "loss.coding_rate_weight=0.2"],
    ["backbone.name=vim_tiny_patch16", "backbone.lgp=true", "backbone.prr=true", "backbone.gaug=false"],
    ["loss.ibot_weight=1", "loss.gram_weight=1"],
    ["loss.recipe=dinov3"],
    ["backbone.lgp=true", "optim.name=muon"],
]
KINDS = ["plain", "ideas", "sinkhorn and koleo", "vim", "ibot and gram", "dinov3", "muon"]


class Watch(TorchDispatchMode):
    """Counts the operations that a GPU would have to be waited for, those that bring numbers to another device, and
    those whose tensors lie on several.

    On the meta device nothing is computed, so what is on it meets what was left on the CPU as on a GPU. The two
    in-place operations that return nothing, of which one has no kernel there, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self.count += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A number may come from the host: it is an argument of the kernel. Of an index it is copied, and waited for.
        arrays = tensors if name in INDEXING else [tensor for tensor in tensors if tensor.dim()]
        devices = {tensor.device for tensor in arrays}
        source, to = (args[0].device, kwargs.get("device")) if name == "aten::_to_copy" else (None, None)
        if name == "aten::copy_":
            devices, source, to = set(), args[1].device, args[0].device
        mask = any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if name in ("aten::index", "aten::index_put_") else ())
        )
        moved = to not in (None, source)  # autocast names the device when it changes the type alone
        fresh = name == "aten::lift_fresh"  # torch.tensor([...]): on a GPU a copy that the host waits for
        if name in WAITS or mask or moved or fresh:
            self.waits.append(name)
        if len(devices) > 1:
            self.mixed.append(name)
        if name in IN_PLACE and devices == {torch.device("meta")}:
            return None
        return func(*args, **kwargs)


def made(tiny: Make, *settings: str, parts: int = 1) -> tuple[Learner, Stepper, list[Tensor]]:
    run = resolve(tiny("train.batch_size=4", *settings), 40)[0]
    learner = build_dino_learner(run)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 32), (run.views.local_crops_number, 16))
    views = [torch.randn((views, 4, 3, side, side), generator=generator) for views, side in sizes]
    return (
        learner,
        Stepper(learner, optimizer_of(run.optim, learner.student), run.optim.clip_grad, accumulate_steps=parts),
        views,
    )


def on_meta(
    monkeypatch: pytest.MonkeyPatch, learner: StudentTeacher, kind: type[Stepper], parts: int, optim: str = "adamw"
) -> Stepper:
    """A stepper of the learner, which goes to the meta device."""
    learner.to("meta")
    allowed = import_module("torch.optim.adam")  # which lists the devices of its fused kernels
    monkeypatch.setattr(allowed, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no type for meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # nor has this
    optimizer = optimizer_of(OptimSettings.model_validate({"name": optim}), learner.student)
    return kind(learner, optimizer, 3.0, accumulate_steps=parts)


def masks_of(tiny: Make, *settings: str, parts: int = 1) -> list[Masks]:
    """Those of step 0 of `made`, if its settings ask for any."""
    found = build_block_masks(resolve(tiny("train.batch_size=4", *settings), 40)[0], patch_size=8)
    return found.of_step(0, torch.device("cpu"), parts) if found else []


@pytest.mark.parametrize("settings", EVERY_KIND, ids=KINDS)
@pytest.mark.parametrize(("frozen", "parts"), [(False, 1), (True, 1), (False, 2)])
def test_no_operation_of_a_step_has_to_be_waited_for(tiny: Make, settings: list[str], frozen: bool, parts: int) -> None:
    learner, stepper, views = made(tiny, *settings, parts=parts)
    values = VALUES | {"gram_weight": float(learner.anchor is not None)}
    masks = masks_of(tiny, *settings, parts=parts)
    stepper(views, values, masks=masks)  # the optimizer makes its moments in the first step
    with Watch() as watch:
        trained = stepper(views, values, masks=masks, freeze_last_layer=frozen, votes=lambda: (0.0, 1.0))
    assert watch.waits == [] and watch.count > 200
    numbers = trained.report.read()
    assert numbers.finite and numbers.votes == (0, 1) and numbers.grad_norm > 0


@pytest.mark.parametrize("settings", EVERY_KIND, ids=KINDS)
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.long)])
def test_all_of_a_step_is_on_the_learners_device(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, settings: list[str], parts: int
) -> None:
    """On the meta device: no tensor of the step is made on the host, meets one there, or is copied."""
    learner, _, views = made(tiny, *settings)
    stepper = on_meta(monkeypatch, learner, Stepper, parts, "muon" if "optim.name=muon" in settings else "adamw")
    views = [group.to("meta") for group in views]
    values = VALUES | {"gram_weight": float(learner.anchor is not None)}
    masks = [Masks(*(part.to("meta") for part in mask)) for mask in masks_of(tiny, *settings, parts=parts)]
    with Watch():
        stepper(views, values, masks=masks)
    with Watch() as watch:
        trained = stepper(views, values, masks=masks, votes=lambda: (0.0, 1.0))
    assert watch.mixed == [] and watch.waits == [] and watch.count > 200
    moments = [value for state in stepper.optimizer.state.values() for value in state.values()]
    tensors = [
        *learner.state_dict().values(),
        *moments,
        trained.outputs.loss,
        *trained.outputs.monitored,
        *trained.outputs.parts.values(),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(moments) > 50


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("overflows", [False, True])
def test_no_operation_of_a_step_in_fp16_has_to_be_waited_for(tiny: Make, parts: int, overflows: bool) -> None:
    """With the loss scaled, and where the gradient overflows: the scaler decides on the device."""
    learner, stepper, views = made(tiny, *EVERY_KIND[1], parts=parts)
    learner.loss_scale = LossScale()
    learner.loss_scale.scale.fill_(256.0)  # under which this gradient fits into float16
    stepper.autocast = lambda: torch.autocast("cpu", torch.float16)
    stepper(views, VALUES)
    if overflows:
        stepper.parameters[3].register_hook(lambda grad: grad * float("inf"))
    with Watch() as watch:
        trained = stepper(views, VALUES, votes=lambda: (0.0, 1.0))
    assert watch.waits == [] and watch.mixed == [] and watch.count > 200
    numbers = trained.report.read()
    assert numbers.finite and numbers.skipped == overflows and numbers.loss_scale == 256 / (1 + overflows)


@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, True), (torch.float16, False)])
def test_the_optimizer_multiplies_in_bf16_and_not_in_fp16(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, within: bool
) -> None:
    """Muon orthogonalizes what is too small for float16."""
    learner, stepper, views = made(tiny, "optim.name=muon")
    learner.loss_scale = LossScale() if dtype == torch.float16 else None
    stepper.autocast = lambda: torch.autocast("cpu", dtype)
    seen: list[bool] = []
    monkeypatch.setattr(stepper.optimizer, "step", lambda: seen.append(torch.is_autocast_enabled("cpu")))
    assert stepper(views, VALUES).report.read().finite and seen == [within]


@pytest.mark.parametrize("parts", [1, 2])
def test_all_of_a_step_in_fp16_is_on_the_learners_device(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """On the meta device, as above; there autocast does nothing, and the scaler all that it does."""
    learner, _, views = made(tiny, *EVERY_KIND[1])
    learner.loss_scale = LossScale()
    stepper = on_meta(monkeypatch, learner, Stepper, parts)
    views = [group.to("meta") for group in views]
    with Watch():
        stepper(views, VALUES)
    with Watch() as watch:
        stepper(views, VALUES, votes=lambda: (0.0, 1.0))
    assert watch.mixed == [] and watch.waits == [] and watch.count > 200
    assert {tensor.device.type for tensor in learner.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("parts", [1, 2])
def test_no_operation_of_a_distilling_step_has_to_be_waited_for(tiny: Make, tmp_path: Path, parts: int) -> None:
    """With a teacher of another width and patch size, and views of two sizes."""
    file = tmp_path / "teacher.safetensors"
    checkpoint.export(file, create("vit_tiny_patch16", img_size=32, embed_dim=40, depth=1, num_heads=2), {"step": 1})
    run = resolve(tiny("train.batch_size=4", f"distill.teacher={file}"), 40)[0]
    learner = learner_of(run)
    stepper = Stepper(learner, adamw(learner.student), 3.0, accumulate_steps=parts)
    views = [torch.randn((2, 4, 3, side, side)) for side in (32, 16)]
    stepper(views, VALUES)
    with Watch() as watch:
        trained = stepper(views, VALUES, votes=lambda: (0.0, 1.0))
    assert watch.waits == [] and watch.mixed == [] and watch.count > 200
    assert trained.report.read().finite and trained.outputs.monitored[0].shape == (2, 4, 24)


SUPERVISED = [
    "name=tiny", "augment.size=16", "backbone.name=vit_tiny_patch4", "backbone.embed_dim=24", "backbone.depth=2",
    "backbone.num_heads=2", "backbone.lgp=true", "backbone.gaug=true", "backbone.prr=true", "train.batch_size=4",
    "classifier.mixup=0.8", "classifier.cutmix=1.0", "classifier.label_smoothing=0.1", "backbone.drop_path=0.2",
]  # fmt: skip


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_no_operation_of_a_supervised_step_has_to_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, place: str, average: float, fp16: bool, parts: int
) -> None:
    """Images and labels of a batch, mixed, and the step on them: with a moving average of the weights or without."""
    run = finetune_settings.resolve_finetune(finetune_settings.load(None, SUPERVISED), 40)[0]
    learner = build_classifier_learner(run, ["red", "green", "blue"])
    learner.loss_scale = LossScale() if fp16 else None
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    if place == "meta":
        stepper = on_meta(monkeypatch, learner, ClassifierStepper, parts)
        images, labels = images.to("meta"), labels.to("meta")
    else:
        stepper = ClassifierStepper(learner, adamw(learner.student), 3.0, accumulate_steps=parts)
        stepper.autocast = lambda: torch.autocast("cpu", torch.float16, enabled=fp16)
    mixing, values = Mixing(run.classifier, 3, 0), VALUES | {"teacher_momentum": average}
    with Watch():
        mixed, targets = mixing(images, labels, 0)
        stepper([mixed[None], targets[None]], values)
    for step in range(1, 4):  # mixup and cutmix
        with Watch() as watch:
            mixed, targets = mixing(images, labels, step)
            trained = stepper([mixed[None], targets[None]], values, votes=lambda: (0.0, 1.0))
        assert watch.waits == [] and watch.mixed == [] and watch.count > 100
    assert {tensor.device.type for tensor in (*learner.state_dict().values(), *trained.outputs)} == {place}
    if place == "cpu":
        assert trained.report.read().finite


def test_labels_that_are_smoothed_alone_stay_on_their_device() -> None:
    """Not on the CPU, where torch reads them to check their bounds; on a GPU it does not."""
    labels = torch.tensor([0, 1, 2, 0]).to("meta")
    with Watch() as watch:
        targets = smoothed(labels, 3, 0.1)
    assert watch.waits == [] and watch.mixed == [] and targets.device.type == "meta" and targets.shape == (4, 3)


def test_the_watch_sees_what_has_to_be_waited_for() -> None:
    x, elsewhere = torch.ones(3), torch.empty(3, device="meta")
    waiting: list[Callable[[], object]] = [
        lambda: float(x[0]), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.unique(), lambda: bool(x.any()),
        lambda: torch.tensor([1.0]), lambda: x.to("meta"), lambda: elsewhere.copy_(x),
        lambda: x.to("meta", torch.float16),
    ]  # fmt: skip
    for operation in waiting:
        with Watch() as watch:
            operation()
        assert watch.waits, operation


def test_the_watch_sees_devices_meet() -> None:
    x, elsewhere, index = torch.ones(3), torch.empty(3, device="meta"), torch.zeros(2, dtype=torch.int64)
    mixing: list[Callable[[], object]] = [
        lambda: elsewhere + x, lambda: torch.cat([x, elsewhere]), lambda: elsewhere[index],
        lambda: torch._foreach_mul_([elsewhere], [x]),
    ]  # fmt: skip
    for operation in mixing:
        with Watch() as watch, suppress(RuntimeError, NotImplementedError):
            operation()
        assert watch.mixed, operation
    with Watch() as watch:
        elsewhere * torch.ones(())
        elsewhere.copy_(elsewhere)
        x.to("cpu", torch.float16)
        x + x
    assert not watch.mixed and not watch.waits and watch.count > 3


def everything(learner: Learner, stepper: Stepper) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    for number, state in enumerate(stepper.optimizer.state.values()):
        found |= {f"{number} {name}": tensor.clone() for name, tensor in state.items()}
    return found


@pytest.fixture
def poison() -> Iterator[Callable[[Stepper], None]]:
    """Makes a single gradient not finite, while the loss stays a number."""
    handles = []

    def hook(stepper: Stepper) -> None:
        handles.append(stepper.parameters[3].register_hook(lambda grad: grad * float("inf")))

    yield hook
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("where", ["views", "gradient"])
def test_a_step_that_is_not_finite_and_those_after_it_change_nothing(
    tiny: Make, poison: Callable[[Stepper], None], where: str, same_bits: Callable[..., None]
) -> None:
    learner, stepper, views = made(tiny, "head.batch_norm=false", "backbone.drop_path=0")
    assert stepper(views, VALUES).report.read().finite
    before = everything(learner, stepper)
    bad = [views[0].clone(), views[1]]
    if where == "views":
        bad[0][0, 1, 0, 3, 3] = float("nan")
    else:
        poison(stepper)
    first, second = stepper(bad, VALUES).report, stepper(views, VALUES).report
    numbers = first.read()
    assert not numbers.finite and (numbers.loss == numbers.loss) == (where == "gradient")
    assert not second.read().finite
    after = everything(learner, stepper)
    assert len(before) > 100
    same_bits(before, after)


def test_a_finite_step_changes_every_weight_and_moment(tiny: Make) -> None:
    """What the test above would not see if nothing ever moved."""
    learner, stepper, views = made(tiny, "head.batch_norm=false", "backbone.drop_path=0")
    stepper(views, VALUES)
    before = everything(learner, stepper)
    stepper(views, VALUES)
    after = everything(learner, stepper)
    still = {name for name in before if torch.equal(before[name], after[name])}
    learned = {f"{who}.{name}" for who in ("student", "teacher") for name, _ in learner.student.named_parameters()}
    assert not still & learned and not {name for name in still if name[0].isdigit()}


def test_frozen_prototypes_have_no_gradient_and_stay(tiny: Make) -> None:
    learner, stepper, views = made(tiny)
    prototypes = learner.student.head.prototypes
    before = prototypes.detach().clone()
    stepper(views, VALUES, freeze_last_layer=True)
    assert torch.equal(prototypes, before) and prototypes not in stepper.optimizer.state
    stepper(views, VALUES)
    assert not torch.equal(prototypes, before)


@pytest.mark.parametrize("more", [[], ["loss.ibot_weight=1", "loss.gram_weight=1"]], ids=["plain", "ibot and gram"])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_equals_the_whole_in_float64(tiny: Make, parts: int, more: list[str]) -> None:
    """Loss, norm of the gradient, outputs, every gradient that AdamW was given (its first moment), center, teacher."""
    settings = ["head.batch_norm=false", "backbone.drop_path=0", "backbone.lgp=true", "backbone.gaug=true", *more]
    values = VALUES | ({"gram_weight": 1.0} if more else {})
    found = []
    for number in (1, parts):
        learner, _, views = made(tiny, *settings)
        learner.double()
        stepper = Stepper(learner, adamw(learner.student), 0.0, accumulate_steps=number)
        calls: list[int] = []
        learner.student.register_forward_hook(lambda _, args, __, calls=calls: calls.append(args[0][0].shape[1]))
        trained = stepper([g.double() for g in views], values, masks=masks_of(tiny, *settings, parts=number))
        assert set(trained.outputs.parts) == ({"ibot", "gram"} if more else set())
        assert calls == [4 // number] * number
        numbers, moments = trained.report.read(), [s["exp_avg"] for s in stepper.optimizer.state.values()]
        scalars = torch.tensor([numbers.loss, numbers.grad_norm], dtype=torch.float64)
        found.append(
            [scalars, *trained.outputs.monitored, *moments, learner.loss.center, *learner.teacher.parameters()]
        )
        found[-1] += [] if learner.ibot is None else [learner.ibot.center]
    for whole, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-9)
    assert len(found[0]) > 50 and float(found[0][0][1]) > 0


def test_parts_that_do_not_divide_a_step_are_refused(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"the 8 images of a step in each process.*train\.accumulate_steps=3"):
        tiny("train.accumulate_steps=3")
    with pytest.raises(UserError, match=r"The 4 images of a step in each of 2 ranks.*accumulate_steps=8"):
        resolve(tiny("train.accumulate_steps=8"), 40, world_size=2)
