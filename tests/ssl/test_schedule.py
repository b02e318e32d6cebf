"""What changes from step to step, against closed forms and DINO's own arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.ssl import config
from nearfar.ssl.defaults import resolve
from nearfar.ssl.schedule import Schedule, cosine, linear, warmup_cosine, warmup_stable_decay

EPOCHS, PER_EPOCH = 20, 13
STEPS = EPOCHS * PER_EPOCH


@pytest.fixture
def schedule() -> Schedule:
    settings = [
        f"train.epochs={EPOCHS}",
        "optim.lr=2e-3",
        "optim.min_lr=1e-6",
        "optim.warmup_epochs=2",
        "optim.teacher_momentum=0.996",
        "loss.teacher_temp=0.07",
        "loss.warmup_teacher_temp_epochs=5",
        "optim.freeze_last_layer_epochs=1.5",
    ]
    return Schedule(resolve(config.load(None, settings), 2_000)[0], PER_EPOCH)


def column(schedule: Schedule, key: str) -> np.ndarray:
    return np.array([schedule.at(step)[key] for step in range(schedule.steps)])


def test_learning_rate_warms_up_from_zero_and_ends_exactly_at_min_lr(schedule: Schedule) -> None:
    lr, warm = column(schedule, "lr"), 2 * PER_EPOCH
    np.testing.assert_allclose(lr[:warm], np.linspace(0, 2e-3, warm), rtol=1e-12)  # as DINO's cosine_scheduler
    t = np.arange(STEPS - warm) / (STEPS - warm - 1)
    np.testing.assert_allclose(lr[warm:], 1e-6 + (2e-3 - 1e-6) * (1 + np.cos(np.pi * t)) / 2, rtol=1e-9)
    assert lr[0] == 0 and lr[warm - 1] == lr[warm] == 2e-3 and lr[-1] == 1e-6
    assert lr.max() == 2e-3


def test_weight_decay_and_momentum_follow_half_a_cosine_to_their_ends(schedule: Schedule) -> None:
    t = np.arange(STEPS) / (STEPS - 1)
    wd, ema = column(schedule, "weight_decay"), column(schedule, "teacher_momentum")
    np.testing.assert_allclose(wd, 0.4 - 0.36 * (1 + np.cos(np.pi * t)) / 2, rtol=1e-12)
    np.testing.assert_allclose(ema, 1 - 0.004 * (1 + np.cos(np.pi * t)) / 2, rtol=1e-12)
    assert (wd[0], wd[-1]) == (pytest.approx(0.04), 0.4) and (ema[0], ema[-1]) == (pytest.approx(0.996), 1.0)


def test_teacher_temperature_rises_in_a_line_and_stays(schedule: Schedule) -> None:
    temp, warm = column(schedule, "teacher_temp"), 5 * PER_EPOCH
    np.testing.assert_allclose(temp[:warm], np.linspace(0.04, 0.07, warm), rtol=1e-12)
    assert (temp[warm - 1 :] == 0.07).all()


def test_a_teacher_temperature_below_the_start_is_constant() -> None:
    run = resolve(config.load(None, ["loss.teacher_temp=0.03"]), 2_000)[0]
    assert {Schedule(run, PER_EPOCH).at(step)["teacher_temp"] for step in (0, 50, 1000)} == {0.03}


def test_prototypes_are_frozen_for_the_first_steps_only(schedule: Schedule) -> None:
    frozen = [schedule.prototypes_frozen(step) for step in range(STEPS)]
    count = round(1.5 * PER_EPOCH)
    assert frozen == [True] * count + [False] * (STEPS - count)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert warmup_cosine(1.0, 0.0, 0, 10, 0) == 1.0
    assert warmup_cosine(1.0, 0.0, 0, 10, 1) == 1.0
    assert linear(0.04, 0.07, 0, 0) == 0.07


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
