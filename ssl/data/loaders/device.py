"""Views made on the training device, for data whose pixels all fit into its memory: same order, plan and batches.

Resizing is linear, so a view is two matrix products, `down @ image @ across`, with Pillow's weights in the matrices and
zeros outside the crop; between them values are rounded to 8 bits, as Pillow does. Sums are in float32, so that a value
on the edge between two gray levels may fall to the other side.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from nearfar.ssl.config import Views
from nearfar.ssl.data.loaders.base import Batch, Loader, Task, check_size, first_good
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.views import ViewPlan, plan_views
from nearfar.ssl.errors import BadImage, UserError

_PILLOW_TURNS = int(PIL.__version__.partition(".")[0]) >= 13  # tall crops go vertically first: see cpu_views.py
_PART = 2**26  # elements of a weight matrix made at a time


class DeviceLoader(Loader):
    """`data.Loader` with every image on `device`, uint8, from the start; its docstring applies.

    `workers` threads read them, once; images of several sizes are padded to the largest. Batches lie on the device.
    Raises UserError where the images need more than `share` of the memory that is free there (or of 16 GiB on a CPU).
    """

    word = "device loader"

    def __init__(
        self,
        source: Source,
        views: Views,
        *,
        device: torch.device,
        min_side: int = 8,
        workers: int = 0,
        share: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(source, views, min_side=min_side, workers=0, **options)
        self.device, self._views, self._min_side = device, views, min_side
        self._broken: dict[int, BadImage] = {}
        self._load(workers, share)

    def _load(self, workers: int, share: float) -> None:
        def read(i: int) -> np.ndarray | BadImage:
            try:
                return np.asarray(self.source.read(i)).transpose(2, 0, 1)
            except BadImage as error:
                return error

        n, free = len(self.source), self._free_bytes()
        self._size = np.zeros((n, 2), np.int64)
        kept: list[np.ndarray | None] = []
        height = width = 1
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for begin in range(0, n, 256):
                for i, image in enumerate(pool.map(read, range(begin, min(begin + 256, n))), begin):
                    if isinstance(image, BadImage):
                        self._broken[i] = image
                        kept.append(None)
                        continue
                    kept.append(image)
                    self._size[i] = image.shape[1:]
                    height, width = max(height, image.shape[1]), max(width, image.shape[2])
                if 3 * n * height * width > share * free:
                    raise UserError(
                        f"data.loader=device keeps all images in the device's memory: {n:,} images of up to {width} x "
                        f"{height} pixels need {3 * n * height * width / 2**30:.1f} GiB, and {share:.0%} of "
                        f"{free / 2**30:.1f} GiB may be taken. Choose data.loader=ffcv or folder."
                    )
        self._images = torch.zeros(n, 3, height, width, dtype=torch.uint8, device=self.device)
        for i, pixels in enumerate(kept):
            if pixels is not None:
                self._images[i, :, : pixels.shape[1], : pixels.shape[2]] = torch.from_numpy(pixels.copy())
                self.decoded += 1

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 2**34

    def __iter__(self) -> Iterator[Batch]:
        for task in self._tasks():
            yield self._checked(self._batch(task))

    def _batch(self, task: Task) -> Batch:
        index = task.index.copy()
        bad: dict[str, str] = {}

        def use(i: int) -> None:
            if i in self._broken:
                raise self._broken[i]
            height, width = self._size[i].tolist()
            check_size(self.source, i, height, width, self._min_side)

        for k, wanted in enumerate(task.index.tolist()):
            found = first_good(wanted, len(self.source), use, bad, self._batches.patience)
            if found is None:
                return Batch([], self._plan(task, index[:0]), index, None, task.epoch, task.step, list(bad.items()))
            index[k] = found
        plan = self._plan(task, index)
        images = self._images[torch.from_numpy(index).to(self.device)]
        groups = [render(images, plan.views(slice(2)), self._views.global_crops_size)]
        if self._views.local_crops_number:
            groups.append(render(images, plan.views(slice(2, None)), self._views.local_crops_size))
        label = None if self.source.labels is None else self.source.labels[index]
        return Batch(groups, plan, index, label, task.epoch, task.step, list(bad.items()))

    def _plan(self, task: Task, index: np.ndarray) -> ViewPlan:
        return plan_views(self._views, self.seed, task.epoch, index, self._size[index])


def render(images: Tensor, plan: ViewPlan, size: int) -> Tensor:
    """As `data.render`: uint8 images (n, 3, H, W) on any device, a plan of V views -> uint8 (V, n, 3, size, size)."""
    n, count = plan.flip.shape
    height, width = images.shape[-2:]
    out = torch.empty(count, n, 3, size, size, dtype=torch.uint8, device=images.device)
    step = max(1, _PART // (size * max(height, width)))
    for v in range(count):
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            out[v, part] = _render(images[part], plan.box[part, v], plan.flip[part, v], size)
    return out


def _render(images: Tensor, box: np.ndarray, flip: np.ndarray, size: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left, h, w = torch.from_numpy(box.astype(np.int64)).to(images.device).unbind(1)
    across = weights(left, w, size, width)  # (n, size, W)
    mirrored = torch.from_numpy(flip).to(images.device)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)[:, None].transpose(2, 3)  # (n, 1, W, size)
    down = weights(top, h, size, height)[:, None]  # (n, 1, size, H)
    tall = (h - size > 2 * (w - size).clamp(min=0)) & _PILLOW_TURNS
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    for vertical_first in (False, True):
        which = (tall == vertical_first).nonzero()[:, 0]
        if len(which):
            x = images[which].float()
            if vertical_first:
                x = _rounded(down[which] @ x) @ across[which]
            else:
                x = down[which] @ _rounded(x @ across[which])
            out[which] = _rounded(x).to(torch.uint8)
    return out


def _rounded(x: Tensor) -> Tensor:
    """To 8 bits, halves upwards."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def weights(begin: Tensor, length: Tensor, size: int, whole: int) -> Tensor:
    """Pillow's bicubic weights of n crops begin:begin+length (n,) of `whole` pixels -> float32 (n, size, whole)."""
    scale = length.double()[:, None] / size  # (n, 1)
    wide = scale.clamp(min=1)
    center = (torch.arange(size, device=begin.device) + 0.5) * scale  # (n, size)
    low = (center - 2 * wide + 0.5).trunc().clamp(min=0)
    high = torch.minimum((center + 2 * wide + 0.5).trunc(), length[:, None].double())
    place = torch.arange(whole, device=begin.device) - begin[:, None, None]  # (n, 1, whole), within the crop
    x = ((place - center.float()[..., None] + 0.5) / wide.float()[..., None]).abs()
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    far = ((x - 5) * x).add_(8).mul_(x).sub_(4).mul_(-0.5)
    value = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    value *= (place >= low[..., None]) & (place < high[..., None])
    return value.div_(value.sum(-1, keepdim=True))
