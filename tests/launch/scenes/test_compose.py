"""The demo's scenes: seeded, readable, disjoint, and not to be solved by nearest pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from nearfar.launch.scenes.compose import CLASSES, Scenes, make_scenes
from nearfar.launch.scenes.style import Style

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def train() -> Scenes:
    return make_scenes(1500, seed=0)


@pytest.fixture(scope="module")
def val() -> Scenes:
    return make_scenes(400, seed=0, split="val")


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    side = images.shape[1] // 16
    small = images.reshape(len(images), 16, side, 16, side, 3).mean((2, 4)).reshape(len(images), -1)
    return small / np.linalg.norm(small, axis=1, keepdims=True)


def test_shapes_types_and_values(train: Scenes) -> None:
    assert train.images.shape == (1500, 64, 64, 3)
    assert train.images.dtype == np.uint8
    assert train.labels.shape == (1500,)
    assert train.labels.dtype == np.int64
    assert train.masks.shape == (1500, 64, 64)
    assert train.masks.dtype == np.uint8
    assert len(CLASSES) == 11
    assert np.bincount(train.labels).tolist() == [150] * 10


def test_a_mask_holds_the_digit_plus_one_and_background(train: Scenes) -> None:
    for label, mask in zip(train.labels, train.masks, strict=True):
        assert set(np.unique(mask)) == {0, label + 1}


def test_the_seed_decides_everything() -> None:
    one, same, other = make_scenes(60, 7), make_scenes(60, 7), make_scenes(60, 8)
    val = make_scenes(60, 7, "val")
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.images, other.images)
    assert not np.array_equal(one.images, val.images)


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    make_scenes(10, 0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_ink_and_surroundings_never_share_a_luminance() -> None:
    """By construction, whatever the hues; shown without clutter, pixel noise and the blended edge."""
    drawn = make_scenes(600, 3, style=Style(clutter=0, noise=0.0))
    light = drawn.images @ LUMA / 255
    kept = 0
    for values, mask in zip(light, drawn.masks > 0, strict=True):
        inner = erode(mask)
        outer = erode(~mask)
        if inner.sum() < 8:
            continue
        kept += 1
        gap = max(
            values[inner].min() - values[outer].max(),
            values[outer].min() - values[inner].max(),
        )
        assert gap > 0.1
    assert kept > 550


def erode(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose 5x5 neighborhood lies in the mask (the frame's outside counts as in)."""
    padded = np.pad(mask, 2, constant_values=True)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    return np.asarray(windows.all((2, 3)))


def test_no_digit_is_cut_off_or_of_another_size(train: Scenes) -> None:
    inked = train.masks > 0
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert inked[:, border].any(1).mean() < 0.02
    rows = inked.any(2)
    heights = (64 - rows.argmax(1) - rows[:, ::-1].argmax(1)) / 64
    low, middle, high = np.percentile(heights, [2, 50, 98])
    assert low > 0.5  # turning and the soft threshold move the outline a little
    assert 0.6 < middle < 0.75
    assert high < 0.9


@settings(max_examples=25, deadline=None)
@given(low=st.floats(0.3, 0.6), seed=st.integers(0, 1000))
def test_the_height_asked_for_is_the_height_drawn(low: float, seed: int) -> None:
    drawn = make_scenes(20, seed, size=96, style=Style(digit_height=(low, low), rotation=0, shear=0))
    rows = (drawn.masks > 0).any(2)
    heights = (96 - rows.argmax(1) - rows[:, ::-1].argmax(1)) / 96
    assert np.abs(heights - low).max() < 0.12


def test_light_and_dark_ink_come_as_asked() -> None:
    def light_share(polarity: float) -> float:
        drawn = make_scenes(200, 5, style=Style(polarity=polarity, clutter=0))
        light, ink = drawn.images @ LUMA, drawn.masks > 0
        inside = (light * ink).sum((1, 2)) / ink.sum((1, 2))
        outside = (light * ~ink).sum((1, 2)) / (~ink).sum((1, 2))
        return float((inside > outside).mean())

    assert light_share(0.0) == 0.0
    assert light_share(1.0) == 1.0
    assert 0.35 < light_share(0.5) < 0.65


def test_color_zero_is_gray() -> None:
    images = make_scenes(20, 0, style=Style(color=0.0, noise=0.0)).images.astype(int)
    assert np.ptp(images, axis=-1).max() <= 1


def test_color_polarity_and_brightness_do_not_tell_the_class(train: Scenes, val: Scenes) -> None:
    """A classifier on the color statistics of a scene stays near the 10 % of a guess."""

    def statistics(drawn: Scenes) -> NDArray[np.float64]:
        return np.concatenate([drawn.images.mean((1, 2)), drawn.images.std((1, 2))], 1) / 255

    guess = LogisticRegression(max_iter=500).fit(statistics(train), train.labels)
    assert guess.score(statistics(val), val.labels) < 0.2


def test_nearest_pixels_do_not_solve_it_but_the_digits_are_there(train: Scenes, val: Scenes) -> None:
    neighbors = KNeighborsClassifier(10, weights="distance")
    raw = neighbors.fit(thumbnails(train.images), train.labels).score(thumbnails(val.images), val.labels)
    assert 0.15 < raw < 0.5
    # The label is in the shape: cut out and centered, the same neighbors read it.
    shapes = neighbors.fit(centered(train), train.labels).score(centered(val), val.labels)
    assert shapes > 0.85


def centered(drawn: Scenes) -> NDArray[np.float64]:
    """The digit's bounding box, as 12x12 samples."""
    boxes = []
    for mask in drawn.masks > 0:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y = np.linspace(rows[0], rows[-1], 12).round().astype(int)
        x = np.linspace(columns[0], columns[-1], 12).round().astype(int)
        boxes.append(mask[np.ix_(y, x)].ravel())
    return np.array(boxes, float)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"size": 8},
        {"split": "test"},
        {"digit_height": (0.8, 0.5)},
        {"digit_height": (0.5, 1.5)},
        {"contrast": (0.0, 0.5)},
        {"polarity": 2.0},
        {"texture": -1.0},
        {"backgrounds": ("noise", "photographs")},
    ],
)
def test_impossible_wishes_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(ValueError, match=key):
        make_scenes(**({"n": 10, "seed": 0} | wrong)) if key in ("n", "size", "split") else Style(**wrong)
