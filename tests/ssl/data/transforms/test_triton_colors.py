"""Colors by Triton's kernels, run by its interpreter, against colors.py, which is held against torchvision."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfar.ssl.data.transforms.colors import Color, blur_taps, color, color_of, pack
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings.run import ViewSettings

THRESHOLD = 100
SIZES = [
    (24, 32, 0),
    (12, 37, 1),
    (6, 5, 2),
]  # images, side, seed: a whole block, parts of one, less than the blur's reach

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The interpreter is chosen when Triton is imported, so it has a process of its own.
PROGRAM = """
import sys, torch
from nearfar.ssl.data.transforms.colors import Color, color_by_kernels
cases = torch.load(sys.argv[1], weights_only=True)
torch.save([color_by_kernels(images, Color(**plan)) for images, plan in cases], sys.argv[2])
"""

# What a kernel costs a GPU is compiled ahead of time, for which no GPU is needed.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nearfar.ssl.data.transforms import triton_colors as kernels

def build(kernel, signature, constants, capability):
    source = ASTSource(kernel, signature=signature | {k: "constexpr" for k in constants}, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"], kernel
    print(capability, kernel.__name__, len(made.asm["cubin"]))

adjust = {"images": "*u8", "packed": "*fp32", "mean": "*fp32", "sums": "*fp32", "out": "*fp32"}
adjust |= {"pixels": "i32", "columns": "i32"}
blur = {"x": "*fp32", "packed": "*fp32", "out": "*fp32", "height": "i32", "width": "i32", "columns": "i32"}
blur |= {"threshold": "fp32"}
for capability in (80, 90, 100):
    for summing in (True, False):
        build(kernels._adjust_kernel, adjust, {"SUMMING": summing, "BLOCK": 1024}, capability)
    for across in (True, False):
        build(kernels._blur_kernel, blur, {"RADIUS": 6, "ACROSS": across, "BLOCK": 1024}, capability)
"""


def planned(n: int, size: int, seed: int) -> tuple[torch.Tensor, Color]:
    """n images and the colors of their second global view, with every operation likely."""
    views = ViewSettings(
        solarize_threshold=THRESHOLD,
        color_jitter_prob=0.8,
        grayscale_prob=0.3,
        blur_prob=(0.5, 0.5, 0.5),
        solarize_prob=(0.3, 0.3, 0.3),
    )
    plan = plan_views(views, seed, 0, np.arange(n), np.full((n, 2), size))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, color_of(plan, slice(1, 2))


def packed(plan: Color) -> torch.Tensor:
    """The columns that the kernels read, written out by hand."""
    columns = [plan.factors.T, plan.order.T, plan.jitter[None], plan.gray[None], plan.sigma[None], plan.solarize[None]]
    return torch.cat([*(column.float() for column in columns), blur_taps(plan.sigma, 6).float().T]).T.contiguous()


def test_every_sample_is_colored_as_on_a_cpu(tmp_path: Path) -> None:
    cases = [planned(*case) for case in SIZES]
    torch.save([(images, vars(plan)) for images, plan in cases], tmp_path / "cases")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "cases"), str(tmp_path / "colored")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (images, plan), ours in zip(cases, torch.load(tmp_path / "colored", weights_only=True), strict=True):
        # Solarizing turns on a threshold: a value within rounding of it may fall on either side.
        plain = color(images, Color(**{**plan.__dict__, "solarize": torch.zeros(len(images)) > 0}))
        near = (plain - THRESHOLD / 255).abs() < 1e-5
        torch.testing.assert_close(ours[~near], color(images, plan)[~near], rtol=0, atol=2e-5)
        assert near.float().mean() < 0.01


def test_packing_writes_the_columns_that_the_kernels_read() -> None:
    _, plan = planned(9, 16, 3)
    assert torch.equal(pack(plan, 6), packed(plan))


def test_the_kernels_compile_for_gpus_of_three_generations(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
