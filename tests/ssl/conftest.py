"""A run that takes a second: 40 images of 32x32, 20 steps, every switch on."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nearfar.ssl import config
from nearfar.ssl.config import Run
from nearfar.ssl.sources import ArraySource

TINY = [
    "name=tiny", "views.global_size=32", "views.local_size=16", "views.local_count=2",
    "backbone.name=vit_tiny_patch8", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2",
    "backbone.lgp=true", "backbone.gaug=true", "backbone.prr=true", "backbone.drop_path=0.2",
    "head.prototypes=20", "head.hidden=16", "head.bottleneck=8", "head.batch_norm=true",
    "train.epochs=4", "train.batch_size=8", "train.device=cpu", "train.precision=fp32", "train.threads=1",
    "train.log_every=1", "data.workers=0", "optim.lr=1e-3",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Run]:
    def make(*overrides: str, folder: str = "runs") -> Run:
        return config.load(None, [*TINY, f"folder={tmp_path / folder}", *overrides])

    return make


@pytest.fixture
def images() -> ArraySource:
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (40, 32, 32, 3), np.uint8), labels=np.arange(40) % 4)


@pytest.fixture
def quiet() -> Console:
    return Console(file=StringIO())
