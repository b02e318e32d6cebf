"""Vision Mamba (docs/methods.md section 4): a state-space model that reads the patches as one sequence.

`vim_{tiny,small,base}_patch16` is Vim itself: both directions, each with its own parameters, RMSNorm. `_uni` is the
single-direction form with LayerNorm that the LGP paper's table calls ViM; `_lgp` is LGP in place of positions.
Parameter names are the public Vim's, but for timm's `blocks` and `norm` where it says `layers` and `norm_f`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, lecun_normal_
from torch import Tensor, nn

from nearfar.ssl.backbones.lgp_vim import VimLGPPatchEmbed
from nearfar.ssl.backbones.prr import prr
from nearfar.ssl.backbones.scan import Scan, choose_scan, selective_scan
from nearfar.ssl.backbones.token_model import (
    Grid,
    TokenModel,
    add_scaled,
    drawn_scale,
    register,
    resize_positions,
)
from nearfar.ssl.backbones.tokens import check_size, pad_to_multiple
from nearfar.ssl.backbones.vit import WIDTHS, PatchEmbed
from nearfar.ssl.errors import UserError

STATE = 16  # numbers of state for each channel
CONV = 4  # taps of the causal convolution


class Mixer(nn.Module):
    """The Mamba mixer, (B, L, dim) to the same; `bidirectional` adds a second scan, from the end to the start.

    Each direction has its own convolution, x_proj, dt_proj, A and D (the backward ones end in _b); in_proj, the gate
    and out_proj are shared. What the two directions give is averaged.
    """

    def __init__(self, dim: int, bidirectional: bool, scan: Scan) -> None:
        super().__init__()
        inner = 2 * dim
        self.bidirectional = bidirectional
        self.scan = scan
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D = _direction(inner, dim)
        if bidirectional:
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b = _direction(inner, dim)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        y = self._read(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.bidirectional:
            y = (y + self._read(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, True)) / 2
        out: Tensor = self.out_proj(y * F.silu(z))
        return out

    def _read(
        self,
        x: Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        a_log: Tensor,
        d: Tensor,
        reverse: bool = False,
    ) -> Tensor:
        """One direction, start to end or (`reverse`) end to start, (B, L, inner) to the same."""
        weight, first = (conv.weight.flip(-1), CONV - 1) if reverse else (conv.weight, 0)
        mixed = F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=CONV - 1, groups=conv.groups)
        x = F.silu(mixed[..., first : first + x.shape[1]]).transpose(1, 2)  # padded on both sides: drop the rest
        dt, b, c = x_proj(x).split([dt_proj.in_features, STATE, STATE], -1)
        precise = torch.promote_types(a_log.dtype, torch.float32)  # rounding would be amplified by the exponential
        dt = F.softplus(F.linear(dt, dt_proj.weight).to(precise) + dt_proj.bias.to(precise))
        return selective_scan(x, dt, -torch.exp(a_log.to(precise)), b, c, d, self.scan, reverse)


def _direction(inner: int, dim: int) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, nn.Parameter, nn.Parameter]:
    """Parameters of one direction, initialized as docs/methods.md section 4 says: conv1d, x_proj, dt_proj, A_log, D."""
    rank = math.ceil(dim / 16)
    conv = nn.Conv1d(inner, inner, CONV, padding=CONV - 1, groups=inner)
    x_proj = nn.Linear(inner, rank + 2 * STATE, bias=False)
    dt_proj = nn.Linear(rank, inner)
    nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
    with torch.no_grad():
        steps = torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
    a_log = torch.arange(1, STATE + 1, dtype=torch.float32).log().repeat(inner, 1)
    return conv, x_proj, dt_proj, nn.Parameter(a_log), nn.Parameter(torch.ones(inner))


class VimBlock(nn.Module):
    """Pre-norm residual block on a residual stream of at least float32; `layer_scale` as in the ViT's block."""

    def __init__(
        self, dim: int, bidirectional: bool, drop_path: float, scan: Scan, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm = make_norm(dim, bidirectional)
        self.mixer = Mixer(dim, bidirectional, scan)
        self.ls = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, compiled: Callable[..., Tensor] | None = None) -> Tensor:
        """`compiled`: a compiled `residual`; random numbers are drawn out here, so that it draws none."""
        return (compiled or VimBlock.residual)(self, x, drawn_scale(self.drop_path, x))

    def residual(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The branch, scaled by its draw of stochastic depth (B, 1, 1); None leaves it as it is."""
        return add_scaled(x, self.ls(self.mixer(self.norm(x.to(self.norm.weight.dtype)))), scale)


def make_norm(dim: int, bidirectional: bool) -> nn.RMSNorm | nn.LayerNorm:
    return nn.RMSNorm(dim, eps=1e-5) if bidirectional else nn.LayerNorm(dim, eps=1e-5)


class VisionMamba(TokenModel):
    """Vim with timm's interface. CLS stands in the middle of the sequence, and comes first in the output.

    Args:
        img_size: the size it is made for, which sets the position embedding; any other size runs too (positions are
            interpolated, sides that are not a multiple of the patch size padded).
        num_heads: heads of PRR; nothing else here has heads. Default: 64 wide each
            (width // 64, or the next lower number that divides the width).
        bidirectional: read from both ends (RMSNorm), or only from the start (LayerNorm; `_uni`).
        lgp: LGP patch embedding, and then no position embedding; `levels` and `wavelet` are its packet's.
        prr: parameter-free refinement of all tokens after the final norm.
        scan: see `choose_scan`.
        drop_path_rate: stochastic depth, rising linearly to this over the blocks.
        global_pool: "token" (CLS), "avg" (patches) or "all" (CLS and patches).
        mask_token: learn a token that stands in for hidden patches (iBOT); without one no `masks` can be given.
        layer_scale: each block's branch is multiplied by a learned vector that starts at this.

    Parameters for 224 pixels, patch size 16, the position embedding (or LGP) and a head for 1000 classes:
    vim 7,148,008 / 25,796,584 / 97,598,440; vim_uni 6,424,744 / 23,907,688 / 92,051,176; LGP adds 226,754 / 674,690 /
    2,234,114 to either.
    """

    def __init__(  # noqa: PLR0913 - a network's settings, each by name
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 24,
        num_heads: int | None = None,
        num_classes: int = 1000,
        bidirectional: bool = True,
        lgp: bool = False,
        prr: bool = False,
        levels: int | Literal["auto"] = "auto",
        wavelet: str = "haar",
        scan: Scan = "auto",
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        mask_token: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        num_heads = num_heads or next(n for n in range(max(1, embed_dim // 64), 0, -1) if embed_dim % n == 0)
        if embed_dim % num_heads:
            raise UserError(f"A width of {embed_dim} is not divisible by num_heads={num_heads} (for PRR).")
        if not lgp and (levels, wavelet) != ("auto", "haar"):
            raise UserError(f"levels={levels} and wavelet={wavelet} are settings of LGP; turn on lgp or omit them.")
        choose_scan(scan, "cuda" if torch.cuda.is_available() else "cpu")  # an impossible choice fails here already
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size: Grid = (-(-height // patch_size), -(-width // patch_size))
        self.patch_size = patch_size
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = 1
        self.prr = prr
        self.scan = scan
        self.patch_embed: nn.Module = (
            VimLGPPatchEmbed(patch_size, embed_dim, levels, wavelet) if lgp else PatchEmbed(patch_size, embed_dim)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        positions = 1 + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = None if lgp else nn.Parameter(torch.empty(1, positions, embed_dim))  # CLS's in the middle too
        self.blocks = nn.ModuleList(
            VimBlock(embed_dim, bidirectional, rate, scan, layer_scale)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm = make_norm(embed_dim, bidirectional)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self._init_weights()
        self.reset_classifier(num_classes, global_pool)

    def _init_weights(self) -> None:
        projection: nn.Conv2d = self.patch_embed.proj  # type: ignore[assignment]
        lecun_normal_(projection.weight)
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for block in self.blocks:
            out: Tensor = block.mixer.out_proj.weight  # type: ignore[union-attr,assignment]
            nn.init.kaiming_uniform_(out, math.sqrt(5))
            with torch.no_grad():
                out /= math.sqrt(len(self.blocks))

    def embed(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Grid]:
        """The sequence (B, h*w + 1, D) that enters the first block, CLS at h*w // 2, and its grid.

        `masks`: see `hide`.
        """
        check_size(images, self.patch_size)
        images = pad_to_multiple(images, self.patch_size)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = self.hide(self.patch_embed(images), masks)
        x = _insert(patches, self.cls_token.expand(patches.shape[0], -1, -1))
        x = x.to(torch.promote_types(self.cls_token.dtype, torch.float32))  # the residual stream
        if self.pos_embed is None:
            return x, grid
        positions: Tensor = self.pos_embed
        if grid != self.grid_size:
            cls, others = _take(positions)
            positions = _insert(resize_positions(others, self.grid_size, grid), cls)
        return x + positions, grid

    def run(
        self, images: Tensor, keep: Sequence[int] = (), masks: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Grid]:
        x, grid = self.embed(images, masks)
        kept = []
        for index, block in enumerate(self.blocks):
            x = self.through(block, x)
            if index in keep:
                kept.append(x)
        last, *kept = (torch.cat(_take(y), 1).to(self.cls_token.dtype) for y in (x, *kept))
        return last, kept, grid

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.norm(self.run(x, masks=masks)[0])
        return prr(x, self.num_heads) if self.prr else x


def _insert(patches: Tensor, cls: Tensor) -> Tensor:
    """CLS into the middle of the patches."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], cls.to(patches.dtype), patches[:, middle:]], 1)


def _take(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_insert`: CLS (B, 1, D) and patches (B, L - 1, D)."""
    middle = (x.shape[1] - 1) // 2
    return x[:, middle : middle + 1], torch.cat([x[:, :middle], x[:, middle + 1 :]], 1)


for _size, _uni, _lgp in product(WIDTHS, (False, True), (False, True)):
    register(
        f"vim_{_size}_patch16" + "_uni" * _uni + "_lgp" * _lgp,
        partial(VisionMamba, embed_dim=WIDTHS[_size][0], bidirectional=not _uni, lgp=_lgp),
    )
