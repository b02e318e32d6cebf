"""LGP, GAug and PRR on a loaded timm model, in place; its own weights keep their values and names.

    model = timm.create_model("vit_small_patch16_224.dino", pretrained=True)
    add_prr(add_gaug(model))

A graft changes the class of an attention module, or replaces one convolution; so state
dictionaries gain names and (but for position embeddings, which LGP removes) lose none.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from nearfar.ssl.backbones.attention import attend
from nearfar.ssl.backbones.gaug import GaugBias
from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.backbones.prr import prr
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.errors import UserError

# --- LGP -------------------------------------------------------------------------------------------------------


class LGPConv(LGPPatchEmbed):
    """LGP instead of a patchify convolution: images (B, 3, H, W) to (B, embed_dim, h, w)."""

    @property
    def weight(self) -> Tensor:  # timm reads the shape and type of a stem here
        return self.proj.weight

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return super().forward(images).transpose(1, 2).unflatten(2, grid)


def add_lgp(
    model: nn.Module, levels: int | Literal["auto"] = "auto", wavelet: str = "haar", drop_path: float = 0.0
) -> nn.Module:
    """Put LGP where `model` cuts its images into patches, and remove its learned absolute position embeddings.

    The loaded convolution becomes LGP's local path. A norm after the stem replaces LGP's own.
    Rotary positions and relative biases belong to the attention and stay. Returns the model.

    Raises:
        UserError: the model reads its images through anything but one convolution whose stride is its kernel size.
    """
    name = type(model).__name__
    path, stem = next(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), ("", None)
    )
    if any(isinstance(module, LGPPatchEmbed) for module in model.modules()):
        raise UserError(f"This {name} has LGP already.")
    size = stem.kernel_size[0] if stem else 0
    if stem is None or not (stem.kernel_size == stem.stride == (size, size) and stem.padding in ((0, 0), "valid")):
        raise UserError(
            "LGP replaces a convolution that cuts the image into patches (its stride is its kernel size), "
            f"and {name} does not begin with one; choose a model that does, for instance a ViT, EVA, Swin or ConvNeXt."
        )
    owner = model.get_submodule(path.rpartition(".")[0])
    lgp = LGPConv(size, stem.out_channels, levels, wavelet, drop_path).to(stem.weight)
    lgp.proj = stem
    if isinstance(owner, nn.Sequential):
        normed = any(isinstance(module, nn.LayerNorm) for module in owner)
    else:
        normed = not isinstance(getattr(owner, "norm", None), nn.Identity | None)
    if normed:
        lgp.norm = nn.Identity()
    lgp.train(model.training)
    setattr(owner, path.rpartition(".")[2], lgp)
    for module in model.modules():
        positions = module._parameters.get("pos_embed")
        if positions is None:
            continue
        if isinstance(module, TimmVisionTransformer | Eva | Beit | VisionTransformer) and not isinstance(
            module, VisionTransformerDistilled
        ):
            module.pos_embed = None
        else:  # a model that insists on an embedding adds zeros
            del module.pos_embed
            module.register_buffer("pos_embed", torch.zeros_like(positions), persistent=False)
    return model


# --- GAug ------------------------------------------------------------------------------------------------------


class Grids:
    """The token grid that belongs to a number of patches, as the stem last saw it (a hook on the stem)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.of: dict[int, tuple[int, int]] = {}

    def __call__(self, stem: Any, args: tuple[Any, ...]) -> None:
        height, width = stem.dynamic_feat_size(tuple(args[0].shape[-2:]))
        known = self.of.get(height * width, (height, width))
        if known != (height, width) and getattr(self.model, "grad_checkpointing", False) and self.model.training:
            raise UserError(
                f"Views of {known[0]}x{known[1]} and {height}x{width} patches have equally many tokens, which GAug on "
                "a timm model cannot tell apart under gradient checkpointing; use one shape, or turn checkpointing off."
            )
        self.of[height * width] = (height, width)


class _GaugTokens(nn.Module):
    """Adds `add_gaug`'s bias to one of timm's attentions over a sequence of prefix and patch tokens."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        me: Any = self
        if attn_mask is not None or is_causal:
            raise UserError("GAug does not work with attention masks; run the model without them.")
        gaug_q, q, k, v = split_heads(me, x, rope)
        y = me.norm(me.gaug.attend(q, k, v, self.grid(x), gaug_q).transpose(1, 2).flatten(2))
        if me.gate is not None:
            y = y * me.gate(x).sigmoid()
        out: Tensor = me.proj_drop(me.proj(y))
        return out

    def grid(self, x: Tensor) -> tuple[int, int]:
        me: Any = self
        patches = x.shape[1] - me.gaug_prefix
        if patches not in me.gaug_grids.of:
            raise UserError(
                f"GAug needs every patch of the image, and {patches} tokens are not a grid; turn patch dropout off."
            )
        grid: tuple[int, int] = me.gaug_grids.of[patches]
        return grid


class GaugAttention(_GaugTokens, Attention):
    pass


class GaugAttentionRope(_GaugTokens, AttentionRope):
    pass


class GaugEvaAttention(_GaugTokens, EvaAttention):
    pass


class _GaugWindows(nn.Module):
    """The bias (windows, heads, N, N) of one of timm's window attentions: relative positions, mask, and GAug."""

    def bias(self, gaug_q: Tensor, relative: Tensor, mask: Tensor | None) -> Tensor:
        me: Any = self
        bias: Tensor = me.gaug(gaug_q, tuple(me.window_size)) + relative
        if mask is not None:  # (windows of an image, N, N)
            bias = (bias.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
        return bias.to(gaug_q.dtype)


class GaugWindow(_GaugWindows, WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        me: Any = self
        q, k, v = me.qkv(x).unflatten(-1, (3, me.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = me.window_size[0] * me.window_size[1]
        relative = me.relative_position_bias_table[me.relative_position_index.flatten()]
        relative = relative.unflatten(0, (tokens, tokens)).permute(2, 0, 1)
        y = attend(q, k, v, self.bias(q, relative, mask))
        out: Tensor = me.proj_drop(me.proj(y.transpose(1, 2).flatten(2)))
        return out


class GaugWindowV2(_GaugWindows, WindowAttentionV2):
    """SwinV2 normalizes queries to length 1; that is its q-norm, and the predictor reads what comes out of it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        me: Any = self
        qkv = me.qkv(x) if me.q_bias is None else me.qkv(x) + torch.cat([me.q_bias, me.k_bias, me.v_bias])
        q, k, v = qkv.unflatten(-1, (3, me.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        gaug_q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        table = me.cpb_mlp(me.relative_coords_table).view(-1, me.num_heads)
        relative = 16 * table[me.relative_position_index].permute(2, 0, 1).sigmoid()
        scale = me.logit_scale.clamp(max=math.log(100)).exp() * q.shape[-1] ** 0.5  # `attend` divides by this root
        y = attend((gaug_q * scale).to(v.dtype), k.to(v.dtype), v, self.bias(gaug_q, relative, mask).to(v.dtype))
        out: Tensor = me.proj_drop(me.proj(y.transpose(1, 2).flatten(2)))
        return out


TOKENS: dict[type, type] = {
    Attention: GaugAttention,
    AttentionRope: GaugAttentionRope,
    EvaAttention: GaugEvaAttention,
}
WINDOWS: dict[type, type] = {WindowAttention: GaugWindow, WindowAttentionV2: GaugWindowV2}


def add_gaug(model: nn.Module) -> nn.Module:
    """Put a GAug bias on every attention of a timm ViT, DeiT, EVA / RoPE ViT, Swin or SwinV2, or of our own ViT.

    3 * (head width + 1) parameters a layer, under `attn.gaug`. The grid is the model's own (Swin: its window); prefix
    tokens, `model.num_prefix_tokens` of them however they were made (CLS, registers, a wide CLS cut into several), are
    left alone. Returns the model.

    Raises:
        UserError: the model has other kinds of attention, attention dropout, or GAug already.
    """
    name = type(model).__name__
    if any(isinstance(module, GaugBias) for module in model.modules()):
        raise UserError(f"This {name} has GAug already.")
    if isinstance(model, VisionTransformer):
        for block in model.blocks:
            attention: Any = block.attn
            width = model.embed_dim // model.num_heads
            attention.gaug = GaugBias(width, model.grid_size).to(attention.proj.weight)
        return model
    windows = [module for module in model.modules() if type(module) in WINDOWS]
    tokens = [module for module in model.modules() if type(module) in TOKENS]
    whole = isinstance(model, TimmVisionTransformer | Eva) and len(tokens) >= len(model.blocks)
    if not windows and not whole:
        raise UserError(
            f"GAug knows the attention of timm's ViT, DeiT, EVA / RoPE ViT, Swin and SwinV2, and {name} is none of "
            "these; choose one of them, or our own vit_small_patch16_locat."
        )
    network: Any = model
    grids = Grids(model)
    for module in windows or tokens:
        attention = module
        if attention.attn_drop.p:
            raise UserError(f"GAug does not work with attention dropout; create this {name} without attn_drop.")
        heads = attention.num_heads
        width = getattr(attention, "head_dim", attention.proj.in_features // heads)
        grid = attention.window_size if windows else network.patch_embed.grid_size
        attention.gaug = GaugBias(width, tuple(grid)).to(attention.proj.weight).train(model.training)
        # As torch's own parametrizations do: the module keeps its tensors, names and hooks, and computes differently.
        attention.__class__ = (WINDOWS | TOKENS)[type(module)]
        if not windows:
            attention.gaug_prefix, attention.gaug_grids = network.num_prefix_tokens, grids
    if not windows:
        network.patch_embed.register_forward_pre_hook(grids)
    return model


def split_heads(attn: Any, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries as GAug sees them (after q-norm, before rotation), and queries, keys, values as the product does.

    `attn` is timm's Attention, AttentionRope or EvaAttention, `x` (B, N, D); each result is (B, heads, N, head width).
    """
    if getattr(attn, "q_proj", None) is not None:
        parts = [proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
        q, k, v = (part.transpose(1, 2) for part in parts)
    else:
        separate = getattr(attn, "q_bias", None)
        qkv = attn.qkv(x) if separate is None else attn.qkv(x) + torch.cat([separate, attn.k_bias, attn.v_bias])
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    gaug_q, k = attn.q_norm(q), attn.k_norm(k)
    q = gaug_q
    if rope is not None:
        first = attn.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=attn.rotate_half)], 2)
            for t in (q, k)
        )
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return gaug_q, q.type_as(v), k.type_as(v), v


def attention_weights(attn: nn.Module, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """(B, heads, N, N), float32: the softmax that one of timm's token attentions applies to its values."""
    gaug_q, q, k, _ = split_heads(attn, x, rope)
    logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if isinstance(attn, _GaugTokens):
        gaug: Any = attn.gaug
        logits = logits + gaug(gaug_q, attn.grid(x))
    return logits.softmax(-1)


# --- PRR -------------------------------------------------------------------------------------------------------


def add_prr(model: nn.Module, num_heads: int | None = None) -> nn.Module:
    """Refine what `model.forward_features` returns: tokens (B, N, D), or a map in the model's own layout.

    `num_heads` is that of the model's last attention unless given. Intermediate features stay unrefined. A norm that
    timm applies after pooling (`fc_norm`) stays there. Returns the model.

    Raises:
        UserError: the model has no `forward_features`, PRR already, or a width that the heads do not divide.
    """
    name = type(model).__name__
    plain: Any = getattr(model, "forward_features", None)
    if plain is None:
        raise UserError(f"{name} has no forward_features, so there are no tokens for PRR to refine.")
    if isinstance(plain, partial) or getattr(model, "prr", False):
        raise UserError(f"This {name} has PRR already.")
    width: Any = model.num_features
    heads = num_heads or count_heads(model, width)
    if width % heads:
        raise UserError(f"PRR cuts {width} features into {heads} heads, which does not divide; choose another number.")
    first = getattr(model, "output_fmt", "NCHW") == "NCHW"
    # A partial of a bound method, which copy.deepcopy binds to the copy.
    model.forward_features = partial(_refined, plain, heads, width, first)  # type: ignore[assignment]
    return model


def _refined(plain: Any, heads: int, width: int, channels_first: bool, *args: Any, **options: Any) -> Tensor:
    x: Tensor = plain(*args, **options)
    if x.ndim == 3:
        return prr(x, heads)
    if x.ndim == 4 and channels_first and x.shape[1] == width:
        return prr(x.flatten(2).transpose(1, 2), heads).transpose(1, 2).unflatten(2, x.shape[2:])
    return prr(x.flatten(1, 2), heads).unflatten(1, x.shape[1:3])


def count_heads(model: nn.Module, width: int) -> int:
    """Heads of the last attention in a network; embed_dim // 64 (at least 1, dividing) where there is none."""
    for module in reversed(list(model.modules())):
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and heads > 0 and width % heads == 0:
            return heads
    return next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
