from __future__ import annotations

import torch

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.transforms.normalize import MEAN, STD, normalize, normalize_pixels


def test_normalize_equals_torchvision() -> None:
    from torchvision.transforms import functional as TF

    pixels = torch.randint(0, 256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = TF.normalize(TF.convert_image_dtype(pixels), MEAN, STD)
    torch.testing.assert_close(normalize_pixels(pixels), expected)
    assert torch.equal(normalize_pixels(pixels), normalize(pixels / 255))
