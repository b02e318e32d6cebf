"""Segmentation probe: scores against brute force, masks at their own size, and a problem that it must solve."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from nearfar.eval.segmentation import ProbeTraining, iou_scores, pixel_confusion, resized_mask, segment_probe
from nearfar.ssl.errors import UserError

label = st.sampled_from([0, 1, 2, 3, 255])


@settings(max_examples=60, deadline=None)
@given(truth=arrays(np.uint8, (5, 7), elements=label), predicted=arrays(np.int64, (5, 7), elements=st.integers(0, 3)))
def test_scores_are_set_intersections_over_unions(truth: NDArray[Any], predicted: NDArray[Any]) -> None:
    table = pixel_confusion(predicted, truth, 4)
    if (truth == 255).all():
        with pytest.raises(UserError, match="nothing to score"):
            iou_scores(table)
        return
    pixels = [(r, c) for r in range(5) for c in range(7) if truth[r, c] != 255]
    iou = []
    for k in range(4):
        is_true = {p for p in pixels if truth[p] == k}
        is_predicted = {p for p in pixels if predicted[p] == k}
        iou.append(100 * len(is_true & is_predicted) / len(is_true | is_predicted) if is_true | is_predicted else None)
    got = iou_scores(table)
    assert got["per_class"] == pytest.approx(iou)
    assert got["miou"] == pytest.approx(np.mean([v for v in iou if v is not None]))
    assert got["pixel_accuracy"] == pytest.approx(100 * np.mean([truth[p] == predicted[p] for p in pixels]))


def test_one_matrix_over_the_set_is_not_the_mean_over_images() -> None:
    truth = np.array([[0, 0, 0, 0]]), np.array([[0, 1, 1, 1]])
    predicted = np.array([[0, 0, 0, 1]]), np.array([[0, 1, 1, 1]])
    table = sum(pixel_confusion(s, t, 2) for s, t in zip(predicted, truth, strict=True))
    assert iou_scores(table)["per_class"] == pytest.approx([100 * 4 / 5, 100 * 3 / 4])


@settings(max_examples=40, deadline=None)
@given(new=st.tuples(st.integers(1, 30), st.integers(1, 30)), old=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_nearest_takes_the_class_at_each_pixels_center(new: tuple[int, int], old: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 256, old, dtype=np.uint8)
    got = resized_mask(mask, new)
    for r in range(new[0]):
        for c in range(new[1]):
            center = [Fraction(2 * i + 1, 2 * n) * o for i, n, o in zip((r, c), new, old, strict=True)]
            assert got[r, c] == mask[int(center[0]), int(center[1])]


def test_nearest_agrees_with_pillow() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (360, 480), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(mask).resize((120, 88), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(resized_mask(mask, (88, 120)), theirs)


def stripes(n: int, seed: int, h: int = 4, w: int = 6, scale: int = 8) -> tuple[NDArray[Any], NDArray[Any]]:
    """Class of a patch = argmax of its first three channels; masks at `scale` pixels a patch, 255 in a corner."""
    x = np.random.default_rng(seed).normal(size=(n, h, w, 5)).astype(np.float32)
    x[..., :3] *= 4
    masks = x[..., :3].argmax(-1).repeat(scale, 1).repeat(scale, 2).astype(np.uint8)
    masks[:, :3, :3] = 255
    return x * [1, 30, 1, 1, 0] + [0, 5, 0, 100, 7], masks


def test_one_step_is_enough_to_run() -> None:
    assert segment_probe(stripes(4, 0), stripes(2, 1), 3, ProbeTraining(steps=1))["steps"] == 1


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_learns_what_patches_say(head: str) -> None:
    a, ma = stripes(96, 0)
    b, mb = stripes(24, 1)
    result = segment_probe((a, ma), (b, mb), 3, ProbeTraining(head, steps=100, lr=1e-2))
    assert result["miou"] > 45  # chance is 20; the borders between patches stay blurred by the upsampling
    assert len(result["per_class"]) == 3


def test_ignored_pixels_matter_neither_in_training_nor_score() -> None:
    a, ma = stripes(20, 0)
    b, mb = stripes(8, 1)
    other_a, other_b = ma.copy(), mb.copy()
    plain = segment_probe((a, ma), (b, mb), 3, ProbeTraining(steps=10))
    # the pixels under 255 had some class: whatever it was cannot be seen; make more of them ignored by class 9
    other_a[ma == 255] = 254
    other_b[mb == 255] = 254
    assert segment_probe((a, other_a), (b, other_b), 3, ProbeTraining(steps=10, ignore=254)) == plain


def test_batches_of_ignored_pixels_only_do_not_keep_the_others_from_being_learned() -> None:
    a, ma = stripes(8, 0)
    b, mb = stripes(4, 1)
    ma[:4] = 255
    result = segment_probe((a, ma), (b, mb), 3, ProbeTraining(steps=200, batch_size=1, lr=1e-2))
    assert result["miou"] > 45  # as above; half of the steps see nothing


def test_masks_are_scored_at_their_own_size() -> None:
    a, ma = stripes(20, 0)
    b, mb = stripes(6, 1)
    whole = segment_probe((a, ma), (b, mb), 3, ProbeTraining(steps=20))
    sizes = [m if i % 2 else m.repeat(2, 0).repeat(2, 1) for i, m in enumerate(mb)]
    mixed = segment_probe((a, ma), (b, sizes), 3, ProbeTraining(steps=20))
    assert mixed["miou"] != whole["miou"]
    assert mixed["miou"] == pytest.approx(whole["miou"], abs=3)


def test_same_seed_same_answer_and_no_global_state() -> None:
    data = stripes(20, 0), stripes(6, 1), 3
    before = torch.random.get_rng_state()
    one = segment_probe(*data, ProbeTraining("mlp", steps=5, seed=1))
    assert one == segment_probe(*data, ProbeTraining("mlp", steps=5, seed=1))
    assert one != segment_probe(*data, ProbeTraining("mlp", steps=5, seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unusable_input_is_explained() -> None:
    a, ma = stripes(6, 0)
    with pytest.raises(UserError, match=r"class 2 in mask 0, but there are only 2 classes"):
        segment_probe((a, ma), (a, ma), 2)
    with pytest.raises(UserError, match=r"6, 4, 6, 5.*5 masks"):
        segment_probe((a, ma[:5]), (a, ma), 3)
    broken = a.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        segment_probe((a, ma), (broken, ma), 3)
    with pytest.raises(UserError, match="at least one step"):
        segment_probe((a, ma), (a, ma), 3, ProbeTraining(steps=0))
    with pytest.raises(UserError, match="linear"):
        segment_probe((a, ma), (a, ma), 3, ProbeTraining("conv"))
