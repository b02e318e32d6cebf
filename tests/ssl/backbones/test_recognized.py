"""Networks told from the tensors of a public file. The references are timm's and transformers' own computations."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from nearfar.ssl.backbones import create, load_weights
from nearfar.ssl.backbones.recognized import architecture_of, load_public, patch_size_of
from nearfar.ssl.errors import UserError

State = dict[str, Tensor]
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
IMAGES = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def shaken(model: Any) -> Any:
    """Every weight drawn, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            about = 1.0 if ("norm" in name and name.endswith("weight")) or "gamma" in name or "lambda" in name else 0.0
            parameter.copy_(about + 0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(path: Path, state: State) -> Path:
    torch.save(state, path)
    return path


def dinov3s_names(state: State, biases: bool) -> State:
    """timm's tensors of a ViT of DINOv3 as its authors' code saves them, with what only that has."""
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(".q_bias"):
            keys = torch.full_like(tensor, 7.0)  # its mask takes it out there, and softmax everywhere
            values = state[name.replace("q_bias", "v_bias")]
            found[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, keys, values])
        elif not name.endswith((".v_bias", ".k_bias")):
            name = re.sub(r"gamma_([12])", r"ls\1.gamma", name).replace("reg_token", "storage_tokens")
            for timms, theirs in (("fc1_g.", "w1."), ("fc1_x.", "w2."), ("mlp.fc2.", "mlp.w3.")):
                gated = any("fc1_g" in each for each in state)
                name = name.replace(timms, theirs) if gated else name
            found[name] = tensor
    if not biases:
        width = state["cls_token"].shape[-1]
        depth = len([name for name in state if name.endswith("norm1.weight")])
        found |= {f"blocks.{k}.attn.qkv.bias": torch.cat([torch.zeros(width), torch.ones(width), torch.zeros(width)])
                  for k in range(depth)}  # fmt: skip
    found |= {f"{name[:-4]}bias_mask": torch.ones_like(tensor) for name, tensor in found.items() if "qkv.bias" in name}
    return found | {"rope_embed.periods": torch.ones(16), "mask_token": torch.zeros(1, 1)}


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"]
)
def test_a_vit_of_dinov3(tmp_path: Path, name: str) -> None:
    theirs = shaken(timm.create_model(name, dynamic_img_size=True))
    authors = saved(tmp_path / "authors.pth", dinov3s_names(theirs.state_dict(), "qkvb" in name))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    expected = theirs.forward_features(IMAGES)
    for file in (authors, tmp_path / "timm.safetensors"):
        assert architecture_of(file) == {"name": f"timm/{name}"}
        tokens = load_public(file)(IMAGES)
        torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), expected, rtol=1e-5, atol=1e-5)


def test_biases_that_a_network_has_not_are_not_dropped_in_silence(tmp_path: Path) -> None:
    """timm drops them whatever they hold; zeros, and those of keys, change nothing."""
    theirs = shaken(timm.create_model("vit_small_patch16_dinov3_qkvb", depth=1))
    state = dinov3s_names(theirs.state_dict(), True)
    plain = create("timm/vit_small_patch16_dinov3", depth=1, img_size=32)
    with pytest.raises(UserError, match=r"biases of queries and values \(blocks\.0\.attn\.qkv\.bias\).*_qkvb"):
        load_weights(plain, saved(tmp_path / "some.pth", state))
    state["blocks.0.attn.qkv.bias"][:384] = state["blocks.0.attn.qkv.bias"][768:] = 0
    assert load_weights(plain, saved(tmp_path / "none.pth", state)).dropped == ["blocks.0.attn.qkv.bias"]


def test_a_convnext_in_its_authors_names_keeps_its_final_norm(tmp_path: Path) -> None:
    """DINOv3 saves that norm twice, and timm keeps it in a head that is dropped."""
    theirs = shaken(timm.create_model("convnext_tiny", num_classes=0))
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        state[name] = tensor
    state |= {f"norms.3.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    file = saved(tmp_path / "convnext.pth", state)
    assert architecture_of(file) == {"name": "timm/convnext_tiny"} and patch_size_of(architecture_of(file)) == 32
    images = torch.randn(1, 3, 64, 96)
    expected = theirs.head.norm(theirs.forward_features(images))
    torch.testing.assert_close(load_public(file)(images).map(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_of_torchvision(tmp_path: Path, depth: int) -> None:
    """As DINO's own ResNet-50 is published, and those of solo-learn under a prefix."""
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    theirs.fc = nn.Identity()
    file = saved(tmp_path / "resnet.pth", {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert architecture_of(file) == {"name": f"timm/resnet{depth}"}
    images = torch.randn(1, 3, 64, 96)
    expected = theirs.eval()(images)
    atol = 1e-4 * float(expected.detach().abs().max())
    torch.testing.assert_close(load_public(file)(images).cls, expected, rtol=1e-4, atol=atol)


@needs_transformers
@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated"])
def test_a_vit_of_dinov3_from_transformers(tmp_path: Path, gated: bool) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 16}
    config = transformers.DINOv3ViTConfig(
        **sizes,
        num_register_tokens=4,
        num_hidden_layers=12,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    theirs = shaken(transformers.DINOv3ViTModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    assert architecture_of(tmp_path / "theirs")["name"] == f"timm/vit_small{'_plus' * gated}_patch16_dinov3_qkvb"
    tokens = load_public(tmp_path / "theirs")(IMAGES)
    found = torch.cat([tokens.prefix, tokens.patches], 1)
    torch.testing.assert_close(found, theirs(IMAGES).last_hidden_state, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_a_convnext_of_dinov3_from_transformers(tmp_path: Path) -> None:
    import transformers

    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3])
    theirs = shaken(transformers.DINOv3ConvNextModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(1, 3, 64, 96)
    patches = theirs(images).last_hidden_state[:, 1:]  # the first is a mean
    torch.testing.assert_close(load_public(tmp_path / "theirs")(images).patches, patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"stem.conv.weight": (2, 2)}, "not known which network"),
        ({"patch_embed.proj.weight": (384, 3, 16, 16), "storage_tokens": (1, 4, 384)}, "not known which network"),
        ({"patch_embed.proj.weight": (384, 3, 16, 16), "pos_embed": (1,)}, "not known which network"),
        ({"downsample_layers.0.0.weight": (7, 3, 4, 4)}, "not known which network"),
        ({"conv1.weight": (64, 3, 7, 7), "layer1.0.conv2.weight": (64, 64, 3, 3)}, "not known which network"),
    ],
    ids=["a stem", "no blocks", "no grid", "no stages", "no depth"],
)
def test_what_its_tensors_do_not_tell(tmp_path: Path, tensors: dict[str, tuple[int, ...]], reason: str) -> None:
    file = saved(tmp_path / "other.pth", {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=reason):
        load_public(file)


@pytest.mark.parametrize("name", ["vit_large_patch16_224", "vit_huge_patch14_224", "vit_little_patch16_reg4_gap_256"])
def test_heads_are_known_by_the_width(tmp_path: Path, name: str) -> None:
    """The reference is timm's table; tensors are the same for every number of heads."""
    with torch.device("meta"):
        theirs = timm.create_model(name)
    state = {key: torch.zeros(1).expand(tensor.shape) for key, tensor in theirs.state_dict().items() if tensor.ndim}
    found = architecture_of(saved(tmp_path / "vit.pth", state))
    assert (found["embed_dim"], found["num_heads"]) == (theirs.embed_dim, theirs.blocks[0].attn.num_heads)


def test_heads_that_nothing_tells_are_not_guessed(tmp_path: Path) -> None:
    """A folder of transformers says them in its config.json."""
    made = create("vit_tiny_patch8", img_size=32, embed_dim=48, depth=1, num_heads=3).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in made.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    for says in (None, "{", '{"num_attention_heads": "3"}', '{"num_attention_heads": 0}'):
        if says:
            (tmp_path / "config.json").write_text(says)
        with pytest.raises(UserError, match="width 48, and its tensors do not tell how many heads"):
            architecture_of(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_public(tmp_path)(images).patches, made(images).patches)


def test_a_patch_may_be_larger_than_the_usual_views() -> None:
    assert [patch_size_of({"name": name}) for name in ("vit_tiny_patch512", "timm/convnext_base")] == [512, 32]
