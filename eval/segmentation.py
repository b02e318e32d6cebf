"""Frozen segmentation: a small head on patch grids, scored by mIoU at mask size (docs/methods.md section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.features.extraction import IGNORE
from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.segmentation import SegmentationHead

Masks = Sequence[np.ndarray] | np.ndarray


@dataclass(frozen=True)
class ProbeTraining:
    """How the segmentation head is trained; `segment_probe` says what each does.

    steps: None = 2,000 for the linear head, 500 for the mlp, which learns in fewer and costs ten times as much.
    """

    head: str = "linear"
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    ignore: int = IGNORE
    detail: int = 2

    @property
    def steps_taken(self) -> int:
        return (500 if self.head == "mlp" else 2000) if self.steps is None else self.steps


class GridStatistics(NamedTuple):
    """Mean and standard deviation of each channel of the training grids, (D,) each, where the head is trained."""

    mean: Tensor
    std: Tensor


def segment_probe(
    train_set: tuple[np.ndarray, Masks],
    test_set: tuple[np.ndarray, Masks],
    classes: int,
    training: ProbeTraining = ProbeTraining(),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """mIoU in percent of a "linear" or "mlp" head trained on frozen patch grids.

    A set is its grids (n, h, w, D) and its masks, one uint8 (H, W) an image, sizes may differ. AdamW, weight decay .01,
    one linear cycle up to `lr`, cross-entropy on bilinearly upsampled logits, `ignore` pixels left out. Training
    compares at `detail` times the grid (or the mask's size where that is smaller; masks by nearest neighbor), which
    costs a fraction of full size; the score is always taken at each mask's own size. Features are standardized per
    channel with training statistics: with the linear head this stays a linear map. Same seed, same answer on the same
    device. The head is trained on `device`; grids stay where they are, and a batch of them is on the device at a time.

    Returns miou, pixel_accuracy, per_class (None for a class in neither prediction nor truth; such classes are
    not in the mean), steps, train, test. Raises UserError for unusable arrays.
    """
    check_grid(*train_set, classes, training.ignore, "training set of the segmentation probe")
    check_grid(*test_set, classes, training.ignore, "test set of the segmentation probe")
    if training.steps_taken < 1 or training.batch_size < 1:
        raise UserError(
            "The segmentation probe needs at least one step and one image a batch, not "
            f"{training.steps_taken} and {training.batch_size}."
        )
    (train_grid, train_masks), (test_grid, test_masks) = train_set, test_set
    statistics = grid_statistics(train_grid, torch.device(device))
    model = train_head(train_grid, train_masks, statistics, classes, training)
    table = np.zeros((classes, classes), dtype=np.int64)
    for i in range(len(test_grid)):
        logits = mask_logits(model, _map(test_grid[i : i + 1], statistics), test_masks[i].shape)
        predicted = logits.max(1).indices[0].cpu().numpy()  # ten times as fast as argmax
        table += pixel_confusion(predicted, test_masks[i], classes, training.ignore)
    return {**iou_scores(table), "steps": training.steps_taken, "train": len(train_grid), "test": len(test_grid)}


def predict_masks(
    train_set: tuple[np.ndarray, Masks],
    test_set: tuple[np.ndarray, Sequence[tuple[int, int]]],
    classes: int,
    training: ProbeTraining = ProbeTraining(),
    *,
    device: torch.device | str = "cpu",
) -> list[np.ndarray]:
    """The classes that the head of `segment_probe` gives to test grids, int64 (H, W) at the size asked for each."""
    check_grid(*train_set, classes, training.ignore, "training set of the segmentation probe")
    statistics = grid_statistics(train_set[0], torch.device(device))
    model = train_head(*train_set, statistics, classes, training)
    grid, sizes = test_set
    logits = (mask_logits(model, _map(grid[i : i + 1], statistics), size) for i, size in enumerate(sizes))
    return [each.max(1).indices[0].cpu().numpy() for each in logits]


def train_head(
    grid: np.ndarray, masks: Masks, statistics: GridStatistics, classes: int, training: ProbeTraining
) -> SegmentationHead:
    """The head trained on grids (n, h, w, D) and their masks, on the device of `statistics`; see `segment_probe`."""
    n, h, w, dim = grid.shape
    size = (min(h * training.detail, masks[0].shape[0]), min(w * training.detail, masks[0].shape[1]))
    targets = torch.from_numpy(np.stack([resized_mask(mask, size) for mask in masks]))
    steps = training.steps_taken
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = SegmentationHead(dim, classes, training.head)
    model.to(statistics.mean.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, total_steps=steps, anneal_strategy="linear", cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(training.seed)
    for rows in _batches(n, training.batch_size, steps, generator):
        logits = model(_map(grid[rows.numpy()], statistics), size)
        target = targets[rows].to(logits.device, non_blocking=True).long()
        # a batch may hold nothing but ignored pixels: its mean would be 0/0
        counted = (target != training.ignore).sum().clamp(min=1)
        loss = F.cross_entropy(logits, target, ignore_index=training.ignore, reduction="sum") / counted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.inference_mode()
def mask_logits(model: SegmentationHead, features: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits (B, classes, H, W) at the size of a mask."""
    logits: Tensor = model(features, (size[0], size[1]))
    return logits


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at another size: each pixel takes the class at its own center. (H, W) -> size."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(mask.shape, size, strict=True))
    return np.asarray(mask[rows[:, None], columns])


def pixel_confusion(predicted: np.ndarray, truth: np.ndarray, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Pixel counts, int64 (truth, predicted), without pixels whose truth is `ignore`."""
    counted = truth != ignore
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou_scores(table: np.ndarray) -> dict[str, Any]:
    """miou, pixel_accuracy and per_class IoU in percent from one confusion matrix over a whole data set.

    A class in neither truth nor prediction has no IoU (None) and is left out of the mean.
    """
    hit = np.diag(table)
    union = table.sum(0) + table.sum(1) - hit
    iou = [100.0 * float(h) / float(u) if u else None for h, u in zip(hit, union, strict=True)]
    present = [value for value in iou if value is not None]
    if not present:
        raise UserError("Segmentation: every pixel of the test masks is ignored, so there is nothing to score.")
    accuracy = 100.0 * float(hit.sum()) / float(table.sum())
    return {"miou": sum(present) / len(present), "pixel_accuracy": accuracy, "per_class": iou}


def check_grid(grid: np.ndarray, masks: Masks, classes: int, ignore: int, what: str) -> None:
    """Raises UserError for patch grids that are not (n, h, w, D), finite and with a mask of known classes each."""
    if grid.ndim != 4 or not len(grid) or len(grid) != len(masks):
        raise UserError(
            f"The {what} needs patch grids (n, h, w, D) and as many masks, not {grid.shape} and {len(masks)} masks."
        )
    for i, mask in enumerate(masks):
        if mask.ndim != 2:
            raise UserError(f"The {what} needs one class for each pixel, (H, W); mask {i} is {mask.shape}.")
        highest = np.max(mask, where=mask != ignore, initial=0)
        if highest >= classes:
            raise UserError(
                f"The {what} has class {highest} in mask {i}, but there are only {classes} classes (0 to "
                f"{classes - 1}; {ignore} = ignore)."
            )
    if not all(np.isfinite(row).all() for row in grid):
        raise UserError(f"The {what} has features that are not finite; the backbone has most likely diverged.")


def grid_statistics(grid: np.ndarray, device: torch.device) -> GridStatistics:
    """Summed image by image in float64."""
    count = grid.shape[0] * grid.shape[1] * grid.shape[2]
    mean = sum(np.asarray(row, np.float64).sum((0, 1)) for row in grid) / count
    square = sum((np.asarray(row, np.float64) - mean).__pow__(2).sum((0, 1)) for row in grid) / count
    std = np.sqrt(square)
    std[std <= 1e-6 * std.max()] = 1.0  # a channel that never changes stays at 0
    return GridStatistics(torch.from_numpy(mean).float().to(device), torch.from_numpy(std).float().to(device))


def _map(grid: np.ndarray, statistics: GridStatistics) -> Tensor:
    """Grids (B, h, w, D) -> standardized feature maps (B, D, h, w)."""
    part = torch.from_numpy(np.array(grid, np.float32)).to(statistics.mean.device, non_blocking=True)
    return part.sub_(statistics.mean).div_(statistics.std).permute(0, 3, 1, 2)


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """`steps` batches of row numbers: one shuffled pass after another, the incomplete end of a pass dropped."""
    batch_size = min(batch_size, n)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(n, generator=generator)
        batches += order[: n - n % batch_size].split(batch_size)
    return batches[:steps]
