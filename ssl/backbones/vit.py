"""Our vision transformer: plain ViT by default, with LGP, GAug, PRR and registers as independent switches.

Parameter names are timm's, so plain timm and DINO weights load strictly. Importing the package also registers
`vit_{tiny,small,base}_patch16` + `_lgp` + `_locat` (GAug and PRR) + `_reg4` + `_rope` with timm.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from nearfar.ssl.backbones.attention import attend
from nearfar.ssl.backbones.gaug import GaugBias
from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.backbones.prr import prr
from nearfar.ssl.backbones.rope import AxialRope, rotate
from nearfar.ssl.backbones.token_model import (
    Grid,
    TokenModel,
    add_scaled,
    drawn_scale,
    register,
    resize_positions,
)
from nearfar.ssl.backbones.tokens import check_size, pad_to_multiple
from nearfar.ssl.errors import UserError

WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # embed_dim, num_heads; depth 12

Rotation = tuple[Tensor, Tensor]  # sine and cosine of rotary positions


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to patch tokens (B, h*w, D) by one strided convolution."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(images)
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, with the GAug bias on its logits when `gaug_grid` is given."""

    def __init__(self, dim: int, num_heads: int, gaug_grid: Grid | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.gaug = None if gaug_grid is None else GaugBias(dim // num_heads, gaug_grid)

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        gaug_q, k, v = self._heads(x)
        q = gaug_q
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = attend(q, k, v) if self.gaug is None else self.gaug.attend(q, k, v, grid, gaug_q)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def weights(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        """(B, heads, N, N): the softmax that `forward` applies to the values, in float32."""
        gaug_q, k, _ = self._heads(x)
        q = gaug_q
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        logits = (q @ k.transpose(-2, -1)).float() * self.scale
        if self.gaug is not None:
            logits = logits + self.gaug(gaug_q, grid)
        return logits.softmax(-1)

    def queries(self, x: Tensor) -> Tensor:
        """(B, heads, N, head_dim): the queries that GAug reads, before scaling and any rotation."""
        return self._heads(x)[0]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x


class Block(nn.Module):
    """Pre-norm transformer block; `drop_path` drops each residual branch for that share of the samples.

    `layer_scale`: each branch is multiplied by a learned vector that starts at this (CaiT, section 2); None: not.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: float, gaug_grid: Grid | None, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, gaug_grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls1, self.ls2 = (LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        rotation: Rotation | None = None,
        compiled: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """`compiled`: a compiled `residuals`; random numbers are drawn out here, so that it draws none."""
        residuals = compiled or Block.residuals
        return residuals(self, x, grid, rotation, drawn_scale(self.drop_path, x), drawn_scale(self.drop_path, x))

    def residuals(
        self, x: Tensor, grid: Grid, rotation: Rotation | None, first: Tensor | None, second: Tensor | None
    ) -> Tensor:
        """Both branches, each scaled by its draw of stochastic depth (B, 1, 1); None leaves it as it is."""
        x = add_scaled(x, self.ls1(self.attn(self.norm1(x), grid, rotation)), first)
        return add_scaled(x, self.ls2(self.mlp(self.norm2(x))), second)


class VisionTransformer(TokenModel):
    """ViT with timm's interface. Tokens are CLS, registers, patches row by row.

    Args:
        img_size: the size it is made for, which sets the position embedding and GAug's grid; any other size runs
            too (positions are interpolated, sides that are not a multiple of the patch size padded).
        pos_size: the size the position embedding is made for, where that is another (224 for DINO's weights).
        pos_antialias: positions reach other sizes antialiased, as in timm and DINOv2 with registers, not as in DINO.
        no_positions: neither learned nor rotary positions: the tokens know nothing of their places.
        lgp: LGP patch embedding, and then no position embedding; `levels` and `wavelet` are its packet's.
        gaug: Gaussian bias on the attention logits of every block.
        prr: parameter-free refinement of all tokens after the final norm.
        registers: learned tokens after CLS, without positions.
        rope: axial rotary positions inside attention in place of learned ones.
        drop_path_rate: stochastic depth, rising linearly to this over the blocks; LGP's own fused path uses it too.
        global_pool: "token" (CLS), "avg" (patches) or "all" (CLS and patches; the reference head of LGP).
        mask_token: learn a token that stands in for hidden patches (iBOT); without one no `masks` can be given.
        layer_scale: see `Block`.
    """

    def __init__(  # noqa: PLR0913 - a network's settings, each by name
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        lgp: bool = False,
        gaug: bool = False,
        prr: bool = False,
        registers: int = 0,
        rope: bool = False,
        levels: int | Literal["auto"] = "auto",
        wavelet: str = "haar",
        drop_path_rate: float = 0.0,
        global_pool: str | None = None,
        pos_size: int | None = None,
        pos_antialias: bool = False,
        no_positions: bool = False,
        mask_token: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"A width of {embed_dim} is not divisible by num_heads={num_heads}.")
        if not lgp and (levels, wavelet) != ("auto", "haar"):
            raise UserError(f"levels={levels} and wavelet={wavelet} are settings of LGP; turn on lgp or omit them.")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size: Grid = (-(-height // patch_size), -(-width // patch_size))
        learned = _learns_positions(lgp or rope, no_positions, pos_size, pos_antialias)
        self.pos_antialias = pos_antialias
        self.pos_grid: Grid = self.grid_size if pos_size is None else (-(-pos_size // patch_size),) * 2
        self.patch_size = patch_size
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = 1 + registers
        self.prr = prr
        self.patch_embed: nn.Module = (
            LGPPatchEmbed(patch_size, embed_dim, levels, wavelet, drop_path_rate)
            if lgp
            else PatchEmbed(patch_size, embed_dim)
        )
        self.rope = AxialRope(embed_dim // num_heads) if rope else None
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        positions = 1 + self.pos_grid[0] * self.pos_grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim)) if learned else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, rate, self.grid_size if gaug else None, layer_scale)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self._init_weights()
        self.reset_classifier(num_classes, global_pool or ("all" if lgp else "token"))

    def _init_weights(self) -> None:
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Grid]:
        """The sequence (B, 1 + registers + h*w, D) that enters the first block, and its grid; `masks`: see `hide`."""
        check_size(images, self.patch_size)
        images = pad_to_multiple(images, self.patch_size)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = self.hide(self.patch_embed(images), masks)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            patches = patches + resize_positions(self.pos_embed[:, 1:], self.pos_grid, grid, self.pos_antialias)
            cls = cls + self.pos_embed[:, :1]
        prefix = cls if self.reg_token is None else torch.cat([cls, self.reg_token], 1)
        return torch.cat([prefix.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], 1), grid

    def run(
        self, images: Tensor, keep: Sequence[int] = (), masks: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Grid]:
        x, grid = self.embed(images, masks)
        rotation = None if self.rope is None else self.rope(grid)
        kept = []
        for index, block in enumerate(self.blocks):
            x = self.through(block, x, grid, rotation)
            if index in keep:
                kept.append(x)
        return x, kept, grid

    def last_attention(self, images: Tensor) -> Tensor:
        """(B, heads, R+N, R+N): the softmax attention of the last block, float32."""
        x, grid = self.embed(images)
        rotation = None if self.rope is None else self.rope(grid)
        *first, last = self.blocks
        for block in first:
            x = block(x, grid, rotation)
        weights: Tensor = last.attn.weights(last.norm1(x), grid, rotation)  # type: ignore[operator,union-attr]
        return weights

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.norm(self.run(x, masks=masks)[0])
        return prr(x, self.num_heads) if self.prr else x


def _learns_positions(replaced: bool, no_positions: bool, pos_size: int | None, pos_antialias: bool) -> bool:
    """Has a network learned positions? `replaced`: by LGP or rope. Raises UserError for settings that contradict it."""
    if replaced and no_positions:
        raise UserError("no_positions leaves out learned positions, which LGP and rope do without anyway; omit it.")
    if not (replaced or no_positions):
        return True
    given = {f"pos_size={pos_size}": pos_size is not None, "pos_antialias": pos_antialias}
    if names := [name for name, is_set in given.items() if is_set]:
        raise UserError(
            f"{' and '.join(names)} belongs to learned positions, which LGP, rope and no_positions do without."
        )
    return False


for _size, _lgp, _locat, _registers, _rope in product(WIDTHS, (False, True), (False, True), (0, 4), (False, True)):
    _width, _heads = WIDTHS[_size]
    register(
        f"vit_{_size}_patch16" + "_lgp" * _lgp + "_locat" * _locat + "_reg4" * bool(_registers) + "_rope" * _rope,
        partial(
            VisionTransformer, embed_dim=_width, num_heads=_heads, lgp=_lgp, gaug=_locat, prr=_locat,
            registers=_registers, rope=_rope,
        ),
    )  # fmt: skip
