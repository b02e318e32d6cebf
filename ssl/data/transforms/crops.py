"""Crop, resize and flip with Pillow, the reference for the other implementations (compiled, on a device)."""

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from nearfar.ssl.data.views import ViewPlan

# Before version 13 Pillow's first pass is always horizontal; since then vertical where the second has less to do.
VERTICAL_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
_BICUBIC = Image.Resampling.BICUBIC


def render(images: list[Image.Image], plan: ViewPlan, size: int) -> Tensor:
    """Crop, resize (Pillow's antialiased bicubic), flip: n images, a plan of V views -> uint8 (V, n, 3, size, size)."""
    n, count = plan.flip.shape
    out = np.empty((count, n, 3, size, size), np.uint8)
    for k, image in enumerate(images):
        for v, (top, left, height, width) in enumerate(plan.box[k].tolist()):
            # Cropped first: resize(box=...) would let the filter see pixels outside the crop.
            view = image.crop((left, top, left + width, top + height)).resize((size, size), _BICUBIC)
            pixels = np.asarray(view)
            out[v, k] = (pixels[:, ::-1] if plan.flip[k, v] else pixels).transpose(2, 0, 1)
    return torch.from_numpy(out)
