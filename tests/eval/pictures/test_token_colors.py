"""Token colors: the right components, the background away, no border, similarity where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from nearfar.eval.pictures.token_colors import (
    foreground,
    otsu,
    painted,
    patch_tokens,
    principal_colors,
    similarity,
    token_colors,
)
from nearfar.ssl.backbones import create


def test_colors_are_the_first_three_components() -> None:
    tokens = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(12, 0, -1) ** 2
    ours, theirs = principal_colors(tokens), PCA(3).fit_transform(tokens)
    inner = ((ours > 0) & (ours < 1)).all(1)  # the percentiles clip the rest
    assert inner.mean() > 0.9
    for c in range(3):
        assert abs(np.corrcoef(ours[inner, c], theirs[inner, c])[0, 1]) == pytest.approx(1, abs=1e-9)
    assert ours.min() == 0
    assert ours.max() == 1


def test_the_sign_is_fixed_and_an_offset_changes_nothing() -> None:
    tokens = np.random.default_rng(1).normal(size=(50, 8)) * np.arange(8, 0, -1)
    assert principal_colors(tokens + 100) == pytest.approx(principal_colors(tokens), abs=1e-6)


def test_tokens_of_low_rank_leave_the_other_colors_flat() -> None:
    tokens = np.outer(np.arange(20.0), np.ones(6))
    colors = principal_colors(tokens)
    assert np.ptp(colors[:, 0]) == 1
    assert (colors[:, 1:] == 0.5).all()
    assert (principal_colors(np.ones((5, 4))) == 0.5).all()


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (4, 8, 8, 12) of images of unlike backgrounds with one of two kinds of object, and where that is."""
    kinds = np.eye(12)[:2] * 6
    tokens, where = np.zeros((4, 8, 8, 12)), np.zeros((4, 8, 8), bool)
    for i in range(4):
        tokens[i] = rng.normal(size=12) + 0.1 * rng.normal(size=(8, 8, 12))
        where[i, 2 : 4 + i % 3, 3:6] = True
        tokens[i][where[i]] += kinds[i % 2]
    return tokens, where


def test_the_background_is_left_out_and_alike_objects_have_alike_colors() -> None:
    tokens, where = scene(np.random.default_rng(0))
    assert np.array_equal(foreground(tokens), where)
    found = token_colors(tokens)
    means = [found.colors[i][where[i]].mean(0) for i in range(4)]
    alike = np.linalg.norm(means[0] - means[2]), np.linalg.norm(means[0] - means[1])
    assert alike[0] < alike[1]
    assert np.asarray(painted(found.colors[0], found.shown[0], (16, 16)))[..., 3].sum() == 255 * 4 * where[0].sum()


def test_a_grid_that_is_all_border_is_all_foreground() -> None:
    assert foreground(np.zeros((1, 2, 2, 3))).all()


def test_otsu_finds_the_threshold_with_the_most_variance_between() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0, 1, 700), rng.normal(7, 1.5, 300)])

    def between(at: float) -> float:
        low, high = values[values <= at], values[values > at]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(np.linspace(values.min(), values.max(), 2000), key=between)
    assert otsu(values) == pytest.approx(best, abs=2 * np.ptp(values) / 128)


def test_the_margin_of_mirrored_patches_is_cut_off() -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch8_lgp", img_size=32, embed_dim=24, depth=1, num_heads=2).train()
    assert patch_tokens(model, torch.randn(2, 3, 32, 48)).shape == (2, 4, 6, 24)
    assert model.training  # put back as it was
    assert patch_tokens(model, torch.randn(1, 3, 16, 16)).shape == (1, 2, 2, 24)  # too small to be mirrored


def test_similarity_is_the_cosine_to_the_chosen_patch_without_the_mean() -> None:
    tokens = np.random.default_rng(2).normal(size=(3, 4, 5)) + 9
    found, centered = similarity(tokens, (1, 2)), tokens - tokens.reshape(-1, 5).mean(0)
    for y, x in np.ndindex(3, 4):
        a, b = centered[y, x], centered[1, 2]
        assert found[y, x] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
