"""What only a GPU can show, by tests that need nothing but torch, numpy and the packages that timm brings.

Each takes a `device`: on a CPU, which every machine has, it checks itself, and on CUDA what it is for. bench/gpu.py
runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nearfar.ssl import config
from nearfar.ssl.settings.defaults import ResolvedRun, resolve
from nearfar.ssl.settings.run import Run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Products of float32 in float32, which a GPU is otherwise allowed to round to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture
def tiny(tiny_recipe: Callable[..., dict[str, dict[str, Any]]]) -> Callable[..., Run]:
    """The tiny recipe without drop-path, whose random numbers differ from device to device."""

    def make(*settings: str) -> Run:
        tree = tiny_recipe()
        tree["backbone"]["drop_path"] = 0.0
        leaves = [f"{name}.{key}={value}" for name, section in tree.items() for key, value in section.items()]
        return config.load(None, ["name=tiny", *leaves, "optim.lr=1e-3", *settings])

    return make


@pytest.fixture
def tiny_run(tiny: Callable[..., Run]) -> Callable[..., ResolvedRun]:
    """The same, resolved for 40 images."""
    return lambda *settings: resolve(tiny(*settings), 40)[0]
