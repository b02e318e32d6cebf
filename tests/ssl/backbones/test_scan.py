"""The selective scan against the recurrence written step by step, and against finite differences."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nearfar.ssl.backbones import scan
from nearfar.ssl.backbones.scan import choose_scan, prefix_scan, selective_scan
from nearfar.ssl.errors import UserError


def stepwise(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """docs/methods.md section 4, one step after the other."""
    state = x.new_zeros(x.shape[0], x.shape[2], a.shape[1])
    out = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        out.append((state * c[:, t, None, :]).sum(-1) + d * x[:, t])
    return torch.stack(out, 1)


def inputs(batch: int, length: int, width: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    made = [
        normal(batch, length, width), normal(batch, length, width).exp() * 0.1, -normal(width, n).exp(),
        normal(batch, length, n), normal(batch, length, n), normal(width),
    ]  # fmt: skip
    return [v.requires_grad_() for v in made]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("batch", "length", "width", "n"),
    [(2, 197, 96, 16), (1, 1, 4, 3), (3, 8, 5, 16), (3, 9, 5, 1), (5, 23, 8, 4), (4, 17, 1024, 16)],
)
def test_equals_the_recurrence_with_gradients(batch: int, length: int, width: int, n: int) -> None:
    leaves = inputs(batch, length, width, n)
    up = torch.randn(batch, length, width)
    got, expected = selective_scan(*leaves), stepwise(*leaves)
    assert relative(got, expected) < 1e-5
    for name, a, b in zip(
        ["x", "dt", "A", "B", "C", "D"],
        torch.autograd.grad(got, leaves, up),
        torch.autograd.grad(expected, leaves, up),
        strict=True,
    ):
        assert a.shape == b.shape and relative(a, b) < 1e-5, name


@pytest.mark.parametrize("length", [3, 8, 19])
@pytest.mark.parametrize("cells", [1, 2**16])  # one image at a time, and all at once
def test_gradcheck(length: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CELLS", cells)
    assert torch.autograd.gradcheck(selective_scan, inputs(2, length, 3, 2, torch.float64))


def test_keeps_little_for_the_backward_pass() -> None:
    leaves = inputs(2, 160, 32, 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        selective_scan(*leaves)
    assert sum(v.numel() for v in kept) < sum(v.numel() for v in leaves) + 2 * 160 * 32 * 16 / 7


def test_inputs_may_have_any_strides_and_stay_as_they_are() -> None:
    leaves = [v.detach() for v in inputs(2, 11, 6, 4)]
    strided = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in leaves]
    copies = [v.clone() for v in strided]
    torch.testing.assert_close(selective_scan(*strided), stepwise(*leaves), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    x, dt, a, b, c, d = (v.detach() for v in inputs(2, 150, 8, 16))
    half = [v.bfloat16() for v in (x, b, c)]
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(half[0].requires_grad_(), dt, a, half[1], half[2], d)
    assert got.dtype == torch.bfloat16
    expected = stepwise(half[0].float(), dt, a, half[1].float(), half[2].float(), d)
    assert torch.equal(got, expected.bfloat16()) or relative(got.float(), expected) < 2**-8
    got.sum().backward()
    assert half[0].grad is not None and half[0].grad.dtype == torch.bfloat16 and half[0].grad.isfinite().all()


def test_autocast_changes_nothing() -> None:
    leaves = inputs(2, 20, 8, 16)
    up = torch.randn(2, 20, 8)
    plain = selective_scan(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        under = selective_scan(*leaves)
        gradients = torch.autograd.grad(under, leaves, up)
    assert torch.equal(under, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(plain, leaves, up), strict=True))


def test_long_sequences_and_extreme_rates_equal_the_recurrence_in_float64() -> None:
    x, _, _, b, c, d = (v.detach() for v in inputs(1, 2000, 4, 16))
    for rate in (1e-6, 50.0):
        leaves = [
            v.clone().requires_grad_() for v in (x, torch.full_like(x, rate), -torch.full((4, 16), 16.0), b, c, d)
        ]
        exact = [v.detach().double().requires_grad_() for v in leaves]
        y, expected = selective_scan(*leaves), stepwise(*exact)
        assert relative(y, expected) < 1e-5
        for got, gradient in zip(
            torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True
        ):
            assert got.isfinite().all()
            torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_shapes_on_meta_and_one_graph_under_compile() -> None:
    leaves = inputs(2, 13, 4, 3)
    meta = [v.detach().to("meta").requires_grad_() for v in leaves]
    out = selective_scan(*meta)
    out.sum().backward()
    assert out.shape == (2, 13, 4) and all(v.grad is not None and v.grad.shape == v.shape for v in meta)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    up = torch.randn(2, 13, 4)
    torch.testing.assert_close(compiled(*leaves), selective_scan(*leaves))
    got, expected = (torch.autograd.grad(f(*leaves), leaves, up) for f in (compiled, selective_scan))
    torch.testing.assert_close(got, expected)


# Which scan runs


def test_no_kernel_is_taken_silently_nor_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_scan("auto", "cpu") == choose_scan("torch", "cpu") == choose_scan("torch", "cuda") == "torch"
    for kernel in ("triton", "mamba"):
        with pytest.raises(UserError, match=rf"scan={kernel} .*cannot run on the device 'cpu'.*scan=torch"):
            selective_scan(*inputs(1, 2, 2, 2), scan=kernel)
    for missing in ("_mamba_missing", "_triton_missing"):
        monkeypatch.setattr(scan, missing, lambda: "ImportError: no such thing")
    assert choose_scan("auto", "cuda") == "torch"
    with pytest.raises(UserError, match=r"mamba-ssm.*no such thing.*pip install --no-build-isolation"):
        choose_scan("mamba", "cuda")
    with pytest.raises(UserError, match=r"scan=triton needs Triton.*no such thing"):
        choose_scan("triton", "cuda")
    for missing in ("_mamba_missing", "_triton_missing"):
        monkeypatch.setattr(scan, missing, lambda: "")
    assert choose_scan("auto", "cuda") == choose_scan("triton", "cuda") == "triton"
    assert choose_scan("mamba", "cuda") == "mamba"
    assert choose_scan("auto", "cpu") == "torch"


def test_a_kernel_counts_only_once_it_ran() -> None:
    def fails(*_: Any) -> Tensor:
        raise TypeError("'NoneType' object is not callable\nat all")

    with pytest.MonkeyPatch.context() as patch:
        plain = torch.ones
        patch.setattr(torch, "ones", lambda *a, device=None, **o: plain(*a, **o))  # the trial's GPU
        assert scan._trial(stepwise) == ""
        assert scan._trial(fails) == "TypeError: 'NoneType' object is not callable at all"
        assert scan._trial(lambda *v: stepwise(*v).detach()).startswith("RuntimeError")  # no gradient, no kernel


def test_reverse_reads_from_the_end() -> None:
    leaves = inputs(2, 11, 6, 4, torch.float64)
    x, dt, a, b, c, d = leaves
    expected = stepwise(x.flip(1), dt.flip(1), a, b.flip(1), c.flip(1), d).flip(1)
    got = selective_scan(*leaves, reverse=True)
    torch.testing.assert_close(got, expected)
    up = torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(y, leaves, up) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_kernel_gets_what_it_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's calling convention: (batch, D, L), everything float32, contiguous."""

    def kernel(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        assert all(v.dtype == torch.float32 and v.is_contiguous() for v in (u, delta, a, b, c, d))
        y = stepwise(u.transpose(1, 2), delta.transpose(1, 2), a, b.transpose(1, 2), c.transpose(1, 2), d)
        return y.transpose(1, 2)

    interface: Any = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = kernel
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    monkeypatch.setattr(scan, "choose_scan", lambda *_: "mamba")
    leaves = inputs(2, 12, 6, 4)
    torch.testing.assert_close(selective_scan(*leaves, scan="mamba"), stepwise(*leaves), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["torch", "triton", "mamba"])
def test_equals_the_recurrence_on_a_gpu(backend: Any) -> None:
    if backend == "mamba":
        pytest.importorskip("mamba_ssm")
    leaves = [v.detach().cuda().requires_grad_() for v in inputs(2, 50, 64, 16)]
    got, expected = selective_scan(*leaves, scan=backend), stepwise(*leaves)
    assert relative(got, expected) < 1e-4
    up = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_in_rounds_is_the_recurrence(length: int, reverse: bool) -> None:
    """`prefix_scan`, which exported graphs use, against the steps one by one in float64."""
    torch.manual_seed(length)
    x, dt = torch.randn(2, length, 5).double(), torch.rand(2, length, 5).double()
    a, d = -torch.rand(5, 3).double(), torch.randn(5).double()
    b, c = torch.randn(2, length, 3).double(), torch.randn(2, length, 3).double()
    state, expected = torch.zeros(2, 5, 3).double(), torch.zeros(2, length, 5).double()
    for t in reversed(range(length)) if reverse else range(length):
        state = torch.exp(dt[:, t, :, None] * a) * state + dt[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        expected[:, t] = (state * c[:, t, None]).sum(-1) + d * x[:, t]
    torch.testing.assert_close(prefix_scan(x, dt, a, b, c, d, reverse), expected, rtol=1e-12, atol=1e-12)
