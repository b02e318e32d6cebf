"""Features whose directions all count alike: centered, decorrelated and scaled by what training features say.

The cosine of raw features is decided by the few directions in which they vary most; what tells classes apart may lie in
others. A linear probe finds those by itself, and k-NN cannot.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearfar.eval.arrays import Array, on_host, take
from nearfar.eval.neighbors import exact_unit
from nearfar.ssl.errors import UserError

_FITTED = 2**27  # numbers that the covariance is estimated from: 1 GiB of float64
_ROWS = 8192  # whitened at once


class Whitening(NamedTuple):
    """mean: (D,), matrix: (D, D), both float64. shrinkage: share of the identity in the covariance, in [0, 1]."""

    mean: np.ndarray
    matrix: np.ndarray
    shrinkage: float

    def __call__(self, x: Array) -> Tensor:
        """Rows (n, D), scaled to length 1 first -> whitened (n, D), float32, on the CPU."""
        mean, matrix = torch.from_numpy(self.mean), torch.from_numpy(self.matrix)
        out = torch.empty(tuple(x.shape), dtype=torch.float32)
        for start in range(0, len(x), _ROWS):
            rows = torch.from_numpy(exact_unit(on_host(x[start : start + _ROWS])))
            out[start : start + _ROWS] = (rows - mean) @ matrix
        return out


def fit(x: Array) -> Whitening:
    """From training features (n, D), n at least 2: W with W^T C W = 1 for their covariance C after rows have length 1.

    The principal components, each divided by its deviation (Jegou and Chum, ECCV 2012). C is shrunk towards a multiple
    of the identity by as much as Ledoit and Wolf (2004) find best for so many rows, so that directions of which little
    is known are not blown up, also where n < D. Of many rows, evenly spread ones are read. Raises UserError for rows
    that are not finite, and where they are all alike.
    """
    from sklearn.covariance import ledoit_wolf

    n, dim = x.shape
    chosen = np.linspace(0, n - 1, min(n, max(2, _FITTED // dim))).round().astype(np.int64)
    rows = exact_unit(on_host(take(x, torch.from_numpy(chosen))))
    mean = rows.mean(0)
    covariance, shrinkage = ledoit_wolf(rows - mean, assume_centered=True)
    variance, directions = np.linalg.eigh(covariance)
    if not variance[-1] > 1e-12:
        raise UserError(
            "The training features are all alike (after each is scaled to length 1), so they have no directions to "
            "whiten. The backbone that made them has most likely collapsed."
        )
    deviation = np.sqrt(np.maximum(variance, 1e-9 * variance[-1]))  # what never varies is no direction to divide by
    return Whitening(mean, directions / deviation, float(shrinkage))
