"""What all tests share: the same random numbers for each, one tiny recipe, one comparison to the bit."""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nearfar.ssl.backbones  # noqa: F401  tests import timm and torchvision: its guard must come before them
from nearfar.ssl import checkpoint
from nearfar.ssl.disk.metrics import read_metrics

TINY: dict[str, dict[str, Any]] = {
    "data": {"workers": 0},
    "views": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2},
    "backbone": {
        "name": "vit_tiny_patch8", "embed_dim": 24, "depth": 2, "num_heads": 2,
        "lgp": True, "gaug": True, "prr": True, "drop_path": 0.2,
    },
    "head": {"prototypes": 20, "hidden_dim": 16, "bottleneck_dim": 8},
    "train": {"epochs": 4, "batch_size": 8, "device": "cpu", "precision": "fp32", "threads": 1, "log_every_steps": 1},
}  # fmt: skip
CLOCK = {"img_per_s", "data_wait", "save_wait", "time"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster's files first: they are the longest and mostly wait, while a second process runs the others.

    Tests marked `cuda` are skipped where there is no CUDA device.
    """
    items.sort(key=lambda item: not item.path.is_relative_to(Path(__file__).parent / "slurm"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


if importlib.util.find_spec("hypothesis"):  # bench/gpu.py runs what needs no more than pytest
    from hypothesis import settings

    settings.register_profile("nearfar", derandomize=True)  # the same examples in every run, as all else here
    settings.load_profile("nearfar")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the generators that the process shares; a test that draws from one of its own seeds that itself."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., dict[str, dict[str, Any]]]:
    """Makes the tree of settings of a run that takes a second: 5 steps an epoch of 40 images; `train` replaces."""

    def make(**train: Any) -> dict[str, dict[str, Any]]:
        recipe = copy.deepcopy(TINY)
        recipe["train"].update(train)
        return recipe

    return make


def different(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that only one side has, or that differ in type, shape or a bit (so NaN equals itself)."""

    def bits(tensor: Tensor | None) -> object:
        if tensor is None:
            return None
        return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return sorted(name for name in one.keys() | two.keys() if bits(one.get(name)) != bits(two.get(name)))


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """Asserts that two dictionaries hold the same tensors, to the bit; names those that are not."""

    def check(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
        assert one
        assert different(one, two) == []

    return check


@pytest.fixture(scope="session")
def same_runs() -> Callable[[Path, Path, int], None]:
    """Asserts that two runs, each logged at every step, ended at step `steps` with the same bits in all that a
    checkpoint holds (weights, center, optimizer), and that no line of their metrics differs but in what the clock says.
    """

    def ended(run: Path, steps: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        saved = checkpoint.latest(run / "checkpoints")
        assert saved is not None and saved.state["step"] == steps
        assert {name.partition("/")[0] for name in saved.tensors} == {"learner", "optimizer"}
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        return saved.tensors, [{key: line[key] for key in line.keys() - CLOCK} for line in lines]

    def check(one: Path, two: Path, steps: int) -> None:
        (left, metrics), (right, metrics_of_two) = ended(one, steps), ended(two, steps)
        assert different(left, right) == []
        assert metrics == metrics_of_two

    return check
