"""Published weights without a network: one sentence at once, and everything as it was afterwards."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
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
