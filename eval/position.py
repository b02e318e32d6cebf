"""Do patch tokens carry their position? A linear map from a token to its row and column, scored on held-out images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl.errors import UserError

_TOKENS = 2**15


def position_probe(train_grid: np.ndarray, test_grid: np.ndarray, *, ridge: float = 1e-4) -> dict[str, Any]:
    """How much of the variance of row and column a linear map explains: R2, at most 1, on `test_grid`'s images.

    Patch grids (n, h, w, D) of one h and w, memory-mapped or not; positions are scaled to -1 ... 1. Ridge regression in
    closed form on standardized features, from sums over the training images in float64: `ridge` is in units of a
    feature's variance. 0 is what guessing the center gives, and less than 0 is worse than that. Compare with an
    untrained network: patches at the border of real photographs look different, so even pixels score above 0.

    Returns row, column, r2 (their mean), train and test (tokens). Raises UserError for unusable grids.
    """
    for grid, what in ((train_grid, "training"), (test_grid, "test")):
        if grid.ndim != 4 or not len(grid) or min(grid.shape[1:3]) < 2:
            raise UserError(
                f"The position probe needs patch grids (n, h, w, D) of at least 2 x 2 patches; its {what} grids are "
                f"{grid.shape}."
            )
    if train_grid.shape[1:] != test_grid.shape[1:]:
        raise UserError(
            f"The position probe's training and test grids differ in shape: {train_grid.shape[1:]} and "
            f"{test_grid.shape[1:]}."
        )
    if not ridge >= 0:
        raise UserError(f"The ridge of the position probe must not be negative, and it is {ridge}.")
    places = _places(*train_grid.shape[1:3])
    mean, weight = _fit(train_grid, places, ridge)
    error, count = torch.zeros(2, dtype=torch.float64), 0
    for tokens, target in _chunks(test_grid, places, "test"):
        error += ((tokens - mean) @ weight - target).square().sum(0)
        count += len(tokens)
    r2 = (1 - error / (count * places.square().mean(0))).tolist()
    size = len(train_grid) * len(places)
    return {"row": r2[0], "column": r2[1], "r2": sum(r2) / 2, "train": size, "test": count}


def _places(h: int, w: int) -> Tensor:
    """Row and column of each patch, (h * w, 2) float64, from -1 to 1."""
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, h, dtype=torch.float64), torch.linspace(-1, 1, w, dtype=torch.float64), indexing="ij"
    )
    return torch.stack([rows.flatten(), columns.flatten()], 1)


def _fit(grid: np.ndarray, places: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """mean (D,) and weight (D, 2): positions are (x - mean) @ weight, since their own mean is 0."""
    dim = grid.shape[3]
    count = len(grid) * len(places)
    mean = torch.zeros(dim, dtype=torch.float64)
    for tokens, _ in _chunks(grid, places, "training"):
        mean += tokens.sum(0) / count
    square, cross = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, 2, dtype=torch.float64)
    for tokens, target in _chunks(grid, places, "training"):
        centered = tokens - mean
        square += centered.T @ centered / count
        cross += centered.T @ target / count
    std = square.diagonal().sqrt()
    scale = torch.where(std > 1e-6 * std.max(), std, torch.inf).reciprocal()  # a constant channel gets weight 0
    system = square * scale[:, None] * scale + (ridge + 1e-9) * torch.eye(dim, dtype=torch.float64)
    return mean, torch.linalg.solve(system, cross * scale[:, None]) * scale[:, None]


def _chunks(grid: np.ndarray, places: Tensor, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (t, D) float64 and their positions (t, 2), a few images at a time."""
    images = max(1, _TOKENS // len(places))
    for start in range(0, len(grid), images):
        part = torch.from_numpy(np.asarray(grid[start : start + images], dtype=np.float64))
        if not bool(torch.isfinite(part).all()):
            raise UserError(
                f"The position probe's {what} features are not finite; the backbone has most likely diverged."
            )
        yield part.flatten(0, 2), places.repeat(len(part), 1)
