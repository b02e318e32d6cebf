"""Kernels on the device against float64: the scan, the colors, and both routes of attention with a window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar.ssl.backbones.attention import (
    _flex,
    attend,
    compiled_once,
    cuda_compiler_missing,
    flex_windows,
    window_bias,
)
from nearfar.ssl.backbones.scan import selective_scan
from nearfar.ssl.data.transforms.colors import color, color_by_kernels, color_of
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings.run import ViewSettings


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """docs/methods.md section 4, one step after the other."""
    state, out = x.new_zeros(x.shape[0], x.shape[2], a.shape[1]), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        out.append((state * c[:, t, None, :]).sum(-1) + d * x[:, t])
    return torch.stack(out, 1)


def scan_inputs(batch: int, length: int, width: int, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        normal(batch, length, width), normal(batch, length, width).exp() * 0.1, -normal(width, n).exp(),
        normal(batch, length, n), normal(batch, length, n), normal(width),
    ]  # fmt: skip


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        largest = b.detach().abs().max().clamp(min=1e-12)
        difference = float((a.detach().cpu().double() - b.detach()).abs().max() / largest)
        assert difference < tolerance, f"tensor {number} differs by {difference:.1e} of its largest number"


@pytest.mark.parametrize("shape", [(2, 50, 64, 16), (3, 197, 40, 16), (1, 1, 5, 3)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_and_its_gradients(
    device: torch.device, shape: tuple[int, int, int, int], reverse: bool, dtype: torch.dtype
) -> None:
    """`auto`: Triton's on CUDA, torch's on a CPU. The state is float32 also where the inputs are bfloat16."""
    small = [v.to(dtype) if i not in (2, 5) else v.float() for i, v in enumerate(scan_inputs(*shape))]
    exact = [v.double().requires_grad_() for v in small]
    here = [v.to(device).requires_grad_() for v in small]
    mirrored = [v.flip(1) if reverse and i in (0, 1, 3, 4) else v for i, v in enumerate(exact)]
    expected = recurrence(*mirrored)
    expected = expected.flip(1) if reverse else expected
    found = selective_scan(*here, reverse=reverse)
    up = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up = up.to(dtype)
    gradients = torch.autograd.grad(found, here, up.to(device))
    compare(
        [found, *gradients],
        [expected, *torch.autograd.grad(expected, exact, up.double())],
        1e-4 if dtype == torch.float32 else 2e-2,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_scan_runs_on_the_gpu(backend: str) -> None:
    exact = [v.requires_grad_() for v in scan_inputs(2, 50, 64, 16)]
    here = [v.detach().float().cuda() for v in exact]
    compare([selective_scan(*here, scan=backend)], [recurrence(*exact)], 1e-4)


@pytest.mark.parametrize("size", [224, 96, 33])
def test_colors(device: torch.device, size: int) -> None:
    """Triton's kernels on CUDA, and torch's operations there, against torch's operations on the CPU."""
    n = 16
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), np.uint8))
    plan = plan_views(ViewSettings(solarize_prob=(0.0, 0.0, 0.0)), 0, 0, np.arange(n), np.full((n, 2), size))
    for view in range(3):
        group = color_of(plan, slice(view, view + 1))
        expected = color(images, group)
        ways = [color]
        if device.type == "cuda":
            pytest.importorskip("triton")
            ways.append(color_by_kernels)
        for way in ways:
            torch.testing.assert_close(way(images.to(device), group).cpu(), expected, rtol=1e-4, atol=2e-5)


def test_solarizing_inverts_what_is_bright(device: torch.device) -> None:
    """Gray levels that no rounding can carry over the threshold."""
    levels = torch.tensor([0, 60, 120, 136, 200, 255], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(-1, 3, 20, 20).contiguous()
    settings = ViewSettings(color_jitter_prob=0.0, grayscale_prob=0.0, blur_prob=(0.0, 0.0, 0.0),
                            solarize_prob=(1.0, 1.0, 1.0))  # fmt: skip
    plan = plan_views(settings, 0, 0, np.arange(6), np.full((6, 2), 20))
    group = color_of(plan, slice(1, 2))
    assert group.solarize.all()
    way = color_by_kernels if device.type == "cuda" else color
    found = way(images.to(device), group).cpu()[:, 0, 3, 3] * 255
    expected = [level if level < plan.solarize_threshold else 255 - level for level in levels.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=0.01)


def window_inputs(grid: tuple[int, int], prefix: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, patches = grid[0] * grid[1] + prefix, grid[0] * grid[1]
    q, k, v = (torch.randn(2, 3, tokens, 32, generator=generator).to(dtype) for _ in range(3))
    rows, columns = (torch.rand(2, 3, patches, side, generator=generator) for side in grid)
    return [q, k, v, rows, columns]


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["written out", "tables"])
def test_both_routes_of_attention_with_a_window(
    device: torch.device, grid: tuple[int, int], dtype: torch.dtype, route: str
) -> None:
    """Values and the gradients of q, k, v and both tables."""
    if route == "tables" and (device.type != "cuda" or cuda_compiler_missing()):
        pytest.skip("FlexAttention has gradients on a GPU with a compiler only")
    leaves = window_inputs(grid, 1, dtype)
    here = [x.to(device).requires_grad_() for x in leaves]
    exact = [x.double().requires_grad_() for x in leaves]
    q, k, v, rows, columns = exact
    logits = q @ k.transpose(-1, -2) / 32**0.5 + window_bias(rows, columns, q.shape[-2])
    expected = logits.softmax(-1) @ v
    if route == "tables":
        found = flex_windows(compiled_once(_flex()), *here)
    else:
        found = attend(here[0], here[1], here[2], window_bias(here[3], here[4], here[0].shape[-2]).to(dtype))
    up = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(found, here, up.to(device))
    compare(
        [found, *gradients],
        [expected, *torch.autograd.grad(expected, exact, up.double())],
        1e-4 if dtype == torch.float32 else 5e-2,
    )
