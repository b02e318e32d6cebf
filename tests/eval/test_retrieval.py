"""Dense retrieval against brute force, one patch and one pixel at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from nearfar.eval import retrieval as module
from nearfar.eval.retrieval import class_counts, fill_memory, retrieve
from nearfar.ssl.errors import UserError

CLASSES = 5


def scenes(
    n: int, seed: int, h: int = 4, w: int = 5, dim: int = 6, side: tuple[int, int] = (16, 20)
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Grids whose patches look like the class under them, and masks of blocks with some pixels ignored."""
    rng = np.random.default_rng(seed)
    looks = np.random.default_rng(0).normal(size=(CLASSES, dim))
    kinds = rng.integers(0, CLASSES, (n, h, w))
    grid = (looks[kinds] + 0.9 * rng.normal(size=(n, h, w, dim))).astype(np.float32)
    masks = kinds.repeat(side[0] // h, 1).repeat(side[1] // w, 2).astype(np.uint8)
    noise = rng.random(masks.shape)
    masks[noise < 0.1] = 0
    masks[noise > 0.85] = 255
    masks[0, :8, :8] = 255  # whole patches ignored
    return grid, masks


def brute_force(
    train_grid: NDArray[Any],
    train_masks: NDArray[Any],
    test_grid: NDArray[Any],
    test_masks: NDArray[Any],
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """Every labeled training patch in the memory; loops over patches and pixels, float64."""
    vectors, counts = [], []
    size = train_masks.shape[1] // train_grid.shape[1]
    for grid, mask in zip(train_grid.astype(np.float64), train_masks, strict=True):
        for r in range(grid.shape[0]):
            for c in range(grid.shape[1]):
                pixels = mask[r * size : (r + 1) * size, c * size : (c + 1) * size].ravel()
                pixels = pixels[pixels != 255]
                if len(pixels):
                    vectors.append(grid[r, c] / np.linalg.norm(grid[r, c]))
                    counts.append(np.bincount(pixels, minlength=CLASSES) / len(pixels))
    x, labels = np.array(vectors), np.array(counts)
    table = np.zeros((CLASSES, CLASSES), int)
    for grid, mask in zip(test_grid.astype(np.float64), test_masks, strict=True):
        soft = np.zeros((*grid.shape[:2], CLASSES))
        for r, c in np.ndindex(*grid.shape[:2]):
            cosine = x @ (grid[r, c] / np.linalg.norm(grid[r, c]))
            near = np.argsort(-cosine, kind="stable")[:k]
            weight = np.exp((cosine[near] - cosine[near[0]]) / temperature)
            soft[r, c] = (weight / weight.sum()) @ labels[near]
        up = F.interpolate(torch.from_numpy(soft).permute(2, 0, 1)[None], mask.shape, mode="bilinear")[0].argmax(0)
        for r, c in np.ndindex(*mask.shape):
            if mask[r, c] != 255:
                table[mask[r, c], int(up[r, c])] += 1
    hit, union = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    return 100 * np.mean(hit[union > 0] / union[union > 0]), 100 * hit.sum() / table.sum()


def test_agrees_with_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMAGES", 2)
    data = *scenes(6, 1), *scenes(3, 2)
    result = retrieve(*data, classes=CLASSES, memory=10_000, k=7, temperature=0.1)
    miou, accuracy = brute_force(*data, k=7, temperature=0.1)
    assert result["miou"] == pytest.approx(miou, abs=0.3)  # a pixel that float32 cannot tell apart
    assert result["pixel_accuracy"] == pytest.approx(accuracy, abs=0.2)
    assert result["memory"] == 6 * 20 - 4


def test_the_score_does_not_see_what_lies_under_ignored_pixels() -> None:
    data = *scenes(4, 1), *scenes(2, 2)
    base = retrieve(*data, classes=CLASSES, memory=10_000, k=5)
    data[0][0, 0, 0] = 100 * data[2][0, 0, 0]  # the training patch under ignored pixels alone: in no memory
    assert retrieve(*data, classes=CLASSES, memory=10_000, k=5) == base


@pytest.mark.parametrize("size", [(16, 20), (17, 23), (3, 4), (4, 5)])
def test_class_counts_add_up_to_the_pixels(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, CLASSES, size).astype(np.uint8)
    mask[0, :2] = 255
    counts = class_counts(mask, (4, 5), CLASSES)
    expected = np.bincount(mask[mask != 255], minlength=CLASSES)
    np.testing.assert_allclose(counts.sum((0, 1)).numpy(), expected, atol=1e-9)
    if size == (16, 20):
        block = mask[4:8, 8:12]
        assert counts[1, 2].tolist() == np.bincount(block[block != 255], minlength=256)[:CLASSES].tolist()


def test_memory_is_bounded_and_shared_among_images() -> None:
    grid, masks = scenes(10, 3)
    for size, kept in ((60, 60), (55, 50), (10, 10), (4, 4), (1, 1)):
        x, labels = fill_memory(grid, masks, classes=CLASSES, size=size, seed=0)
        assert len(x) == len(labels) == kept
        torch.testing.assert_close(labels.sum(1), torch.ones(kept))


def test_rare_classes_come_into_the_memory_first() -> None:
    grid = np.random.default_rng(0).normal(size=(1, 8, 8, 3))
    mask = np.zeros((1, 8, 8), dtype=np.uint8)
    mask[0, 2, 3] = 4  # one patch of 64
    taken = [fill_memory(grid, mask, classes=CLASSES, size=8, seed=s)[1][:, 4].sum() > 0 for s in range(40)]
    assert np.mean(taken) > 0.9  # 1 in 8 if patches were drawn evenly


def test_same_seed_same_answer_and_another_draw_with_another() -> None:
    data = *scenes(6, 1), *scenes(2, 2)
    small = {"classes": CLASSES, "memory": 12, "k": 3}
    assert retrieve(*data, **small) == retrieve(*data, **small)
    draws = [fill_memory(*data[:2], classes=CLASSES, size=12, seed=seed)[0] for seed in (0, 1)]
    assert not np.array_equal(*draws)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, ma, b, mb: (a, ma[:1], b, mb), "as many masks"),
        (lambda a, ma, b, mb: (a, ma + 5, b, mb), "only 5 classes"),
        (lambda a, ma, b, mb: (a, ma * 0 + 255, b, mb), "nothing to put into the memory"),
        (lambda a, ma, b, mb: (a, ma, b, mb * 0 + 255), "nothing to score"),
        (lambda a, ma, b, mb: (a, ma, b[..., 1:], mb), "6 dimensions"),
        (lambda a, ma, b, mb: (a * np.nan, ma, b, mb), "not finite"),
    ],
)
def test_unusable_input_is_explained(change: Callable[..., Any], message: str) -> None:
    grid, masks = scenes(2, 1)
    masks[masks == 255] = 0
    with pytest.raises(UserError, match=message):
        retrieve(*change(grid, masks, *scenes(2, 2)), classes=CLASSES, k=3)


def test_a_memory_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        retrieve(*scenes(2, 1), *scenes(2, 2), classes=CLASSES, memory=0)
