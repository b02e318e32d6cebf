"""Views made on the training device, for data whose pixels all fit into its memory: same order, plan and batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nearfar.ssl.data.loaders.base import Batch, Loader, LoaderOptions, Task
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.device_crops import copied_to_device, render_on_device
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.settings.run import ViewSettings


class DeviceLoader(Loader):
    """`Loader` with every image on `device`, uint8, from the start.

    `workers` threads read them, once; images of several sizes are padded to the largest. Batches lie on the device.
    Raises UserError where the images need more than `share` of the memory that is free there (or of 16 GiB on a CPU).
    """

    title = "device loader"

    def __init__(
        self, source: Source, views: ViewSettings, options: LoaderOptions, *, device: torch.device, share: float = 0.5
    ) -> None:
        super().__init__(source, views, options)
        self.device = device
        self._broken: dict[int, BadImage] = {}
        self._load(options.workers, share)

    def _load(self, workers: int, share: float) -> None:
        def read(i: int) -> np.ndarray | BadImage:
            try:
                image = self.source.read(i)
                self.check_size(i, image.height, image.width)
                return np.asarray(image).transpose(2, 0, 1)
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
                        f"{free / 2**30:.1f} GiB may be taken. Choose data.loader=ffcv or pillow."
                    )
        self._images = torch.zeros(n, 3, height, width, dtype=torch.uint8, device=self.device)
        for i, pixels in enumerate(kept):
            if pixels is not None:
                self._images[i, :, : pixels.shape[1], : pixels.shape[2]] = torch.from_numpy(pixels.copy())
                self.decoded += 1

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 2**34

    def assemble(self, task: Task) -> Batch:
        def use(_: int, i: int) -> None:
            if i in self._broken:
                raise self._broken[i]

        taken = self.take(task.index, use)
        index = taken.index if taken.complete else taken.index[:0]
        plan = plan_views(self.views, self.options.seed, task.epoch, index, self._size[index])
        groups = []
        if taken.complete:
            images = self._images[copied_to_device(index, self.device)]
            views = self.views
            groups = [render_on_device(images, plan.views(slice(views.global_crops)), views.global_crops_size)]
            if views.local_crops_number:
                of_local = plan.views(slice(views.global_crops, None))
                groups.append(render_on_device(images, of_local, views.local_crops_size))
        return self.batch(task, taken, groups, plan)
