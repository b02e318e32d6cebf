"""Downloads of timm's published weights: without a network they fail at once, not after minutes of retries."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse


@contextmanager
def cache_only_when_offline(enabled: bool) -> Iterator[None]:
    """Within it the Hugging Face client uses only its cache if its host cannot be resolved; its retries are silent.

    enabled: False does nothing.
    """
    if not enabled:
        yield
        return
    from huggingface_hub import constants

    client: Any = constants
    offline, log = client.HF_HUB_OFFLINE, logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    client.HF_HUB_OFFLINE = offline or not _resolves(client.ENDPOINT)
    try:
        yield
    finally:
        client.HF_HUB_OFFLINE = offline
        log.setLevel(level)


def _resolves(address: str) -> bool:
    """Does the host's name resolve? A proxy may know it where this machine does not."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(address).hostname, 443)
    except OSError:
        return False
    return True
