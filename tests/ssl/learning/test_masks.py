"""Masks: as many hidden patches as asked for, in blocks, and the same whatever the ranks, the parts and the restart."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from nearfar.ssl.learning.masks import TRIES, BlockMasks, Masks, draw_block_masks, hidden_counts, most_hidden

CPU = torch.device("cpu")
WHOLE = BlockMasks(seed=3, share=0.5, ratios=(0.1, 0.5), grid=(14, 14), images=64)


def test_share_and_ratios_are_those_asked_for() -> None:
    """A quarter to three quarters of 64 steps: no luck decides, since views are spread evenly."""
    for step in range(8):
        counts = WHOLE.hidden(step).sum(2).reshape(-1)
        masked = counts[counts > 0]
        assert abs(len(masked) - 64) <= 2
        assert masked.min() >= int(0.1 * 196) and masked.max() <= 0.5 * 196
        assert abs(masked.mean() / 196 - 0.3) < 0.01
        parts = np.sort(masked)  # evenly over the whole range: every eighth of it has an eighth of the views
        assert np.histogram(parts, 8, (19.6, 98))[0].min() >= 6


@pytest.mark.parametrize(("share", "ratios"), [(1.0, (0.3, 0.3)), (0.25, (0.1, 1.0)), (0.5, (0.01, 0.02))])
def test_every_setting_holds_exactly(share: float, ratios: tuple[float, float]) -> None:
    masks = BlockMasks(0, share, ratios, (6, 4), 32)
    for step in range(20):
        counts = masks.hidden(step).sum(2).reshape(-1)
        masked = counts[counts > 0]
        assert abs(len(masked) - share * 64) <= 2
        assert masked.min() >= max(1, int(ratios[0] * 24)) and masked.max() <= max(1, ratios[1] * 24)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_hide_what_one_would(size: int) -> None:
    ranks = [dataclasses.replace(WHOLE, images=64 // size, rank=rank) for rank in range(size)]
    for step in (0, 7, 10**6):
        together = np.concatenate([rank.hidden(step) for rank in ranks])
        assert np.array_equal(together, WHOLE.hidden(step))


def test_parts_of_a_step_are_the_whole() -> None:
    (whole,), parts = WHOLE.of_step(5, CPU), WHOLE.of_step(5, CPU, 4)
    assert torch.equal(torch.cat([part.hidden for part in parts], 1), whole.hidden)
    assert len({len(part.rows) for part in parts}) == 1


def test_seed_step_and_place_make_other_masks_and_nothing_else_does() -> None:
    first = WHOLE.hidden(0)
    torch.rand(3), np.random.rand(3)  # the generators of the process have no say
    assert np.array_equal(WHOLE.hidden(0), first)
    assert not np.array_equal(WHOLE.hidden(1), first)
    assert not np.array_equal(dataclasses.replace(WHOLE, seed=4).hidden(0), first)
    big = dataclasses.replace(WHOLE, seed=3 + 2**32).hidden(0)
    assert not np.array_equal(big, first)
    views = first.reshape(128, -1)
    views = views[views.any(1)]
    assert len(np.unique(views, axis=0)) == len(views)


def test_the_list_of_hidden_patches_is_the_masks_and_as_long_in_every_step() -> None:
    for share, ratios in ((0.5, (0.1, 0.5)), (1.0, (0.2, 0.9)), (0.1, (0.1, 0.2))):
        masks = dataclasses.replace(WHOLE, share=share, ratios=ratios, images=12)
        lengths, filled = set(), []
        for step in range(60):
            (found,) = masks.of_step(step, CPU)
            lengths.add(len(found.rows))
            filled.append(check_list(found) / len(found.rows))
        assert len(lengths) == 1
        assert max(filled) <= 1 and np.mean(filled) > min(0.8, 4 * share)  # with few masks their number varies more


def check_list(masks: Masks) -> int:
    """Rows and weights against a loop; returns how many rows count."""
    flat = masks.hidden.flatten().tolist()
    rows = [row for row, hidden in enumerate(flat) if hidden]
    weights = [1 / sum(flat[row // 196 * 196 : row // 196 * 196 + 196]) for row in rows]
    assert masks.rows[: len(rows)].tolist() == rows
    np.testing.assert_allclose(masks.weights[: len(rows)].numpy(), weights, rtol=1e-6)
    assert not masks.weights[len(rows) :].any()
    return len(rows)


@pytest.mark.parametrize(("views", "patches", "share"), [(1, 9, 0.5), (7, 196, 0.5), (64, 49, 0.3), (32, 16, 1.0)])
def test_no_step_and_no_place_hides_more_than_the_bound(views: int, patches: int, share: float) -> None:
    bound = most_hidden(views, patches, share, (0.1, 0.5))
    rng, worst = np.random.default_rng(0), 0
    for _ in range(3000):
        first = int(rng.integers(0, 10**5)) * views
        number = np.arange(first, first + views, dtype=np.uint64)
        worst = max(worst, int(hidden_counts(number, rng.random(), patches, share, (0.1, 0.5)).sum()))
    assert worst <= bound <= worst + max(2, 0.05 * worst)


def test_the_first_block_is_a_rectangle_of_the_published_shape() -> None:
    rng, n = np.random.default_rng(0), 400
    counts = rng.integers(20, 99, n)
    tries = rng.random((n, TRIES, 4))
    one = tries[:, :1]
    masks = draw_block_masks(counts, (14, 14), one, np.full((n, 196), 0.5)).reshape(n, 14, 14)
    alone = draw_block_masks(counts, (14, 14), one, np.tile(np.linspace(0.1, 0.9, 196), (n, 1))).reshape(n, 14, 14)
    blocks = 0
    for mask, other, count, draw in zip(masks, alone, counts, one[:, 0], strict=True):
        size = 4 + draw[0] * (count - 4)
        ratio = np.exp((2 * draw[1] - 1) * -np.log(0.3))
        h, w = round(np.sqrt(size * ratio)), round(np.sqrt(size / ratio))
        if h > 14 or w > 14 or h * w > count:
            continue
        top, left = int(draw[2] * (15 - h)), int(draw[3] * (15 - w))
        assert mask[top : top + h, left : left + w].all() and other[top : top + h, left : left + w].all()
        assert 0.2 < h / w < 5  # .3 to 1 / .3, rounded to whole patches
        assert mask.sum() == count
        blocks += 1
    assert blocks > 300


def test_masks_are_of_blocks_and_not_of_scattered_patches() -> None:
    """Most neighbors of a hidden patch are hidden, far more than in masks of as many single patches."""

    def together(masks: np.ndarray) -> float:
        return float((masks[:, 1:] & masks[:, :-1]).sum() / masks.sum())

    hidden = np.concatenate([WHOLE.hidden(step).reshape(-1, 14, 14) for step in range(4)])
    rng = np.random.default_rng(0)
    scattered = np.stack([rng.permutation(mask.reshape(-1)).reshape(14, 14) for mask in hidden])
    assert together(hidden) > 0.7 > 2 * together(scattered)
    assert hidden.any(0).all()  # and no place is spared


def test_patches_that_no_block_filled_are_the_first_in_order() -> None:
    none = np.full((1, TRIES, 4), 0.999)  # 14 x 14 patches in a corner: far too many for two
    order = np.random.default_rng(0).random((1, 196))
    mask = draw_block_masks(np.array([2]), (14, 14), none, order)
    assert mask.sum() == 2
    starts = [WHOLE._start(step) for step in range(200)]
    assert 0 < min(starts) < 0.1 and 0.9 < max(starts) < 1 and all(a != b for a, b in pairwise(starts))
