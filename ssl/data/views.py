"""What a view is: crop box, flip and color parameters, as a pure function of (seed, epoch, sample, view).

There is no generator state. Every random number is one 32-bit word of Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), whose counter is `(block, view, sample, epoch)` and whose key is the
seed: any worker count, backend or restart sees the same views. Backends only execute a plan
(docs/methods.md section 5).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nearfar.ssl.settings.run import ViewSettings

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to a central crop
_ORDER = 0xFFFFFFFF  # the "view" whose words order the samples of an epoch; no real view has this number


def philox(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10: counters (4, ...) of 32-bit words -> (4, ...) random 32-bit words, held in uint64."""
    a, b, c, d = np.asarray(counter, np.uint64)
    k0, k1 = key
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = (q >> _HALF) ^ b ^ np.uint64(k0), (p >> _HALF) ^ d ^ np.uint64(k1)
        b, d = q & _LOW, p & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((a, b, c, d))


def key_of(seed: int) -> tuple[int, int]:
    """The key of `philox` that a seed stands for."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """32-bit words -> numbers in the open interval (0, 1)."""
    return np.asarray((words + 0.5) * 2.0**-32)


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of the n samples in one epoch, int64 (n,): they are sorted by 64 random bits each."""
    counter = np.zeros((4, n), np.uint64)
    counter[1], counter[2], counter[3] = _ORDER, np.arange(n), epoch
    words = philox(counter, key_of(seed))
    return np.argsort(words[0] << _HALF | words[1], kind="stable")


@dataclass(frozen=True)
class ViewPlan:
    """The parameters of n samples x V views. The order of execution is that of DINO: crop and resize, flip, jitter,
    gray, blur, solarize. Factors, order, sigma hold a value only where their switch is on (`jitter`, `sigma` > 0)."""

    box: NDArray[np.int32]  # (n, V, 4): top, left, height, width in pixels of the upright image
    flip: NDArray[np.bool_]  # (n, V)
    jitter: NDArray[np.bool_]  # (n, V)
    factors: NDArray[np.float32]  # (n, V, 4): brightness, contrast, saturation (1 = unchanged), hue (0, in turns)
    order: NDArray[np.uint8]  # (n, V, 4): the factor applied first, second, third, fourth
    gray: NDArray[np.bool_]  # (n, V)
    sigma: NDArray[np.float32]  # (n, V): standard deviation of the blur in pixels of the view, 0 = none
    solarize: NDArray[np.bool_]  # (n, V)
    solarize_threshold: int  # the gray level (0..256) from which solarizing inverts, in all views

    def _arrays(self) -> dict[str, Any]:
        return {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}

    def views(self, which: slice) -> "ViewPlan":
        """The plan of some of the views only."""
        return replace(self, **{name: array[:, which] for name, array in self._arrays().items()})

    def set_sample(self, k: int, other: "ViewPlan") -> None:
        """Replace sample k by the first sample of another plan."""
        for name, array in self._arrays().items():
            array[k] = getattr(other, name)[0]


def plan_views(views: ViewSettings, seed: int, epoch: int, index: ArrayLike, size: ArrayLike) -> ViewPlan:
    """Plan all views of some samples.

    index: (n,) sample numbers below 2**32; size: (n, 2) height and width of each upright image. Views 0 and 1 are the
    global ones (view 0 alone where each image has one view), the others local. Distributions are those of torchvision's
    RandomResizedCrop, ColorJitter and RandomHorizontalFlip.
    """
    sample = np.asarray(index, np.uint64)
    n, count = len(sample), views.global_crops + views.local_crops_number
    counter = np.empty((4, n, count, (16 + 2 * _TRIES) // 4), np.uint64)
    counter[0] = np.arange(counter.shape[-1])
    counter[1] = np.arange(count)[:, None]
    counter[2] = sample[:, None, None]
    counter[3] = epoch
    words = np.moveaxis(philox(counter, key_of(seed)), 0, -1).reshape(n, count, 16 + 2 * _TRIES)
    u = uniform(words)

    shift = np.array([views.brightness, views.contrast, views.saturation, views.hue])
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(neutral - shift, [0.0, 0.0, 0.0, -0.5])
    low_sigma, high_sigma = views.blur_sigma
    blurred = u[..., 13] < _per_view(views.blur_prob, count)
    return ViewPlan(
        box=_boxes(views, u[..., 16:].reshape(n, count, _TRIES, 2), u[..., :2], np.asarray(size, np.int64)),
        flip=u[..., 2] < views.hflip_prob,
        jitter=u[..., 3] < views.color_jitter_prob,
        factors=(low + u[..., 4:8] * (neutral + shift - low)).astype(np.float32),
        order=np.argsort(words[..., 8:12], axis=-1, kind="stable").astype(np.uint8),
        gray=u[..., 12] < views.grayscale_prob,
        sigma=np.where(blurred, low_sigma + u[..., 14] * (high_sigma - low_sigma), 0).astype(np.float32),
        solarize=u[..., 15] < _per_view(views.solarize_prob, count),
        solarize_threshold=views.solarize_threshold,
    )


def _per_view(role: tuple[float, float, float], count: int) -> NDArray[np.float64]:
    """Values for (first global, second global, local) -> one a view."""
    return np.array([*role[:2], *[role[2]] * (count - 2)][:count])


def _boxes(
    views: ViewSettings, tries: NDArray[np.floating], position: NDArray[np.floating], size: NDArray[np.int64]
) -> NDArray[np.int32]:
    """RandomResizedCrop: (n, V, 10, 2) draws of area and log ratio, (n, V, 2) of the position -> (n, V, 4) boxes."""
    count = position.shape[1]
    scale = np.array(
        [views.global_crops_scale] * views.global_crops + [views.local_crops_scale] * (count - views.global_crops)
    )  # (V, 2)
    rows, columns = size[:, 0, None], size[:, 1, None]  # (n, 1)
    area = rows * columns * (scale[:, 0] + tries[..., 0].transpose(2, 0, 1) * (scale[:, 1] - scale[:, 0]))
    low, high = np.log(views.ratio)
    ratio = np.exp(low + tries[..., 1].transpose(2, 0, 1) * (high - low))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # (10, n, V)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= columns) & (height > 0) & (height <= rows)
    first = fits.argmax(0)[None]
    width, height = np.take_along_axis(width, first, 0)[0], np.take_along_axis(height, first, 0)[0]
    top = np.floor(position[..., 0] * (rows - height + 1)).astype(np.int64)
    left = np.floor(position[..., 1] * (columns - width + 1)).astype(np.int64)

    # No try fitted: the largest central crop whose ratio is allowed.
    central_width = np.minimum(columns, np.rint(rows * views.ratio[1]).astype(np.int64))
    central_height = np.minimum(rows, np.rint(columns / views.ratio[0]).astype(np.int64))
    fitted = fits.any(0)
    width, height = np.where(fitted, width, central_width), np.where(fitted, height, central_height)
    top = np.where(fitted, top, (rows - height) // 2)
    left = np.where(fitted, left, (columns - width) // 2)
    return np.stack((top, left, height, width), -1).astype(np.int32)
