"""What changes from step to step, against closed forms and DINO's own arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.ssl import config
from nearfar.ssl.learning.schedule import Schedule, cosine, linear, warmup_cosine, warmup_stable_decay
from nearfar.ssl.settings.defaults import resolve

EPOCHS, PER_EPOCH = 20, 13
STEPS = EPOCHS * PER_EPOCH


def dinos_cosine(base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: int = 0) -> np.ndarray:
    """A value at every step, as DINO makes it: numpy's linspace from 0, then half a cosine over what is left."""
    warmup = np.linspace(0, base, warmup_epochs * per_epoch) if warmup_epochs else np.empty(0)
    left = np.arange(epochs * per_epoch - len(warmup))
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))])


def dinos_temperature(start: float, end: float, epochs: int, warmup_epochs: int) -> np.ndarray:
    """A value at every epoch."""
    return np.concatenate([np.linspace(start, end, warmup_epochs), np.full(epochs - warmup_epochs, end)])


def made(per_epoch: int, *settings: str) -> Schedule:
    return Schedule(resolve(config.load(None, list(settings)), 2_000)[0], per_epoch)


@pytest.fixture
def schedule() -> Schedule:
    return made(
        PER_EPOCH,
        f"train.epochs={EPOCHS}",
        "optim.lr=2e-3",
        "optim.min_lr=1e-6",
        "optim.warmup_epochs=2",
        "optim.teacher_momentum=0.996",
        "optim.teacher_momentum_end=1",
        "loss.teacher_temp=0.07",
        "loss.warmup_teacher_temp_epochs=5",
        "optim.freeze_last_layer_epochs=1.5",
    )


def column(schedule: Schedule, key: str) -> np.ndarray:
    return np.array([schedule.at(step)[key] for step in range(schedule.steps)])


@pytest.mark.parametrize("per_epoch", [1, 2, 13])
@pytest.mark.parametrize(
    ("epochs", "warmup", "temp", "frozen"), [(1, 0, 0, 0), (2, 1, 1, 1), (3, 0, 2, 1), (20, 2, 5, 1), (100, 10, 30, 3)]
)
def test_every_step_has_the_values_of_dinos_arrays(
    per_epoch: int, epochs: int, warmup: int, temp: int, frozen: int
) -> None:
    schedule = made(
        per_epoch,
        f"train.epochs={epochs}",
        "optim.lr=5e-4",
        f"optim.warmup_epochs={warmup}",
        "optim.teacher_momentum=0.996",
        "optim.teacher_momentum_end=1",
        "loss.teacher_temp=0.07",
        f"loss.warmup_teacher_temp_epochs={temp}",
        f"optim.freeze_last_layer_epochs={frozen}",
    )
    expected = {
        "lr": dinos_cosine(5e-4, 1e-6, epochs, per_epoch, warmup),
        "weight_decay": dinos_cosine(0.04, 0.4, epochs, per_epoch),
        "teacher_momentum": dinos_cosine(0.996, 1, epochs, per_epoch),
        "teacher_temp": dinos_temperature(0.04, 0.07, epochs, temp).repeat(per_epoch),
    }
    for key, values in expected.items():
        np.testing.assert_allclose(column(schedule, key), values, rtol=1e-14, atol=1e-18, err_msg=key)
    held = [schedule.prototypes_frozen(step) for step in range(schedule.steps)]
    assert held == [step // per_epoch < frozen for step in range(schedule.steps)]


def test_the_ends_are_where_they_are_in_dino(schedule: Schedule) -> None:
    lr, temp, warm = column(schedule, "lr"), column(schedule, "teacher_temp"), 2 * PER_EPOCH
    assert lr[0] == 0 and lr[warm - 1] == lr[warm] == lr.max() == 2e-3 and 1e-6 < lr[-1] < 2e-6
    assert 0.39 < column(schedule, "weight_decay")[-1] < 0.4 and 0.9999 < column(schedule, "teacher_momentum")[-1] < 1
    assert temp[0] == temp[PER_EPOCH - 1] == 0.04 < temp[PER_EPOCH] and (temp[4 * PER_EPOCH :] == 0.07).all()


def test_fractional_epochs_are_whole_steps_of_the_rate_and_whole_epochs_of_the_temperature() -> None:
    fractions = ["train.epochs=4", "optim.lr=1", "optim.warmup_epochs=0.4", "loss.teacher_temp=0.07"]
    schedule = made(PER_EPOCH, *fractions, "loss.warmup_teacher_temp_epochs=1.2", "optim.freeze_last_layer_epochs=0.2")
    lr, temp = column(schedule, "lr"), column(schedule, "teacher_temp")
    np.testing.assert_allclose(lr[:6], [0, 0.25, 0.5, 0.75, 1, 1])  # .4 epochs of 13 steps: 5
    np.testing.assert_allclose(temp[::PER_EPOCH], [0.04, 0.07, 0.07, 0.07])  # as two epochs of warm-up
    assert [schedule.prototypes_frozen(step) for step in range(4)] == [True, True, True, False]


def test_a_teacher_temperature_below_the_start_is_constant() -> None:
    run = resolve(config.load(None, ["loss.teacher_temp=0.03"]), 2_000)[0]
    assert {Schedule(run, PER_EPOCH).at(step)["teacher_temp"] for step in (0, 50, 1000)} == {0.03}


def test_prototypes_are_frozen_for_the_first_steps_only(schedule: Schedule) -> None:
    frozen = [schedule.prototypes_frozen(step) for step in range(STEPS)]
    count = round(1.5 * PER_EPOCH)
    assert frozen == [True] * count + [False] * (STEPS - count)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert warmup_cosine(1.0, 0.0, 0, 10, 0) == 1.0
    assert linear(0.04, 0.07, 0, 0) == 0.07


def test_a_warm_up_of_one_place_is_at_its_start_as_in_numpys_linspace() -> None:
    assert warmup_cosine(1.0, 0.0, 0, 10, 1) == 0.0 and warmup_cosine(1.0, 0.0, 1, 10, 1) == 1.0
    assert linear(0.04, 0.07, 0, 1) == 0.04 and linear(0.04, 0.07, 1, 1) == 0.07


@given(
    peak=st.floats(1e-4, 1), end=st.floats(0, 1e-4), steps=st.integers(1, 300), share=st.floats(0, 1), data=st.data()
)
def test_every_value_stays_between_its_ends(
    peak: float, end: float, steps: int, share: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    warmup = round(share * steps)
    lr = warmup_cosine(peak, end, step, steps, warmup)
    assert math.isfinite(lr) and (0 if step < warmup else end) - 1e-12 <= lr <= peak + 1e-12
    assert min(peak, end) - 1e-12 <= cosine(peak, end, step, steps) <= max(peak, end) + 1e-12


def test_the_whole_run_is_known_beforehand(schedule: Schedule) -> None:
    assert schedule.steps == STEPS
    assert schedule.at(77) == Schedule(schedule.run, PER_EPOCH).at(77)


def scheduled(*settings: str) -> Schedule:
    fixed = [f"train.epochs={EPOCHS}", "optim.lr=2e-3", "optim.warmup_epochs=2", "optim.min_lr=1e-6"]
    return Schedule(resolve(config.load(None, [*fixed, *settings]), 2_000)[0], PER_EPOCH)


def test_constant_stays_where_the_warm_up_ends() -> None:
    plain = scheduled("optim.schedule=constant", "optim.teacher_momentum=0.99")
    lr, warm = column(plain, "lr"), 2 * PER_EPOCH
    np.testing.assert_allclose(lr[:warm], np.linspace(0, 2e-3, warm), rtol=1e-12)
    assert (lr[warm:] == 2e-3).all()
    assert set(column(plain, "teacher_momentum")) == {0.99} and set(column(plain, "weight_decay")) == {0.04}


def test_warmup_stable_decay_falls_in_a_line_at_the_end() -> None:
    plain = scheduled("optim.schedule=wsd", "optim.cooldown_epochs=4", "optim.teacher_momentum=0.99")
    lr, decay = column(plain, "lr"), 4 * PER_EPOCH
    same = column(scheduled("optim.schedule=constant"), "lr")
    assert (lr[:-decay] == same[:-decay]).all()
    np.testing.assert_allclose(lr[-decay:], np.linspace(2e-3, 1e-6, decay + 1)[:-1], rtol=1e-9)
    assert set(column(plain, "teacher_momentum")) == {0.99}
    assert scheduled("optim.schedule=wsd").run.optim.cooldown_epochs == 0.2 * EPOCHS
    assert warmup_stable_decay(1.0, 0.0, 0, 10, 1, 3) == 0.0  # as every warm-up of a single step


def test_gram_anchoring_starts_late_and_takes_one_teacher() -> None:
    plain = scheduled("loss.gram_weight=2", "loss.gram_start_epoch=16", "loss.gram_teacher_epoch=10.5")
    weights = column(plain, "gram_weight")
    assert not weights[: 16 * PER_EPOCH].any() and (weights[16 * PER_EPOCH :] == 2).all()
    assert [step for step in range(plain.steps) if plain.takes_anchor(step)] == [round(10.5 * PER_EPOCH)]
    default = scheduled("loss.gram_weight=2")
    assert [step for step in range(default.steps) if default.takes_anchor(step)] == [16 * PER_EPOCH]
    file = scheduled("loss.gram_weight=2", "loss.gram_teacher=some.pth")
    assert not any(file.takes_anchor(step) for step in range(file.steps))
    assert "gram_weight" not in scheduled().at(0) and not scheduled().takes_anchor(0)
