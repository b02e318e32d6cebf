"""Few labels: the accuracy of frozen features with 1, 5 or 10 labeled images per class, or with 1 or 10 % of them."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.eval.arrays import Array, check_classes, check_labeled
from nearfar.eval.linear import StandardizedRows, standardize
from nearfar.eval.logistic import fit, predict
from nearfar.ssl.errors import UserError

SHOTS = (1, 5, 10)
SHARES = (0.01, 0.1)
DRAWS = 5


def few_shot(  # noqa: PLR0913 - four arrays, and the protocol by name
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    strength: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[int, dict[str, Any]]:
    """Top-1 in percent with `shots` labeled images a class, drawn `draws` times: {shots: {mean, std, draws, labels}}.

    A logistic regression (L-BFGS, `strength`) on the drawn features, standardized by them alone, scored on the whole
    test set. std is the sample deviation over draws (None for one draw). The draws of every shot are the same for
    every network. Raises UserError for unusable arrays and where a class has fewer images than asked for.
    """
    y, truth = _labels(train_x, train_y, test_x, test_y)
    counts = torch.bincount(y)
    for shot in shots:
        if shot < 1 or shot > int(counts.min()):
            raise UserError(
                f"Few-shot evaluation with {shot} images a class is not possible: class {int(counts.argmin())} has "
                f"{int(counts.min())} training images. Ask for between 1 and {int(counts.min())}."
            )
    drawn = {shot: _drawn(partial(draw_per_class, y, shot), draws, seed) for shot in shots}
    return {shot: _scores(train_x, y, test_x, truth, rows, strength, device) for shot, rows in drawn.items()}


def few_labels(  # noqa: PLR0913 - four arrays, and the protocol by name
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    strength: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[float, dict[str, Any]]:
    """`few_shot` with a share of each class's images (.01 is 1 %), at least one: {share: {mean, ...}}."""
    y, truth = _labels(train_x, train_y, test_x, test_y)
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"The share of labels must be more than 0 and at most 1, not {share}.")
    drawn = {share: _drawn(partial(draw_share, y, share), draws, seed) for share in shares}
    return {share: _scores(train_x, y, test_x, truth, rows, strength, device) for share, rows in drawn.items()}


def draw_per_class(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of each class, drawn without replacement; sorted row numbers (classes * count,)."""
    return _draw(y, lambda members: count, generator)


def draw_share(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of each class's rows, rounded, at least one; sorted row numbers."""
    return _draw(y, lambda members: max(1, round(share * members)), generator)


def _draw(y: Tensor, count: Callable[[int], int], generator: torch.Generator) -> Tensor:
    # a random order of everything, stably sorted by class: the first rows of each class are its draw
    order = torch.randperm(len(y), generator=generator)
    order = order[y[order].argsort(stable=True)]
    groups = order.split(torch.bincount(y).tolist())
    return torch.cat([group[: count(len(group))] for group in groups]).sort().values


def _labels(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> tuple[Tensor, Tensor]:
    y = check_labeled(train_x, train_y, "training set of the few-shot evaluation")
    truth = check_labeled(test_x, test_y, "test set of the few-shot evaluation")
    if train_x.shape[1] != test_x.shape[1]:
        raise UserError(
            f"Few-shot evaluation: training features have {train_x.shape[1]} dimensions, test features "
            f"{test_x.shape[1]}."
        )
    check_classes(y, "training set of the few-shot evaluation")
    return y, truth


def _drawn(draw: Callable[[torch.Generator], Tensor], draws: int, seed: int) -> list[Tensor]:
    """The labeled rows of every draw."""
    if draws < 1:
        raise UserError(f"Few-shot evaluation needs at least one draw, not {draws}.")
    return [draw(torch.Generator().manual_seed(seed * 1000 + number)) for number in range(draws)]


def _scores(
    train_x: Array,
    y: Tensor,
    test_x: Array,
    truth: Tensor,
    drawn: list[Tensor],
    strength: float,
    device: torch.device | str,
) -> dict[str, Any]:
    """Top-1 of a classifier for each draw of labeled rows, and their mean and sample deviation."""
    found, labels = [], 0
    for rows in drawn:
        picked = np.asarray(train_x[rows.numpy()]) if isinstance(train_x, np.ndarray) else train_x[rows]
        x = standardize(picked, torch.device(device), "training set of the few-shot evaluation")
        classes, labels = int(y.max()) + 1, len(rows)
        fitted = fit(x, y[rows], torch.arange(labels), classes=classes, strength=strength, iterations=200)
        predicted = predict(fitted["weight"], StandardizedRows(test_x, x.device, x.mean, x.scale))
        found.append(100.0 * int((predicted == truth).sum()) / len(truth))
    spread = statistics.stdev(found) if len(found) > 1 else None
    return {"mean": statistics.mean(found), "std": spread, "draws": found, "labels": labels}
