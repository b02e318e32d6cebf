"""fp16: a gradient that overflows costs one step and halves the scale; it is no end of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nearfar.ssl import checkpoint, train
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.dino import DINOLearner, build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.loss_scale import FIRST, GROWTH_INTERVAL, LEAST, MOST, LossScale, fitted
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.parallel import device
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
YES, NO = torch.ones(()), torch.zeros(())


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast to float16 runs on every CPU, if slowly on some, but a run takes it only where the hardware does."""
    monkeypatch.setattr(device, "has_fp16", lambda _: True)


def test_the_scale_is_that_of_torchs_own_scaler() -> None:
    """GradScaler's rule over a random history of overflows (one in a hundred) and good steps, from which it differs in
    nothing but its bounds."""
    ours, theirs, growth = LossScale(), torch.tensor(FIRST), torch.zeros((), dtype=torch.int32)
    history = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < torch.linspace(2e-2, 1e-5, 20_000)
    seen = set()
    for overflow in history.float():
        torch._amp_update_scale_(theirs, growth, overflow, 2.0, 0.5, GROWTH_INTERVAL)
        theirs.clamp_(LEAST, MOST)
        ours.update(overflow, NO)
        assert ours.scale == theirs and ours.good_steps == growth
        seen.add(float(ours.scale))
    assert {LEAST, 4.0, 64.0} <= seen and history.sum() > 50


def test_a_run_that_stopped_keeps_its_scale() -> None:
    scale = LossScale()
    scale.update(YES, YES)
    assert scale.scale == FIRST and scale.good_steps == 0


def test_gradients_are_unscaled_exactly() -> None:
    scale, parameter, idle = LossScale(), nn.Parameter(torch.randn(50)), nn.Parameter(torch.ones(2))
    gradient = torch.randn(50)
    parameter.grad = gradient * scale.scale
    scale.unscale([parameter, idle])
    assert torch.equal(parameter.grad, gradient) and idle.grad is None


@pytest.mark.parametrize(
    ("loss", "bad", "scale", "skipped"),
    [(1.0, 1, FIRST, 1), (1.0, 0, FIRST, 0), (float("nan"), 1, FIRST, 0), (1.0, 1, LEAST, 0), (float("inf"), 1, 8, 0)],
)
def test_an_overflow_is_a_finite_loss_whose_gradient_can_be_scaled_less(
    loss: float, bad: int, scale: float, skipped: int
) -> None:
    scaling = LossScale()
    scaling.scale.fill_(scale)
    assert scaling.overflowed(torch.tensor(loss), torch.tensor(float(bad))) == skipped


def test_saved_tensors_fit_a_learner_of_another_precision() -> None:
    scale = LossScale()
    plain, saved = {"center": NO}, {"center": NO, "loss_scale.scale": torch.tensor(8.0), "loss_scale.good_steps": NO}
    assert fitted(saved, None) == plain == fitted(plain, None)
    assert fitted(plain, scale)["loss_scale.scale"] == FIRST
    assert fitted(saved, scale) == saved


def made(tiny: Make) -> tuple[Learner, Stepper, list[Tensor]]:
    run = resolve(tiny("train.batch_size=4", "head.batch_norm=false", "backbone.drop_path=0"), 40)[0]
    learner = build_dino_learner(run)
    learner.loss_scale = LossScale()
    views = [torch.randn((2, 4, 3, side, side), generator=torch.Generator().manual_seed(side)) for side in (32, 16)]
    autocast = device.choose("cpu", "fp16", 24).autocast
    return learner, Stepper(learner, adamw(learner.student), 3.0, autocast), views


def settled(stepper: Stepper, views: list[Tensor]) -> float:
    """The first scale at which a step is not skipped."""
    for _ in range(17):
        numbers = stepper(views, VALUES).report.read()
        assert numbers.finite
        if not numbers.skipped:
            return numbers.loss_scale
    raise AssertionError("every step was skipped")


def weights(learner: Learner, stepper: Stepper) -> dict[str, Tensor]:
    found = {name: t.clone() for name, t in learner.state_dict().items() if not name.startswith("loss_scale")}
    for number, state in enumerate(stepper.optimizer.state.values()):
        found |= {f"{number} {name}": tensor.clone() for name, tensor in state.items()}
    return found


def test_an_overflow_skips_a_step_halves_the_scale_and_the_next_step_trains(
    tiny: Make, fp16: None, same_bits: Callable[..., None]
) -> None:
    learner, stepper, views = made(tiny)
    assert learner.loss_scale is not None
    scale = settled(stepper, views)
    before = weights(learner, stepper)
    overflow = stepper.parameters[3].register_hook(lambda grad: grad * float("inf"))
    numbers = stepper(views, VALUES).report.read()
    overflow.remove()
    assert numbers.skipped and numbers.finite and "grad_norm" not in numbers.metrics()
    after = weights(learner, stepper)
    assert len(before) > 100
    same_bits(before, after)
    assert learner.loss_scale.scale == scale / 2 == numbers.loss_scale and learner.loss_scale.good_steps == 0
    numbers = stepper(views, VALUES).report.read()
    assert not numbers.skipped and numbers.finite and numbers.grad_norm > 0
    trained = weights(learner, stepper)
    moved = [name for name in trained if not torch.equal(trained[name], after[name])]
    assert len(moved) > 100 and "loss.center" in moved


def test_the_gradient_does_not_depend_on_the_scale(tiny: Make, fp16: None) -> None:
    norms, (_, stepper, views) = [], made(tiny)
    highest = settled(stepper, views)
    for scale in (highest / 2, highest / 8):
        learner, stepper, views = made(tiny)
        assert learner.loss_scale is not None
        learner.loss_scale.scale.fill_(scale)
        norms.append(stepper(views, VALUES).report.read().grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2) and norms[0] > 0


def test_a_gradient_that_no_scale_mends_ends_the_run(tiny: Make, fp16: None) -> None:
    learner, stepper, views = made(tiny)
    assert learner.loss_scale is not None
    stepper.parameters[3].register_hook(lambda grad: grad * float("inf"))
    learner.loss_scale.scale.fill_(4.0)
    found = [stepper(views, VALUES).report.read() for _ in range(4)]
    assert [numbers.skipped for numbers in found[:2]] == [True, True]
    assert [numbers.finite for numbers in found] == [True, True, False, False]
    assert [numbers.loss_scale for numbers in found] == [2, 1, 1, 1]


def test_a_loss_that_is_not_finite_is_no_overflow(tiny: Make, fp16: None) -> None:
    learner, stepper, views = made(tiny)
    views[0][0, 1, 0, 3, 3] = float("nan")
    numbers = stepper(views, VALUES).report.read()
    assert not numbers.skipped and not numbers.finite
    assert learner.loss_scale is not None and learner.loss_scale.scale == FIRST


def test_a_run_in_fp16_is_continued_to_the_bit_with_its_scale(
    tiny: Make, images: ArraySource, fp16: None, quiet: Console, same_runs: Callable[[Path, Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The scale grows with every second good step, until it is too high and a step is skipped."""
    monkeypatch.setattr("nearfar.ssl.learning.loss_scale.GROWTH_INTERVAL", 2)
    monkeypatch.setattr("nearfar.ssl.learning.loss_scale.FIRST", 2.0**8)
    whole, parts = tiny("train.precision=fp16", folder="whole"), tiny("train.precision=fp16", folder="parts")
    train.pretrain(whole, images, console=quiet)
    for stop in (2, 9, 13):
        done = checkpoint.latest(parts.path / "checkpoints")
        polls = iter(range(1 + (done.state["step"] if done else 0), 21))
        train.pretrain(parts, images, should_stop=lambda k=polls, s=stop: next(k) == s, console=quiet)
    assert train.pretrain(parts, images, console=quiet).finished
    same_runs(whole.path, parts.path, 20)
    lines = [line for line in read_metrics(whole.path / "metrics.jsonl") if "loss" in line]
    scales = [line["loss_scale"] for line in lines]
    halved = [two < one for one, two in itertools.pairwise([2.0**8, *scales])]
    assert any(halved) and any(two > one for one, two in itertools.pairwise(scales))
    assert ["grad_norm" not in line for line in lines] == halved
    log = (whole.path / "run.log").read_text()
    assert "was skipped: its gradient overflowed in fp16" in log and "fp16 autocast" in log
    saved = checkpoint.latest(whole.path / "checkpoints")
    assert saved is not None and saved.tensors["learner/loss_scale.scale"] == scales[-1]
    assert not any("loss_scale" in name for name in checkpoint.load(whole.path).state_dict())


def test_the_message_at_the_end_says_that_no_scale_helped(
    tiny: Make, images: ArraySource, fp16: None, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfar.ssl.learning.loss_scale.FIRST", 1.0)
    monkeypatch.setattr(DINOLearner, "freeze_prototypes", lambda self, _: _poison(self))
    with pytest.raises(UserError, match=r"fp16, with the loss scaled by 1\).*train\.precision=fp32"):
        train.pretrain(tiny("train.precision=fp16"), images, console=quiet)


def _poison(learner: Learner) -> None:
    next(learner.student.parameters()).register_hook(lambda grad: grad * float("inf"))
