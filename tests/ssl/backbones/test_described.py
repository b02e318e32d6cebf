"""Architectures out of files: what `create` wrote is built again, everything else is a sentence and builds nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create
from nearfar.ssl.backbones.described import check_described, create_described
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24}


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: create("vit_tiny_patch8_lgp_locat_reg4_rope", **SMALL, num_heads=2, drop_path=0.1),
        lambda: create("vit_tiny_patch8", **SMALL, lgp=True, wavelet="db2", levels=2),
        lambda: create("vim_tiny_patch16_uni_lgp", **SMALL),
        lambda: create("timm/vit_tiny_patch16_224", img_size=32, depth=1, lgp=True, gaug=True, prr=True),
        lambda: create("timm/convnext_atto", img_size=32),
    ],
    ids=["vit", "wavelet", "vim", "timm-grafted", "timm-convolutional"],
)
def test_what_create_says_of_itself_is_built_again(backbone: Any, tmp_path: Path) -> None:
    made = backbone()
    again = create_described(json.loads(json.dumps(made.arch)), made.state_dict(), "here")
    assert again.arch == made.arch
    again.load_state_dict(made.state_dict(), strict=True)


GOOD: dict[str, Any] = {"name": "vit_tiny_patch8", "img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": True}, "'pretrained' is not part"),
        ({"weights": "elsewhere.pth"}, "'weights' is not part"),
        ({"scan": "mamba"}, "'scan' is not part"),
        ({"\x1b[31mred": 1}, r"'\?\[31mred' is not part"),
        ({"name": "timm/hf-hub:someone/something"}, "name is .*hf-hub"),
        ({"name": "timm/local-dir:somewhere"}, "name is"),
        ({"name": "timm/../x"}, "name is"),
        ({"name": ["vit_tiny_patch8"]}, "name is"),
        ({"name": "vit_tiny_patch99999"}, "patch size of 99999"),
        ({"depth": 10**6}, "depth is 1000000, and should be a whole number from 1 to 256"),
        ({"depth": True}, "depth is True"),
        ({"embed_dim": "24"}, "embed_dim is '24'"),
        ({"img_size": 10**9}, "img_size is"),
        ({"img_size": [32, 32]}, "img_size is"),
        ({"levels": 12}, "levels is 12"),
        ({"drop_path": float("nan")}, "drop_path is nan"),
        ({"lgp": 1}, "lgp is 1"),
        ({"wavelet": "h" * 10**6}, "wavelet is 'hhh"),
    ],
)
def test_other_keys_types_and_bounds_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_described({**GOOD, **change}, "crafted.safetensors")
    assert len(str(caught.value)) < 600 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("arch", [None, [], "vit_tiny_patch8", {}, {"depth": 1}, 3])
def test_no_architecture_at_all_is_told(arch: Any) -> None:
    with pytest.raises(UserError, match="does not say which architecture"):
        check_described(arch, "x")


@pytest.mark.parametrize(
    "arch",
    [
        {**GOOD, "embed_dim": 8192, "num_heads": 128, "depth": 256},  # 206 billion numbers
        {**GOOD, "img_size": 4096, "patch_size": 1, "embed_dim": 8192},  # positions alone: 137 billion
        {"name": "timm/eva_giant_patch14_224", "img_size": 224},  # a billion
    ],
)
def test_a_network_larger_than_the_file_is_not_built(arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.nn.init.trunc_normal_

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", counted)
    with pytest.raises(UserError, match=r"x\.safetensors describes"):
        create_described(arch, {"a": torch.zeros(3)}, "x.safetensors")
    assert largest < 2**27
    assert create("vit_tiny_patch8", **SMALL)  # the bound ended with the refusal


def test_settings_that_fit_nothing_are_told() -> None:
    for change in ({"num_heads": 7}, {"wavelet": "nonesuch"}, {"name": "timm/nonesuch"}, {"levels": 3}):
        with pytest.raises(UserError, match="cannot be built"):
            create_described({**GOOD, **change}, {}, "x.safetensors")


def test_a_crafted_teacher_neither_downloads_nor_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("built from a crafted description")

    monkeypatch.setattr(timm, "create_model", never)
    for arch in (
        {"name": "timm/resnet18", "img_size": 32, "pretrained": True},
        {"name": "timm/hf-hub:someone/something", "img_size": 32},
        {"name": "vit_tiny_patch8", "weights": str(tmp_path / "other.pth")},
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "t.safetensors", {"nearfar": json.dumps({"arch": arch})})
        with pytest.raises(UserError, match="not one that nearfar writes"):
            checkpoint.load(tmp_path / "t.safetensors")
