"""Images as a network saw them in its training, whatever they are normalized by here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from nearfar.ssl.backbones import create
from nearfar.ssl.backbones.normalization import beside
from nearfar.ssl.backbones.recognized import load_public

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HERE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOOGLE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def normalized(mean: Any, std: Any) -> torch.Tensor:
    return (PIXELS - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm makes its networks as if with published weights, which are drawn instead."""
    make = timm.create_model

    def create_model(name: str, pretrained: bool = False, **more: Any) -> Any:
        torch.manual_seed(0)
        return make(name, **more)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_images_are_seen_as_the_published_network_saw_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The reference is the network itself, on the same picture normalized by its own mean and deviation."""
    published(monkeypatch)
    theirs = timm.create_model(name, num_classes=0, depth=1, img_size=32).eval()
    backbone = create(f"timm/{name}", img_size=32, depth=1, pretrained=True).eval()
    tokens = backbone(normalized(*HERE))
    config = theirs.pretrained_cfg
    expected = theirs.forward_features(normalized(config["mean"], config["std"]))
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), expected, rtol=1e-4, atol=1e-5)
    again = create(**backbone.arch).eval()  # as a checkpoint is loaded: what the weights hold is not done twice
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again(PIXELS).patches, backbone(PIXELS).patches)


def test_where_that_cannot_be_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published(monkeypatch)
    create("timm/mobilenetv3_small_050", img_size=32, pretrained=True)
    assert not caplog.records  # trained with ImageNet's own
    create("timm/tf_efficientnet_es", img_size=32, pretrained=True)
    assert "trained on images with mean (0.5, 0.5, 0.5)" in caplog.text  # its first layer pads
    create("timm/vit_base_patch16_clip_224", img_size=32, depth=1, pretrained=True)
    assert "trained on images with mean (0.48" in caplog.text  # it has no bias


@pytest.mark.parametrize(
    ("file", "content"),
    [("preprocessor_config.json", GOOGLE), ("config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})],
    ids=["transformers", "timm"],
)
def test_a_folder_says_what_its_network_saw(tmp_path: Path, file: str, content: Any) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    plain = load_public(tmp_path)(normalized([0.5] * 3, [0.5] * 3))
    (tmp_path / file).write_text(json.dumps(content))
    found = load_public(tmp_path)(normalized(*HERE))
    torch.testing.assert_close(found.patches, plain.patches, rtol=1e-4, atol=1e-5)
    expected = theirs.forward_features(normalized([0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(torch.cat([found.prefix, found.patches], 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"image_mean": 3, "image_std": 4}', '{"image_mean": ["a", "b", "c"], "image_std": [1, 1, 1]}',
     '{"image_mean": [0, 0], "image_std": [1, 1]}', '{"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}',
     '{"image_mean": [NaN, 0, 0], "image_std": [1, 1, 1]}', "[" * 5000],
)  # fmt: skip
def test_what_says_nothing_changes_nothing(tmp_path: Path, text: str) -> None:
    for name in ("preprocessor_config.json", "config.json"):
        (tmp_path / name).write_text(text)
    assert beside(tmp_path / "model.safetensors") is None
    assert beside(tmp_path / "other.pth") is None
