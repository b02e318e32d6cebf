"""Published weights without a network: one sentence at once, and everything as it was afterwards."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants

from nearfar.ssl.backbones import create
from nearfar.ssl.backbones.published import cache_only_when_offline
from nearfar.ssl.errors import UserError

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_setting_that_helps_is_named_and_nothing_is_retried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match=r"weights of timm/resnet18 are not available.* backbone\.weights=FILE"):
        create("timm/resnet18", pretrained=True)
    assert "Retrying" not in caplog.text
    assert constants.HF_HUB_OFFLINE is False and logging.getLogger("huggingface_hub").level != logging.ERROR


@pytest.mark.usefixtures("offline")
def test_a_proxy_may_know_the_host_and_nothing_is_changed_for_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    with cache_only_when_offline(False):
        assert constants.HF_HUB_OFFLINE is False
    with cache_only_when_offline(True):
        assert constants.HF_HUB_OFFLINE is True
    monkeypatch.setenv("https_proxy", "proxy.invalid:3128")
    with cache_only_when_offline(True):
        assert constants.HF_HUB_OFFLINE is False


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
    pixels = torch.rand(2, 3, 32, 32)

    def normalized(mean: Any, std: Any) -> torch.Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    backbone = create(f"timm/{name}", img_size=32, depth=1, pretrained=True).eval()
    tokens = backbone(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    config = theirs.pretrained_cfg
    expected = theirs.forward_features(normalized(config["mean"], config["std"]))
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), expected, rtol=1e-4, atol=1e-5)
    again = create(**backbone.arch).eval()  # as a checkpoint is loaded: what the weights hold is not done twice
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again(pixels).patches, backbone(pixels).patches)


def test_where_that_cannot_be_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published(monkeypatch)
    create("timm/mobilenetv3_small_050", img_size=32, pretrained=True)
    assert not caplog.records  # trained with ImageNet's own
    create("timm/tf_efficientnet_es", img_size=32, pretrained=True)
    assert "trained on images with mean (0.5, 0.5, 0.5)" in caplog.text  # its first layer pads
    create("timm/vit_base_patch16_clip_224", img_size=32, depth=1, pretrained=True)
    assert "trained on images with mean (0.48" in caplog.text  # it has no bias
