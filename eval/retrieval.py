"""Dense retrieval (docs/methods.md section 6; Balazevic et al. 2023, "Hummingbird"): segmentation without training.

A memory of training patches, each with the shares of classes among its pixels, labels every test patch by its
nearest neighbors. Ignored pixels count neither in the memory nor in the score, and classes are the masks' own.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.features.extraction import IGNORE
from nearfar.eval.neighbors import neighbors
from nearfar.eval.segmentation import Masks, check_grid, iou_scores, pixel_confusion
from nearfar.ssl.errors import UserError

MEMORY = 1024 * 100  # patches; the smallest of the published sizes, 1024 * 10**2, 10**3 and 10**4
NEIGHBORS = 30
TEMPERATURE = 0.02
_IMAGES = 16  # test images searched for in one pass over the memory


def retrieve(  # noqa: PLR0913 - four arrays, and the protocol by name
    train_grid: np.ndarray,
    train_masks: Masks,
    test_grid: np.ndarray,
    test_masks: Masks,
    *,
    classes: int,
    memory: int = MEMORY,
    k: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    ignore: int = IGNORE,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """mIoU in percent of patch grids (n, h, w, D), mapped or not, labeled by a memory of at most `memory` patches.

    Masks are one uint8 (H, W) an image, sizes may differ; their sides need not be multiples of the grid. A patch's
    soft label is averaged over its k nearest by cosine with weights softmax(cosine / temperature), upsampled
    bilinearly to the mask, and the largest class wins. Same seed, same answer. Memory besides the grids: `memory` *
    (D + classes) * 4 bytes and about 2 GiB.

    Returns miou, pixel_accuracy, per_class (as `segment_probe`), memory (patches kept), k, train, test. Raises
    UserError for unusable arrays, and where no training pixel is labeled.
    """
    check_grid(train_grid, train_masks, classes, ignore, "training set of the dense retrieval")
    check_grid(test_grid, test_masks, classes, ignore, "test set of the dense retrieval")
    if train_grid.shape[3] != test_grid.shape[3]:
        raise UserError(
            f"Dense retrieval: training features have {train_grid.shape[3]} dimensions, test features "
            f"{test_grid.shape[3]}."
        )
    if memory < 1 or k < 1 or not temperature > 0:
        raise UserError(
            f"Dense retrieval needs a memory and a number of neighbors of at least 1 and a positive temperature, not "
            f"{memory}, {k} and {temperature}."
        )
    x, labels = fill_memory(train_grid, train_masks, classes=classes, size=memory, seed=seed, ignore=ignore)
    k = min(k, len(x))
    table = np.zeros((classes, classes), dtype=np.int64)
    h, w = test_grid.shape[1:3]
    for start in range(0, len(test_grid), _IMAGES):
        part = np.asarray(test_grid[start : start + _IMAGES])
        near, index = neighbors(x, part.reshape(-1, part.shape[3]), k, device=device)
        soft = vote(near, labels, index, temperature).view(len(part), h, w, classes).permute(0, 3, 1, 2)
        for i in range(len(part)):
            mask = test_masks[start + i]
            shares = F.interpolate(soft[i : i + 1], size=mask.shape, mode="bilinear", align_corners=False)
            table += pixel_confusion(shares.max(1).indices[0].numpy(), mask, classes, ignore)
    return {**iou_scores(table), "memory": len(x), "k": k, "train": len(train_grid), "test": len(test_grid)}


def vote(similarity: Tensor, labels: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Soft labels (m, classes) float32: `labels` (M, classes) of the neighbors `index` (m, k), weighted."""
    weight = (similarity / temperature).softmax(1).float()
    mixed = torch.zeros(len(index), labels.shape[1])
    for rank in range(index.shape[1]):  # one neighbor at a time: (m, k, classes) may be gigabytes
        mixed += weight[:, rank, None] * labels[index[:, rank]]
    return mixed


def fill_memory(
    grid: np.ndarray, masks: Masks, *, classes: int, size: int, seed: int, ignore: int = IGNORE
) -> tuple[np.ndarray, Tensor]:
    """At most `size` patches (M, D) float32 and their soft labels (M, classes), rows that sum to 1.

    Every image gives its size // n patches with the smallest score (sum over the patch's classes of the number of the
    image's patches that hold the class) * U(0, 1): rare classes first. A memory smaller than the number of images
    takes one patch of each of `size` images drawn at random. Patches of nothing but ignored pixels are never taken.
    """
    generator = torch.Generator().manual_seed(seed)
    n, h, w, _ = grid.shape
    images = torch.randperm(n, generator=generator)[: min(n, size)].sort().values.tolist()
    each = max(1, size // n)
    features, labels = [], []
    for i in images:
        counts = class_counts(masks[i], (h, w), classes, ignore).flatten(0, 1)
        held = counts > 0
        score = (held.double() @ held.sum(0).double()) * torch.rand(h * w, generator=generator, dtype=torch.float64)
        score[~held.any(1)] = torch.inf
        chosen = score.argsort()[: min(each, int(held.any(1).sum()))]
        features.append(np.asarray(grid[i], dtype=np.float32).reshape(h * w, -1)[chosen.numpy()])
        labels.append((counts[chosen] / counts[chosen].sum(1, keepdim=True)).float())
    memory = np.concatenate(features)
    if not len(memory):
        raise UserError(
            "Dense retrieval: every pixel of the training masks is ignored, so there is nothing to put into the memory."
        )
    return memory, torch.cat(labels)


def class_counts(mask: np.ndarray, grid: tuple[int, int], classes: int, ignore: int = IGNORE) -> Tensor:
    """How much of each class lies under each patch, without ignored pixels: (H, W) -> float64 (h, w, classes).

    Where H is no multiple of h, a pixel on the border of two patches counts in each with its share.
    """
    rows, columns = (_shares(side, parts) for side, parts in zip(mask.shape, grid, strict=True))
    counts = torch.zeros(*grid, classes, dtype=torch.float64)
    for label in np.unique(mask[mask != ignore]).tolist():
        counts[:, :, label] = rows @ torch.from_numpy(mask == label).double() @ columns.T
    return counts


def _shares(side: int, parts: int) -> Tensor:
    """(parts, side): the share of every pixel that lies within every part of a side."""
    # in units of 1 / parts of a pixel, where all borders are whole numbers
    first, last = torch.arange(parts)[:, None] * side, (torch.arange(parts)[:, None] + 1) * side
    pixel = torch.arange(side)[None] * parts
    overlap = torch.minimum(last, pixel + parts) - torch.maximum(first, pixel)
    return overlap.clamp(min=0).double() / parts
