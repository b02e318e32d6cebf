"""The one check every evaluator makes of the arrays it is given."""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from nearfar.ssl.errors import UserError

Array: TypeAlias = np.ndarray | Tensor


def labeled(x: Array, y: Array, what: str) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels (n,) as float32 and int64 tensors, on the device the features are on.

    Raises UserError, naming `what`, for no rows, unequal lengths, non-finite features or negative labels.
    """
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        x = np.array(x)  # a memory map: read it once, torch wants memory it may write to
    features = torch.as_tensor(x).to(torch.float32)
    labels = torch.as_tensor(y).to(features.device, torch.int64)
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise UserError(
            f"The {what} needs features of shape (n, D) and labels of shape (n,), "
            f"not {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not len(features):
        raise UserError(f"The {what} is empty: there is nothing to score.")
    broken = int((~torch.isfinite(features).all(1)).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(features)} feature rows of the {what} are not finite (NaN or infinite), "
            "so no score would mean anything. The backbone that made them has most likely diverged."
        )
    if int(labels.min()) < 0:
        raise UserError(f"The {what} has negative labels; classes are numbered from 0.")
    return features, labels
