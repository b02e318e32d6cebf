"""The arrays that evaluators are given, of numpy or torch, and the checks that all make of them."""

from collections.abc import Sequence
from typing import NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl.errors import UserError

Array: TypeAlias = np.ndarray | Tensor


def on_host(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def take(x: Array, rows: Tensor) -> Array:
    """The rows of these numbers (int64, on the CPU), where x is."""
    return x[rows.numpy()] if isinstance(x, np.ndarray) else x[rows.to(x.device)]


def check_labeled(x: Array, y: Array | None, what: str) -> Tensor:
    """Labels (n,) of features (n, D) as an int64 tensor on the CPU; the features themselves are not read.

    Raises UserError, naming `what`, for missing labels, no rows, unequal lengths and negative labels.
    """
    if y is None:
        raise UserError(f"The {what} has no labels: use class folders, or a list with labels.")
    labels = torch.as_tensor(y).to("cpu", torch.int64)
    if x.ndim != 2 or labels.ndim != 1 or len(x) != len(labels):
        raise UserError(
            f"The {what} needs features of shape (n, D) and labels of shape (n,), "
            f"not {tuple(x.shape)} and {tuple(labels.shape)}."
        )
    if not len(x):
        raise UserError(f"The {what} is empty: there is nothing to score.")
    if int(labels.min()) < 0:
        raise UserError(f"The {what} has negative labels; classes are numbered from 0.")
    return labels


def check_classes(y: Tensor, what: str, names: Sequence[str] | None = None) -> int:
    """The number of classes of training labels (n,), all of which must occur.

    Raises UserError, naming `what`, for a single class, and for numbers that no image has.
    """
    present = y.unique()
    if len(present) < 2:
        raise UserError(
            f"Every image of the {what} has label {int(present[0])}: with one class only, any answer is right. "
            "Give images of two classes or more."
        )
    classes = int(present[-1]) + 1
    if len(present) < classes:
        first = int(torch.nonzero(present != torch.arange(len(present))).flatten()[0])
        named = f' ("{names[first]}")' if names else ""
        raise UserError(
            f"The labels of the {what} have gaps: {classes - len(present)} of the classes 0 to {classes - 1} have no "
            f"image, the first of them class {first}{named}. Add images of it, remove its empty folder, or number "
            "the classes without gaps."
        )
    return classes


def refuse_broken(x: Tensor, what: str) -> NoReturn:
    """Raise the UserError of features (n, D), some of which are not finite."""
    broken = int((~torch.isfinite(x).all(1)).sum())
    raise UserError(
        f"{broken} of {len(x)} feature rows of the {what} are not finite (NaN or infinite), "
        "so no score would mean anything. The backbone that made them has most likely diverged."
    )
