from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.transforms.crops import render
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings.run import ViewSettings

VIEWS = ViewSettings(global_crops_size=24, local_crops_size=16, local_crops_number=3)


def noise(n: int = 50, height: int = 20, width: int = 26, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(8, 60), st.integers(8, 60))
def test_views_equal_torchvision_on_pillow_images(seed: int, height: int, width: int) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    image = Image.fromarray(noise(1, height, width, seed)[0])
    plan = plan_views(VIEWS, seed, 0, [0], [(height, width)])
    for which, side in ((slice(2), 24), (slice(2, None), 16)):
        part = plan.views(which)
        out = render([image], part, side)
        for v in range(out.shape[0]):
            expected = TF.resized_crop(image, *part.box[0, v].tolist(), [side, side], InterpolationMode.BICUBIC)
            expected = TF.hflip(expected) if part.flip[0, v] else expected
            assert torch.equal(out[v, 0], TF.pil_to_tensor(expected))
