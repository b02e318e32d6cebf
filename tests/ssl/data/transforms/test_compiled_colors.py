from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("numba")

from nearfar.ssl.data.transforms.colors import Color, color
from nearfar.ssl.data.transforms.compiled_crops import make_scratch, make_views, pitch

OFF = {"jitter": False, "factors": (1, 1, 1, 0), "order": (0, 1, 2, 3), "gray": False, "sigma": 0.0, "solarize": False}


def both(view: NDArray[Any], threshold: int = 128, **plan: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The view (3, s, s) colored here, and by colors.color (float, 0..255).

    Here by `make_views`, the one function that is ever compiled, whose crop is the whole image at its own size.
    """
    plan = {**OFF, **plan}
    size = view.shape[-1]
    factors, order = np.array(plan["factors"], np.float32), np.array(plan["order"], np.uint8)
    scratch, row, mine = make_scratch(size, size, size + 5), pitch(size), np.empty(view.size, np.uint8)
    rows = scratch.pixels.view(np.uint8)[: size * row].reshape(size, row)
    rows[:, : 3 * size] = view.transpose(1, 2, 0).reshape(size, 3 * size)
    make_views(
        tuple(scratch), size, size, np.array([[0, 0, size, size]], np.int32), np.array([False]), np.array([size]),
        np.array([0]), mine, True, np.array([plan["jitter"]]), factors[None], order[None], np.array([plan["gray"]]),
        np.array([plan["sigma"]], np.float32), np.array([plan["solarize"]]), threshold,
    )  # fmt: skip
    one = Color(
        torch.tensor([plan["jitter"]]), torch.from_numpy(factors)[None], torch.from_numpy(order)[None],
        torch.tensor([plan["gray"]]), torch.tensor([plan["sigma"]], dtype=torch.float32),
        torch.tensor([plan["solarize"]]), threshold,
    )  # fmt: skip
    return mine.reshape(view.shape), (color(torch.from_numpy(view)[None], one)[0] * 255).numpy()


def noise(size: int = 24, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (3, size, size), np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(4, 40), st.permutations(range(4)),
    st.tuples(st.floats(0.3, 1.7), st.floats(0.3, 1.7), st.floats(0.3, 1.7), st.floats(-0.5, 0.5)),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1, 0.7, 1.3, 2.0]),
)  # fmt: skip
def test_all_operations_agree_with_colors(
    seed: int,
    size: int,
    order: list[int],
    factors: tuple[float, float, float, float],
    jitter: bool,
    gray: bool,
    sigma: float,
) -> None:
    mine, expected = both(noise(size, seed), jitter=jitter, factors=factors, order=order, gray=gray, sigma=sigma)
    assert np.abs(mine - expected).max() < 0.51  # rounded to 8 bits, and nothing else


@pytest.mark.parametrize("threshold", [0, 1, 128, 200, 255, 256])
def test_solarize(threshold: int) -> None:
    view = noise()
    mine, expected = both(view, threshold, solarize=True)
    np.testing.assert_array_equal(mine, np.where(view >= threshold, 255 - view, view))
    assert np.abs(mine - expected).max() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.5, 2.0, 5.0])
def test_blur_equals_pillows_inside(sigma: float) -> None:
    from PIL import Image, ImageFilter

    view = noise(64)
    reach = 3 * (1 + int((np.sqrt(4 * sigma**2 + 1) - 1) / 2))
    theirs = Image.fromarray(view.transpose(1, 2, 0)).filter(ImageFilter.GaussianBlur(sigma))
    inside = slice(reach, -reach)  # borders are reflected here, and repeated there
    expected = np.asarray(theirs).transpose(2, 0, 1)[:, inside, inside].astype(float)
    mine = both(view, sigma=sigma)[0][:, inside, inside]
    assert expected.size > 500 and np.abs(mine - expected).max() <= 3  # Pillow rounds to 8 bits six times


def test_flat_colors_and_grays() -> None:
    for value in (0, 1, 128, 255):
        view = np.full((3, 8, 8), value, np.uint8)
        mine, expected = both(view, jitter=True, factors=(1.2, 0.7, 1.5, 0.3), sigma=1.0)
        assert np.abs(mine - expected).max() < 0.51


def test_nothing_to_do_changes_nothing() -> None:
    view = noise()
    np.testing.assert_array_equal(both(view)[0], view)
