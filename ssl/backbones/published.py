"""Weights that timm publishes, where there may be no way to them: one answer at once, and not minutes of retries."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse


@contextmanager
def reaching_for_weights(wanted: bool) -> Iterator[None]:
    """Within it the hub's client looks into its cache only, if its host cannot be found; its retries are silent.

    wanted: False does nothing.
    """
    if not wanted:
        yield
        return
    from huggingface_hub import constants

    client: Any = constants
    offline, log = client.HF_HUB_OFFLINE, logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    client.HF_HUB_OFFLINE = offline or not _can_be_found(client.ENDPOINT)
    try:
        yield
    finally:
        client.HF_HUB_OFFLINE = offline
        log.setLevel(level)


def _can_be_found(address: str) -> bool:
    """Does the host's name resolve? A proxy may know it where this machine does not."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(address).hostname, 443)
    except OSError:
        return False
    return True
