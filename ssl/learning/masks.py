"""Which patches of the global views the student does not see (docs/methods.md section 5, iBOT).

Masks are made of blocks, as in BEiT (section 2.3) and DINOv2. They are a pure function of the seed, the step and the
place of the image in the step's batch, drawn by the counter-based generator of the views: any number of processes and
any restart hides the same patches. They are drawn on the CPU, so a GPU is never waited for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.ssl.data.views import key_of, philox, uniform

SMALLEST = 4  # patches of the smallest block asked for
FLATTEST = 0.3  # its height / width at least, and the inverse at most
TRIES = 20  # blocks tried for each image; what they leave is filled patch by patch
GOLDEN = (math.sqrt(5) - 1) / 2
_BLOCKS, _START = 0xFFFFFFFE, 0xFFFFFFFD  # in place of the number of a view, which no real view has

Grid = tuple[int, int]


class Masks(NamedTuple):
    """The hidden patches of G views of B images, N patches each, and a list of them whose length M never changes."""

    hidden: Tensor  # (G, B, N) bool
    rows: Tensor  # (M,) int64: where the hidden ones are among all G*B*N patches in order; then zeros
    weights: Tensor  # (M,) float32: 1 / (hidden patches of the same view of the same image); then zeros


@dataclass(frozen=True)
class BlockMasks:
    """The masks of the steps of one rank."""

    seed: int
    share: float  # of the views that have hidden patches
    ratios: tuple[float, float]  # smallest and largest share of a view's patches that are hidden
    grid: Grid
    images: int  # of a step on this rank
    rank: int = 0
    views: int = 2  # global ones of each image

    def of_step(self, step: int, device: torch.device, parts: int = 1) -> list[Masks]:
        """The masks of a step on `device`, for each of the equal parts in which its images pass."""
        hidden = self.hidden(step)
        return [_listed(part, self._most(part.shape[0]), device) for part in np.split(hidden, parts)]

    def hidden(self, step: int) -> NDArray[np.bool_]:
        """(images, views, N): which patches are hidden in a step."""
        first = self.rank * self.images * self.views
        number = np.arange(first, first + self.images * self.views, dtype=np.uint64)
        patches = self.grid[0] * self.grid[1]
        counts = hidden_counts(number, self._start(step), patches, self.share, self.ratios)
        words = -(-(4 * TRIES + patches) // 4)
        counter = np.empty((4, len(number), words), np.uint64)
        counter[0], counter[1], counter[2], counter[3] = np.arange(words), _BLOCKS, number[:, None], step
        drawn = uniform(np.moveaxis(philox(counter, key_of(self.seed)), 0, -1)).reshape(len(number), -1)
        tries, order = drawn[:, : 4 * TRIES].reshape(-1, TRIES, 4), drawn[:, 4 * TRIES : 4 * TRIES + patches]
        return draw_block_masks(counts, self.grid, tries, order).reshape(self.images, self.views, patches)

    def _start(self, step: int) -> float:
        return float(uniform(philox(np.array([0, _START, 0, step], np.uint64), key_of(self.seed)))[0])

    def _most(self, images: int) -> int:
        return most_hidden(images * self.views, self.grid[0] * self.grid[1], self.share, self.ratios)


def hidden_counts(
    number: NDArray[np.uint64], start: float, patches: int, share: float, ratios: tuple[float, float]
) -> NDArray[np.int64]:
    """How many patches of each view are hidden; `number` counts the views of the whole batch, `start` is of the step.

    A view's x = start + number * golden ratio (modulo 1) is uniform, and those of neighbors are spread evenly: it is
    masked when x < share, at a ratio that rises with x. DINOv2 spreads ratios evenly over the batch of each GPU, which
    would make them depend on the number of GPUs.
    """
    x = (start + number * GOLDEN) % 1.0
    low, high = ratios
    counts = np.floor(patches * (low + (high - low) * np.minimum(1.0, x / share)) + 1e-6).astype(np.int64)
    return np.where(x < share, np.clip(counts, 1, patches), 0)


@lru_cache(maxsize=8)
def most_hidden(views: int, patches: int, share: float, ratios: tuple[float, float]) -> int:
    """The largest sum of `hidden_counts` over so many neighboring views, whatever the step."""
    number, most = np.arange(views, dtype=np.uint64), 0
    for last in range(views):  # the sum rises with `start`, and falls where the x of some view passes `share`
        start = (share - 1e-9 - last * GOLDEN) % 1.0
        most = max(most, int(hidden_counts(number, start, patches, share, ratios).sum()))
    return min(most + 1, views * patches)


def draw_block_masks(
    counts: NDArray[np.int64], grid: Grid, tries: NDArray[np.float64], order: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Masks (n, h*w) with exactly `counts` (n,) hidden patches, made of blocks.

    Each try draws a block of between `SMALLEST` patches and as many as are still to hide, its height / width
    log-uniform, anywhere on the grid; it is taken if it hides a patch more and not too many. What the last one leaves
    is filled by single patches, as in DINOv3 (DINOv2 leaves it open).

    tries: (n, TRIES, 4) in (0, 1): area, ratio, top, left. order: (n, h*w), by which the last patches are chosen.
    """
    height, width = grid
    masks = np.zeros((len(counts), height, width), bool)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    for area, ratio, down, across in tries.transpose(1, 2, 0):
        left = counts - masks.sum((1, 2))
        size = np.clip(SMALLEST + area * (left - SMALLEST), 1, None)
        tall = np.exp((2 * ratio - 1) * -math.log(FLATTEST))
        h, w = np.rint(np.sqrt(size * tall)).astype(int), np.rint(np.sqrt(size / tall)).astype(int)
        top, first = (
            np.floor(at * (side - s + 1)).astype(int) for at, side, s in ((down, height, h), (across, width, w))
        )
        below, right = rows - top[:, None, None], columns - first[:, None, None]
        block = (below >= 0) & (below < h[:, None, None]) & (right >= 0) & (right < w[:, None, None])
        more = (block & ~masks).sum((1, 2))
        taken = (h > 0) & (w > 0) & (h <= height) & (w <= width) & (more > 0) & (more <= left)
        masks |= block & taken[:, None, None]
    flat = masks.reshape(len(counts), height * width)
    rank = np.where(flat, 2.0, order).argsort(1, kind="stable").argsort(1, kind="stable")
    return np.asarray(flat | (rank < (counts - flat.sum(1))[:, None]))


def _listed(hidden: NDArray[np.bool_], most: int, device: torch.device) -> Masks:
    """Hidden patches (B, G, N) as `Masks` of at most `most`, on the device; the host does not wait for the copy."""
    hidden = np.ascontiguousarray(hidden.swapaxes(0, 1))
    found = np.flatnonzero(hidden)
    rows, weights = np.zeros(most, np.int64), np.zeros(most, np.float32)
    rows[: len(found)] = found
    counts = hidden.sum(2, dtype=np.int64).reshape(-1)
    weights[: len(found)] = np.repeat(1 / np.maximum(1, counts), counts)
    return Masks(*(_on(device, torch.from_numpy(array)) for array in (hidden, rows, weights)))


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
