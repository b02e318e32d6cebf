"""LGP in the form for Vision Mamba (docs/methods.md section 1); the wavelet packet and its fold are those of `lgp`."""

from typing import Literal

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones.lgp import LGPPatchEmbed, Separable


class VimLGPPatchEmbed(LGPPatchEmbed):
    """Images (B, 3, H, W), sides multiples of `patch_size`, to patch tokens (B, h*w, embed_dim).

    Lighter than the ViT form: no GELU, no norm, two scalar weights in place of a gate, and an outer residual. Tokens
    and sub-bands meet on the patch grid, before CLS comes between the tokens.
    """

    def __init__(
        self, patch_size: int, embed_dim: int, levels: int | Literal["auto"] = "auto", wavelet: str = "haar"
    ) -> None:
        super().__init__(patch_size, embed_dim, levels, wavelet)

    def _make_layers(self, embed_dim: int, bands: int, drop_path: float) -> None:
        assert drop_path == 0  # this form has no path to drop
        self.proj = nn.Conv2d(3, embed_dim, self.patch_size, self.patch_size)
        self.bands_proj = nn.Conv2d(bands, embed_dim, 1)
        self.weights = nn.Parameter(torch.full((2,), 0.5))  # of the patches and of the sub-bands
        self.fuse = nn.Sequential(
            Separable(embed_dim, bias=True), nn.ReLU(), Separable(embed_dim, bias=True), nn.ReLU()
        )
        self.out = Separable(embed_dim, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        patches, bands = self.project(images)
        fused = self.fuse(self.weights[0] * patches + self.weights[1] * bands)
        x = patches + self.out(fused + patches)
        return x.flatten(2).transpose(1, 2)
