"""LGP, local and global patching (docs/methods.md section 1): a patch embedding that makes positions unnecessary.

The "global" path reads a full 2-D wavelet packet of the image. What it carries across patches depends on the wavelet:

- Haar with as many levels as the patch size has doublings ("auto") is an orthonormal Walsh-Hadamard map of every patch
  by itself. It carries nothing across patches: changing one patch changes one cell. Only the zero-padded 3x3
  convolutions behind it reach neighbors. It folds exactly into the projection behind it: both paths are one product.
- Longer wavelets (db2, db4, sym4, ...) and deeper packets do reach across patches, and are computed in full.
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from nearfar.ssl.backbones.tokens import check_size, without_autocast
from nearfar.ssl.errors import UserError

COLORS = 3


class Separable(nn.Sequential):
    """Depthwise 3x3 (without bias unless asked), then pointwise 1x1 (bias)."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self
        return pointwise(layers[0](x), layers[1])


def pointwise(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1x1 convolution as a matrix product with channels last: on CPUs several times faster than torch's own."""
    return F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


class LGPPatchEmbed(nn.Module):
    """Images (B, 3, H, W), sides multiples of `patch_size`, to patch tokens (B, h*w, embed_dim).

    Args:
        levels: depth of the wavelet packet; "auto" is log2(patch_size), whose sub-bands lie exactly on the token
            grid. Any other depth is resampled to the grid.
        wavelet: a PyWavelets name of a discrete wavelet.
        drop_path: share of training samples for which the fused path is dropped and the local one passes alone.

    Raises UserError for an unknown wavelet, and for a patch size that is not a power of two when levels is "auto".
    """

    packet: Tensor
    packet_at: Tensor

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        levels: int | Literal["auto"] = "auto",
        wavelet: str = "haar",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        log2 = int(math.log2(patch_size)) if patch_size > 0 else 0
        if levels == "auto":
            if patch_size < 2 or 2**log2 != patch_size:
                raise UserError(
                    f"LGP cuts patches by halving, so its patch size must be a power of two (2, 4, 8, 16, ...), not "
                    f"{patch_size}; choose another patch size, or set the number of wavelet levels yourself."
                )
            levels = log2
        if levels < 1:
            raise UserError(f"LGP needs at least one wavelet level, not {levels}.")
        if levels > 6:
            raise UserError(f"{levels} wavelet levels make {4**levels:,} sub-bands a color; LGP takes 6 at most.")
        self.patch_size = patch_size
        self.levels = levels
        self.filters = wavelet_filters(wavelet)
        self.folds = len(self.filters[0]) == 2 and 2**levels == patch_size
        self.band_order: Tensor | None = None  # see `bands_permuted`
        self._make_layers(embed_dim, COLORS * 4**levels, drop_path)
        if self.folds:
            packet = packet_matrix(patch_size, levels, self.filters)[:, 0]  # of one patch, along one side
            self.register_buffer("packet", torch.from_numpy(packet), persistent=False)
            self.register_buffer("packet_at", torch.from_numpy(np.argsort(_interleaved(levels))), persistent=False)

    def _make_layers(self, embed_dim: int, bands: int, drop_path: float) -> None:
        """`proj`, `bands_proj` and what `forward` puts behind them; another form of LGP overrides both."""
        patch_size = self.patch_size
        self.proj = nn.Conv2d(COLORS, embed_dim, patch_size, patch_size)
        self.local_mix = Separable(embed_dim)
        self.bands_proj = nn.Conv2d(bands, embed_dim, 1)
        self.bands_mix = Separable(embed_dim)
        self.bands_out = nn.Conv2d(embed_dim, embed_dim, 1)
        self.gate = nn.Parameter(torch.zeros(embed_dim))
        self.fuse = nn.Sequential(Separable(embed_dim), nn.ReLU(), Separable(embed_dim), nn.ReLU())
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.out = Separable(embed_dim)
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        local, bands = self.project(images)
        local = self.local_mix(F.gelu(local))
        bands = pointwise(F.gelu(self.bands_mix(F.gelu(bands))), self.bands_out)
        gate = (torch.tanh(self.gate)[:, None, None] + 1) / 2
        fused = local + gate * (bands - local)
        x = self.out(local + self.drop_path(self.fuse(fused)))
        return self.norm(x.flatten(2).transpose(1, 2))

    def project(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two projections, each (B, embed_dim, h, w): of the raw patches, and of the wavelet packet.

        float32 whatever autocast says: high-frequency bands are small differences of large pixel values.
        """
        size = self.patch_size
        check_size(images, size)
        with without_autocast(images.device.type):
            images = images.to(self.proj.weight.dtype)
            if self.folds:
                weight = torch.cat([self.proj.weight.flatten(1), self._folded().flatten(1)])
                bias = torch.cat([_bias(self.proj), _bias(self.bands_proj)])
                cells = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
                # Channels come last from here on, which is also the faster layout for the 3x3 convolutions.
                local, bands = F.linear(cells.flatten(3), weight, bias).permute(0, 3, 1, 2).chunk(2, 1)
            else:
                local = self.proj(images)
                packet = self.packet_of(images).unflatten(1, (-1, COLORS)).transpose(0, 1)
                packet = self._in_order(packet).transpose(0, 1).flatten(1, 2)
                bands = self.bands_proj(self.resample(packet, local.shape[-2:]))
        return local, bands

    def _folded(self) -> Tensor:
        """The packet and its projection as one kernel (embed_dim, 3, patch_size, patch_size)."""
        weight = self.bands_proj.weight.flatten(1).unflatten(1, (-1, COLORS)).transpose(1, 2)
        packet_at = self.packet_at
        if self.band_order is not None:
            packet_at = torch.argsort(self.band_order.to(packet_at.device))[packet_at]
        bands = weight[..., packet_at].unflatten(2, (self.patch_size, self.patch_size))  # (.., .., rows, columns)
        return self.packet.T @ bands @ self.packet

    def _in_order(self, bands: Tensor) -> Tensor:
        return bands if self.band_order is None else bands[self.band_order.to(bands.device)]

    def packet_of(self, images: Tensor) -> Tensor:
        """The packet in full, (B, 3 * 4**levels, H / 2**levels, W / 2**levels), channel = 3 * packet + color."""
        height, width = images.shape[-2:]
        down, across = (
            torch.from_numpy(packet_matrix(side, self.levels, self.filters)).to(images) for side in (height, width)
        )
        x = torch.einsum("pyh,bchw,qxw->bpqcyx", down, images, across)
        return x.flatten(1, 2)[:, _interleaved(self.levels)].flatten(1, 2)

    @staticmethod
    def resample(packet: Tensor, grid: torch.Size) -> Tensor:
        if packet.shape[-2:] == grid:
            return packet
        return F.interpolate(packet, size=grid, mode="bilinear", antialias=True)


@contextmanager
def bands_permuted(model: nn.Module, order: Tensor) -> Iterator[None]:
    """Within this context every LGP embedding of `model` reads sub-band order[i] where it read i.

    `order` is a permutation of 4**levels numbers. The weights stay as they are: it measures how much the order matters
    (band shuffle, docs/methods.md section 1).
    Raises UserError for a model without LGP, and for an order of another length.
    """
    embeds = [module for module in model.modules() if isinstance(module, LGPPatchEmbed)]
    if not embeds:
        raise UserError("This model has no LGP patch embedding, so it has no wavelet sub-bands to permute.")
    for embed in embeds:
        if sorted(order.tolist()) != list(range(4**embed.levels)):
            raise UserError(f"The order of LGP's sub-bands must be a permutation of {4**embed.levels} numbers.")
    try:
        for embed in embeds:
            embed.band_order = order
        yield
    finally:
        for embed in embeds:
            embed.band_order = None


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


Filters = tuple[tuple[float, ...], tuple[float, ...]]


def wavelet_filters(wavelet: str) -> Filters:
    """Low-pass and high-pass analysis filters of a discrete wavelet, in convolution order."""
    if wavelet in ("haar", "db1"):
        root = math.sqrt(0.5)
        return (root, root), (-root, root)
    import pywt  # only needed for wavelets other than Haar

    names: list[str] = pywt.wavelist(kind="discrete")
    if wavelet not in names:
        near = difflib.get_close_matches(wavelet, names, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else " haar, db2, db4, sym4 and coif1 are some."
        raise UserError(f"There is no discrete wavelet called {wavelet!r}.{hint}")
    found = pywt.Wavelet(wavelet)
    return tuple(found.dec_lo), tuple(found.dec_hi)


@lru_cache(maxsize=32)
def packet_matrix(length: int, levels: int, filters: Filters) -> np.ndarray:
    """The 1-D periodized packet transform of a signal, as a (2**levels, ceil(length / 2**levels), length) matrix.

    Natural order, the first level being the most significant bit (0 = low-pass). A level of odd length repeats its
    last sample. The 2-D packet is this matrix along both sides, because every level of it is separable.
    """
    signal = np.eye(length)[None]  # (packets, samples, length)
    taps = np.arange(len(filters[0]))
    for _ in range(levels):
        if signal.shape[1] % 2:
            signal = np.concatenate([signal, signal[:, -1:]], 1)
        samples = signal.shape[1]
        at = (2 * np.arange(samples // 2)[:, None] + taps + 1 - len(taps) // 2) % samples
        halves = [np.einsum("t,pstl->psl", np.array(f)[::-1], signal[:, at]) for f in filters]
        signal = np.stack(halves, 1).reshape(-1, samples // 2, length)
    return signal.astype(np.float32)


@lru_cache(maxsize=8)
def _interleaved(levels: int) -> np.ndarray:
    """For each packet in natural order (base-4 digits LL, LH, HL, HH) its position in a (rows, columns) table.

    LH is low along the width and high along the height, as in pytorch_wavelets.
    """
    positions = []
    for packet in range(4**levels):
        row = column = 0
        for level in reversed(range(levels)):
            digit = packet >> 2 * level & 3
            row, column = 2 * row + (digit & 1), 2 * column + (digit >> 1)
        positions.append(row * 2**levels + column)
    return np.array(positions)
