"""LGP, GAug and PRR on timm's models, against timm's own forward passes and the formulas."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nearfar.ssl.backbones import GaugBias, LGPPatchEmbed, add_gaug, add_lgp, add_prr, create, prr
from nearfar.ssl.backbones.timm_grafts import attention_weights
from nearfar.ssl.errors import UserError

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
EVA: dict[str, Any] = {**TINY, "dynamic_img_size": True, "qkv_fused": True, "use_rot_pos_emb": True}
SWIN: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def network(kind: str) -> Any:
    make = {
        "vit": lambda: timm.models.VisionTransformer(**TINY, dynamic_img_size=True, qk_norm=True),
        "reg": lambda: timm.models.VisionTransformer(**TINY, dynamic_img_size=True, reg_tokens=3),
        "gap": lambda: timm.models.VisionTransformer(
            **TINY, dynamic_img_size=True, global_pool="avg", class_token=False
        ),
        "deit": lambda: timm.models.deit.VisionTransformerDistilled(**TINY, dynamic_img_size=True),
        "eva": lambda: timm.models.Eva(**EVA, scale_attn_inner=True, swiglu_mlp=True),
        "eva_unfused": lambda: timm.models.Eva(**{**EVA, "qkv_fused": False}, num_reg_tokens=2),
        "rope": lambda: timm.models.Eva(**EVA, attn_type="rope", rope_rotate_half=True, use_abs_pos_emb=False),
        "mixed": lambda: timm.models.Eva(**EVA, attn_type="rope", rope_type="mixed"),
        "swin": lambda: timm.models.SwinTransformer(**SWIN, window_size=4, strict_img_size=False),
        "swinv2": lambda: timm.models.SwinTransformerV2(**SWIN, window_size=4, strict_img_size=False),
    }
    torch.manual_seed(0)
    model = make[kind]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


KINDS = ["vit", "reg", "gap", "deit", "eva", "eva_unfused", "rope", "mixed", "swin", "swinv2"]


def size(kind: str) -> tuple[int, int]:
    return (64, 64) if "swin" in kind else (32, 48)


def gaugs(model: nn.Module) -> list[GaugBias]:
    return [module for module in model.modules() if isinstance(module, GaugBias)]


@pytest.mark.parametrize("kind", KINDS)
def test_without_weight_gaug_changes_nothing_and_with_it_does(kind: str, same_bits: Callable[..., None]) -> None:
    """alpha = softplus(-inf) = 0: what is left must be timm's own forward pass, to rounding."""
    model = network(kind)
    images = torch.randn(2, 3, *size(kind))
    before, state = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    assert add_gaug(model) is model
    same_bits(state, {key: value for key, value in model.state_dict().items() if ".gaug." not in key})
    for gaug in gaugs(model):
        nn.init.zeros_(gaug.alpha.weight)
        nn.init.constant_(gaug.alpha.bias, 20)
    assert not torch.allclose(model(images), before, rtol=1e-4, atol=1e-4)
    for gaug in gaugs(model):
        nn.init.constant_(gaug.alpha.bias, -100)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="GAug already"):
        add_gaug(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_224", {}),
        ("deit_base_patch16_224", {}),
        ("vit_small_patch16_rope_224", {}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_published_parameters(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    before = sum(p.numel() for p in model.parameters())
    add_gaug(model)
    assert [sum(p.numel() for p in gaug.parameters()) for gaug in gaugs(model)] == [195] * 12
    assert sum(p.numel() for p in model.parameters()) - before == 2340


@pytest.mark.parametrize("kind", ["reg", "rope", "eva_unfused"])
def test_bias_is_added_to_the_logits_from_unrotated_queries(kind: str) -> None:
    """timm's own explicit path with its attn_mask set to the bias of the queries before rotation."""
    model = network(kind)
    plain, grafted = model.blocks[0].attn, add_gaug(copy.deepcopy(model)).blocks[0].attn
    grafted.gaug_grids.of[24] = (4, 6)
    x, prefix = torch.randn(2, model.num_prefix_tokens + 24, 48), model.num_prefix_tokens
    queries = plain.qkv(x)[..., :48] if plain.qkv is not None else plain.q_proj(x)
    if getattr(plain, "q_bias", None) is not None:
        queries = queries + plain.q_bias
    queries = queries.unflatten(-1, (3, 16)).transpose(1, 2)
    bias = grafted.gaug(queries, (4, 6))
    assert bias[..., :prefix, :].abs().sum() == bias[..., :prefix].abs().sum() == 0
    rotation = {} if kind == "reg" else {"rope": model.rope.get_embed((4, 6))}
    expected = plain(x, attn_mask=bias, **rotation)
    torch.testing.assert_close(grafted(x, **rotation), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain(x, **rotation), atol=1e-3)
    weights = attention_weights(grafted, x, **rotation)
    v = plain.qkv(x)[..., 96:] if plain.qkv is not None else plain.v_proj(x)
    if getattr(plain, "v_bias", None) is not None:
        v = v + plain.v_bias
    values = weights @ v.unflatten(-1, (3, 16)).transpose(1, 2)
    torch.testing.assert_close(
        plain.proj(plain.norm(values.transpose(1, 2).flatten(2))), expected, rtol=1e-4, atol=1e-5
    )


def test_windows_add_to_relative_positions_and_mask() -> None:
    """One shifted Swin window attention, written out."""
    model = add_gaug(network("swin"))
    attn: Any = model.layers[0].blocks[1].attn
    x, mask = torch.randn(8, 16, 24), torch.where(torch.rand(4, 16, 16) > 0.8, -100.0, 0.0)
    q, k, v = attn.qkv(x).reshape(8, 16, 3, 2, 12).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / 12**0.5 + attn._get_rel_pos_bias() + attn.gaug(q, (4, 4))
    logits = logits + mask.repeat(2, 1, 1)[:, None]
    expected = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(8, 16, 24))
    torch.testing.assert_close(attn(x, mask), expected, rtol=1e-4, atol=1e-5)


class WideCls(timm.models.VisionTransformer):
    """Jumbo-style: one CLS `wide` times as wide, cut into that many tokens for the attention."""

    def __init__(self, wide: int, **options: Any) -> None:
        super().__init__(**options, no_embed_class=True)
        self.cls_token = nn.Parameter(torch.randn(1, wide, options["embed_dim"]))
        self.num_prefix_tokens = wide


def test_a_wide_cls_is_left_alone() -> None:
    model: Any = add_gaug(WideCls(6, **TINY, dynamic_img_size=True).eval())
    for gaug in gaugs(model):
        nn.init.constant_(gaug.alpha.bias, 50.0)  # a patch sees itself only
        nn.init.constant_(gaug.var.bias, -50.0)
    images = torch.randn(1, 3, 32, 32)
    assert model.forward_features(images).shape == (1, 6 + 16, 48)
    seen: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.forward_features(images)
    weights = attention_weights(model.blocks[0].attn, seen[0])
    assert (weights[:, :, 6:, 6:].diagonal(dim1=2, dim2=3) > 0.99).all()
    assert (weights[:, :, :6].amax(-1) < 0.9).all()


@pytest.mark.parametrize("kind", ["vit", "eva", "swin", "swinv2"])
def test_finite_in_half_precision(kind: str) -> None:
    model = add_gaug(network(kind)).train()
    for gaug in gaugs(model):
        nn.init.constant_(gaug.alpha.bias, 1e6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, *size(kind)))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for gaug in gaugs(model) for p in gaug.parameters())
    q = torch.randn(1, 2, 17, 8).half() * 1e4
    bias = GaugBias(8, (4, 4))
    nn.init.constant_(bias.alpha.bias, 1e6)
    assert bias.attend(q, q * 0, q, (4, 4)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_lgp_takes_the_stems_place(kind: str, same_bits: Callable[..., None]) -> None:
    model = network(kind)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert add_lgp(model) is model
    kept = model.state_dict()
    gone = state.keys() - kept.keys()
    assert gone <= {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert torch.equal(kept["patch_embed.proj.proj.weight"], state["patch_embed.proj.weight"])
    same_bits(*({key: tensors[key] for key in state.keys() - gone} for tensors in (kept, state)))
    assert isinstance(model.patch_embed.proj, LGPPatchEmbed)
    images = torch.randn(2, 3, *size(kind))
    stem = model.patch_embed(images)
    # The map that leaves LGP is what a lone LGPPatchEmbed with its weights gives (Swin's stem has a norm of its own).
    lone = LGPPatchEmbed(model.patch_embed.proj.patch_size, stem.shape[-1]).eval()
    tensors = {
        key.removeprefix("patch_embed.proj."): value for key, value in kept.items() if "patch_embed.proj." in key
    }
    if "swin" in kind:
        tensors |= {f"norm.{key}": kept[f"patch_embed.norm.{key}"] for key in ("weight", "bias")}
    lone.load_state_dict(tensors)
    torch.testing.assert_close(stem.flatten(1, -2), lone(images), rtol=1e-4, atol=1e-5)
    assert model(images).isfinite().all()
    with pytest.raises(UserError, match="LGP already"):
        add_lgp(model)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_no_positions_are_left(kind: str) -> None:
    """With LGP and no CLS in the mean, shuffling tokens behind the stem changes nothing but their order."""
    model = add_lgp(network(kind))
    images, order = torch.randn(1, 3, 32, 32), torch.randperm(16)
    before = model.forward_features(images)
    model.patch_embed.register_forward_hook(lambda _, __, y: y.flatten(1, 2)[:, order].unflatten(1, (4, 4)))
    after, first = model.forward_features(images), model.num_prefix_tokens
    torch.testing.assert_close(after[:, :first], before[:, :first], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[:, first:], before[:, first:][:, order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "gap", "eva", "swin"])
def test_prr_refines_what_forward_features_gives(kind: str) -> None:
    model = network(kind)
    images = torch.randn(2, 3, *size(kind))
    tokens = model.forward_features(images)
    last = model.forward_intermediates(images, norm=True, intermediates_only=True)[-1]
    heads = 4 if kind == "swin" else 3
    add_prr(model)
    torch.testing.assert_close(
        model.forward_features(images), prr(tokens.flatten(1, -2), heads).reshape(tokens.shape), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))
    assert torch.equal(model.forward_intermediates(images, norm=True, intermediates_only=True)[-1], last)
    with pytest.raises(UserError, match="PRR already"):
        add_prr(model)


def test_prr_equals_timms_pooling() -> None:
    options: dict[str, Any] = {**TINY, "fc_norm": False}
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(**options, global_pool="prr").eval()
    ours = timm.models.VisionTransformer(**options, global_pool="avg").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    pooled = add_prr(ours).forward_features(images)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    pool: Any = theirs.attn_pool
    mine = pooled[:, 0] if pool.pool == "token" else pooled.mean(1)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_grafted_model_stands_alone() -> None:
    """As a teacher made by copying a student: no tensor, grid or forward pass is shared."""
    model = add_prr(add_gaug(add_lgp(network("vit"))))
    images = torch.randn(1, 3, 32, 48)
    twin = copy.deepcopy(model)
    before = twin(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images), before)
    assert not torch.equal(model(images), before)


def test_checkpointing_changes_no_gradient_and_tells_shapes_apart() -> None:
    model = add_gaug(network("vit")).train()
    images = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(model(x).square().sum() for x in images).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UserError, match="checkpointing"):
        model(torch.randn(1, 3, 16, 64))


@pytest.mark.parametrize(
    ("name", "options", "patch"),
    [
        ("swinv2_small_window8_256", {}, 4),
        ("convnext_atto", {}, 4),
        ("mixer_s32_224", {}, 32),
        ("beit_base_patch16_224", {"depth": 1}, 16),
        ("vit_tiny_patch16_224", {"depth": 1}, 16),
    ],
)
def test_create_puts_lgp_on_any_patchify_stem(name: str, options: dict[str, Any], patch: int) -> None:
    backbone = create(f"timm/{name}", img_size=64, lgp=True, **options)
    (lgp,) = [module for module in backbone.modules() if isinstance(module, LGPPatchEmbed)]
    assert lgp.patch_size == patch
    tokens = backbone(torch.randn(2, 3, 64, 64))
    (tokens.patches.square().sum() + tokens.prefix.sum()).backward()
    unused = [key for key, p in backbone.named_parameters() if p.grad is None]
    assert not [key for key in unused if "lgp" in key or "patch_embed" in key or "stem" in key]


def test_create_rebuilds_grafts_from_its_arch() -> None:
    made = create("timm/vit_tiny_patch16_224", img_size=32, depth=1, lgp=True, wavelet="db2", levels=3, gaug=True)
    twin = create(**made.arch)
    twin.load_state_dict(made.state_dict(), strict=True)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(made.eval()(images).patches, twin.eval()(images).patches)


def test_attention_maps_come_from_grafted_and_rotary_models() -> None:
    for name, switches in [("vit_tiny_patch16_224", {"gaug": True}), ("vit_small_patch16_rope_224", {"gaug": True})]:
        backbone = create(f"timm/{name}", img_size=48, depth=2, **switches).eval()
        weights = backbone.attention(torch.randn(1, 3, 48, 64))
        assert weights.shape == (1, backbone.num_heads, 13, 13)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize(
    ("name", "graft", "message"),
    [
        ("resnet18", add_lgp, "ResNet does not begin with one"),
        ("mambaout_femto", add_lgp, "MambaOut does not begin with one"),
        ("vit_tiny_patch16_224", lambda m: add_lgp(m, wavelet="dbb2"), "'dbb2'"),
        ("eva02_tiny_patch14_224", add_lgp, "power of two .* not 14"),
        ("resnet18", add_gaug, "ResNet is none of these"),
        ("maxvit_rmlp_pico_rw_256", add_gaug, "MaxxVit is none of these"),
        ("vit_tiny_patch16_224", lambda m: add_prr(m, 5), "192 features into 5 heads"),
    ],
)
def test_mistakes_are_told(name: str, graft: Any, message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=message):
        graft(model)


def test_attention_dropout_and_masks_are_told() -> None:
    with pytest.raises(UserError, match="attention dropout"):
        add_gaug(timm.models.VisionTransformer(**TINY, attn_drop_rate=0.1))
    with pytest.raises(UserError, match="masks"):
        add_gaug(network("vit"))(torch.randn(1, 3, 32, 32), is_causal=True)
