"""Student and teacher: who is trained, who follows, what decays, what is clipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfar.ssl import config
from nearfar.ssl.learning.dino import build_block_masks, build_dino_learner, untrained_backbone
from nearfar.ssl.learning.gram import gram_loss
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.losses import coding_rate, koleo
from nearfar.ssl.learning.masks import Masks
from nearfar.ssl.learning.optim import clip_gradients, multiply_alike, parameter_groups
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run

Make = Callable[..., Learner]


@pytest.fixture
def made(tiny: Callable[..., Run]) -> Make:
    """Builds the learner of the tiny run with these settings."""
    return lambda *overrides: build_dino_learner(resolve(tiny(*overrides), 2_000)[0])


def groups(batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, batch, 3, 32, 32, generator=generator),
        torch.randn(2, batch, 3, 16, 16, generator=generator),
    ]


def test_a_step_has_the_shapes_it_says(made: Make) -> None:
    out = made()(groups(), teacher_temp=0.04)
    assert out.loss.shape == () and out.loss.requires_grad
    assert out.monitored[0].shape == (2, 4, 20)
    assert out.monitored[1].shape == (2, 4, 24)
    assert not out.monitored[0].requires_grad and not out.monitored[1].requires_grad


def test_views_come_out_in_order_globals_first(made: Make) -> None:
    learner = made("head.batch_norm=false", "backbone.drop_path=0")
    views = groups()
    logits, features, *_ = learner.student_outputs(views)
    assert logits.shape == (4, 4, 20) and features.shape == (4, 4, 24)
    for v, view in enumerate([*views[0], *views[1]]):
        alone = learner.student.backbone(view).cls
        torch.testing.assert_close(features[v], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[v], learner.student.head(alone), rtol=1e-4, atol=1e-5)


def test_the_head_reads_the_mean_over_the_patches_when_told(made: Make) -> None:
    learner = made("head.batch_norm=false", "backbone.drop_path=0", "head.pooling=mean")
    views = groups()
    logits, features, *_ = learner.student_outputs(views)
    for v, view in enumerate([*views[0], *views[1]]):
        mean = learner.student.backbone(view).patches.mean(1)
        torch.testing.assert_close(features[v], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[v], learner.student.head(mean), rtol=1e-4, atol=1e-5)


def test_koleo_is_weighed_on_the_students_global_views(made: Make) -> None:
    plain, apart = made("backbone.drop_path=0"), made("backbone.drop_path=0", "loss.koleo_weight=0.3")
    views = groups()
    features = plain.student_outputs(views).features
    difference = apart(views, 0.04).loss - plain(views, 0.04).loss
    torch.testing.assert_close(difference, 0.3 * koleo(features[:2]), rtol=1e-4, atol=1e-5)


def test_the_coding_rate_of_all_of_the_students_views_is_raised(made: Make) -> None:
    plain, spread = made("backbone.drop_path=0"), made("backbone.drop_path=0", "loss.coding_rate_weight=0.3")
    views = groups()
    features = plain.student_outputs(views).features
    got = spread(views, 0.04)
    torch.testing.assert_close(got.loss - plain(views, 0.04).loss, -0.3 * coding_rate(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.parts["coding_rate"], -coding_rate(features).detach())


def test_the_teacher_begins_as_the_student_and_is_not_trained(made: Make, same_bits: Callable[..., None]) -> None:
    learner = made("head.batch_norm=true", "backbone.lgp=true", "backbone.gaug=true", "backbone.prr=true")
    student, teacher = learner.student.state_dict(), learner.teacher.state_dict()
    same_bits(student, teacher)
    learner(groups(), 0.04).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in learner.teacher.parameters())
    assert all(p.grad is not None for p in learner.student.parameters())
    shared = {p.data_ptr() for p in learner.student.parameters()} & {p.data_ptr() for p in learner.teacher.parameters()}
    assert not shared


def test_the_same_seed_gives_the_same_weights(made: Make, same_bits: Callable[..., None]) -> None:
    one, two, other = made(), made(), made("train.seed=1")
    same_bits(one.state_dict(), two.state_dict())
    assert not torch.equal(one.student.head.prototypes, other.student.head.prototypes)


def test_only_the_student_drops_paths(made: Make) -> None:
    learner, views = made("backbone.drop_path=0.5", "head.batch_norm=false"), groups(batch=16)
    first, again = learner.teacher_outputs(views[0])[0], learner.teacher_outputs(views[0])[0]
    assert torch.equal(first, again)
    assert not torch.equal(learner.student_outputs(views)[0], learner.student_outputs(views)[0])
    assert learner.teacher.backbone.arch["drop_path"] == 0  # so is what is exported


def test_ema_against_brute_force(made: Make) -> None:
    learner = made("head.batch_norm=true").double()
    expected = {name: p.detach().numpy().copy() for name, p in learner.teacher.named_parameters()}
    for k, momentum in enumerate((0.9, 0.996, 1.0, 0.0, 0.5)):
        with torch.no_grad():
            for p in learner.student.parameters():
                p.add_(torch.randn_like(p) * (k + 1))
        learner.update_teacher(momentum)
        for name, p in learner.student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * p.detach().numpy()
    for name, p in learner.teacher.named_parameters():
        np.testing.assert_allclose(p.numpy(), expected[name], rtol=1e-12, atol=1e-14)


def test_batch_norm_statistics_of_the_teacher_are_its_own(made: Make) -> None:
    learner = made("head.batch_norm=true")
    norm = learner.teacher.head.mlp[1]
    assert isinstance(norm, nn.BatchNorm1d)
    views = groups()
    rows: dict[str, torch.Tensor] = {}
    learner.teacher.head.mlp[0].register_forward_hook(lambda _, __, out: rows.update(x=out.detach()))
    learner(views, 0.04)
    torch.testing.assert_close(norm.running_mean, 0.1 * rows["x"].mean(0))
    before = norm.running_mean.clone()
    with torch.no_grad():
        learner.student.head.mlp[1].running_mean.fill_(100)
    learner.update_teacher(0.0)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("switches", [[], ["backbone.name=timm/resnet18", "head.batch_norm=true"]])
def test_parameter_groups_lose_none_and_take_none_twice(switches: list[str], tiny_settings: list[str]) -> None:
    small = [key for key in tiny_settings if not (switches and key.startswith("backbone."))]
    run = config.load(None, [*small, "backbone.drop_path=0", *switches])
    learner = build_dino_learner(resolve(run, 2_000)[0])
    decay, rest = parameter_groups(learner.student)
    names = {parameter: name for name, parameter in learner.student.named_parameters()}
    listed = [*decay["params"], *rest["params"]]
    assert len(listed) == len(set(listed)) == len(names) and set(listed) == set(names)
    for parameter in rest["params"]:
        assert parameter.ndim <= 1 or names[parameter].endswith(".bias")
    for parameter in decay["params"]:
        assert parameter.ndim > 1 and not names[parameter].endswith(".bias")
    assert learner.student.head.prototypes in set(decay["params"])
    assert (decay["decays"], rest["decays"], rest["weight_decay"]) == (True, False, 0.0)


def test_each_tensor_is_clipped_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(4, 4), (9,), (2, 3, 3), (1,)]]
    lengths = [10.0, 3.5, 2.0]
    for p, length in zip(parameters, lengths, strict=False):
        p.grad = torch.randn(p.shape, generator=generator)
        p.grad *= length / p.grad.norm()
    before = copy.deepcopy([p.grad for p in parameters])
    whole = clip_gradients(parameters, 3.0)
    assert float(whole) == pytest.approx(np.linalg.norm(lengths), rel=1e-5)
    for p, old, length in zip(parameters, before, lengths, strict=False):
        assert p.grad is not None and old is not None
        torch.testing.assert_close(p.grad, old * min(1.0, 3.0 / (length + 1e-6)))
    assert parameters[3].grad is None


class Launches(TorchDispatchMode):
    """How many kernels a GPU would start, and bring no numbers elsewhere: an operation on many tensors is one where
    all lists agree in shapes and strides, as torch's fast route asks, and one for each tensor otherwise.
    """

    VIEWS: ClassVar[set[str]] = {"view", "expand", "unbind", "detach", "alias", "select"}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
        if name.startswith("_foreach"):
            forms = [[(each.shape, each.stride()) for each in tensors] for tensors in lists]
            self.count += 1 if all(form == forms[0] for form in forms) else len(forms[0])
        else:
            self.count += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_many_tensors_are_scaled_in_few_launches_with_the_bits_of_one_by_one() -> None:
    """The gradients of a ViT of 12 blocks, a scalar, and two whose numbers are not in a row."""
    generator = torch.Generator().manual_seed(0)
    block = [(48,), (48, 16), (16, 16), (16,), (16,), (64, 16), (64,), (16, 64), (16,)]
    shapes = [*block * 12, (1, 1, 16), (), (7, 16)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors += [torch.randn(3, 5, generator=generator).T for _ in range(2)]
    factors = list(torch.rand(len(tensors), generator=generator).unbind())
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    with Launches() as one_by_one:
        torch._foreach_mul_(copy.deepcopy(tensors), factors)
    with Launches() as ours:
        multiply_alike(tensors, factors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert one_by_one.count >= 113
    # seven shapes: a stack and a spread each; five tensors alone; the product
    assert ours.count == 7 * 2 + 5 + 1


def test_no_limit_only_measures_and_a_number_that_is_not_finite_shows() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 4.0, 0.0])
    assert float(clip_gradients([p], 0)) == 5 and p.grad.tolist() == [3, 4, 0]
    for bad in (float("nan"), float("inf")):
        p.grad[1] = bad
        assert not torch.isfinite(clip_gradients([p], 3.0))


def masks_of(made_with: list[str], tiny: Callable[..., Run], batch: int = 4) -> Masks:
    run = resolve(tiny(f"train.batch_size={batch}", *made_with), 2_000)[0]
    found = build_block_masks(run, 8)
    assert found is not None
    return found.of_step(0, torch.device("cpu"))[0]


@pytest.mark.parametrize("separate", [True, False])
def test_ibot_is_weighed_on_what_the_teacher_saw_and_the_student_did_not(
    made: Make, tiny: Callable[..., Run], separate: bool
) -> None:
    """DINO's loss on the masked views plus the patch loss, put together here view by view."""
    settings = ["loss.ibot_weight=0.7", "head.batch_norm=false", "backbone.drop_path=0"]
    settings += ["head.ibot_separate=true", "head.ibot_prototypes=12"] if separate else []
    learner, views, masks = made(*settings).double(), [group.double() for group in groups()], masks_of(settings, tiny)
    nn.init.normal_(learner.student.backbone.model.mask_token)
    out = learner(views, 0.04, masks)
    head = "patch_head" if separate else "head"
    assert (learner.student.patch_head is not None) is separate and out.parts.keys() == {"ibot"}

    global_views = views[0].flatten(0, 1)
    seen = learner.teacher.backbone(global_views)
    unseen = learner.student.backbone(global_views, masks.hidden.flatten(0, 1))
    total = 0.0
    for view, hidden in enumerate(masks.hidden.flatten(0, 1)):
        if hidden.any():
            teacher = getattr(learner.teacher, head)(seen.patches[view][hidden])
            student = getattr(learner.student, head)(unseen.patches[view][hidden])
            total += float(-((teacher / 0.04).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1).mean().detach())
    assert float(out.parts["ibot"]) == pytest.approx(total / 8, rel=1e-6)

    cls = torch.cat([unseen.cls, learner.student.backbone(views[1].flatten(0, 1)).cls])
    dino = learner.loss(learner.student.head(cls).unflatten(0, (4, 4)), out.monitored[0])
    assert float(out.loss) == pytest.approx(float(dino) + 0.7 * total / 8, rel=1e-6)
    out.loss.backward()
    assert all(p.grad is not None for p in learner.student.parameters())


def test_gram_anchoring_keeps_the_teacher_of_the_moment_it_was_taken(made: Make) -> None:
    learner = made("loss.gram_weight=2", "backbone.drop_path=0", "head.batch_norm=false")
    views = groups()
    assert learner.anchor is not None and not learner.anchor.training
    with torch.no_grad():
        for p in learner.student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    learner.update_teacher(0.5)
    moved = gram_loss(
        learner.student.backbone(views[0].flatten(0, 1)).patches, learner.anchor(views[0].flatten(0, 1)).patches
    )
    assert moved > 0
    plain, anchored = learner(views, 0.04), learner(views, 0.04, gram_weight=2.0)
    assert plain.parts == {} and float(anchored.parts["gram"]) == pytest.approx(float(moved), rel=1e-4)
    torch.testing.assert_close(anchored.loss - plain.loss, 2 * moved, rtol=1e-4, atol=1e-5)
    learner.take_anchor()
    learner.update_teacher(0.5)  # the teacher goes on, the anchor stays
    then = learner.anchor.state_dict()
    now = learner.teacher.backbone.state_dict()
    assert any(not torch.equal(then[name], now[name]) for name in then)
    anchored.loss.backward()
    assert all(p.grad is None for p in learner.anchor.parameters())


def test_both_heads_prototypes_are_frozen_together(made: Make) -> None:
    learner = made("loss.recipe=dinov2")
    learner.freeze_prototypes(True)
    frozen = {name for name, p in learner.student.named_parameters() if not p.requires_grad}
    assert frozen == {"head.prototypes", "patch_head.prototypes"}


def test_rows_that_fill_the_list_do_not_enter_batch_norm(made: Make, tiny: Callable[..., Run]) -> None:
    settings = ["loss.ibot_weight=1", "backbone.drop_path=0"]
    masks = masks_of(settings, tiny)
    assert (masks.weights == 0).any()
    short = masks._replace(rows=masks.rows[masks.weights > 0], weights=masks.weights[masks.weights > 0])
    one, two = made(*settings), made(*settings)
    first, second = one(groups(), 0.04, masks), two(groups(), 0.04, short)
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-5, atol=1e-6)
    for (name, x), y in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [[], ["backbone.lgp=false", "backbone.drop_path=0.3"], ["loss.ibot_weight=1"]])
def test_the_untrained_backbone_is_what_the_run_begins_with(
    tiny: Callable[..., Run], changes: list[str], same_bits: Callable[..., None]
) -> None:
    run = tiny(*changes, "train.seed=5")
    begins = build_dino_learner(resolve(run, 2_000)[0])
    alone = untrained_backbone(run)
    assert not alone.training and not any(parameter.requires_grad for parameter in alone.parameters())
    for network in (begins.student, begins.teacher):
        same_bits(alone.state_dict(), network.backbone.state_dict())
