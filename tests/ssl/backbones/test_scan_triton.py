"""The Triton scan without a GPU: its kernels in Triton's interpreter, and compiled ahead of time for three GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (pip install nearfar[dev] on Linux; any machine)"
)

INTERPRETED = """
import torch
from nearfar.ssl.backbones import scan_triton
from nearfar.ssl.backbones.scan_triton import TritonScan

scan_triton.CHUNK, scan_triton.FORWARD_BLOCK, scan_triton.BACKWARD_BLOCK = 4, 4, 2  # an interpreter is slow

def stepwise(x, dt, a, b, c, d):
    state, out = x.new_zeros(x.shape[0], x.shape[2], a.shape[1]), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        out.append((state * c[:, t, None, :]).sum(-1) + d * x[:, t])
    return torch.stack(out, 1)

def relative(a, b):
    return float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-9))

def check(batch, length, width, state, reverse, half):
    torch.manual_seed(0)
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)
    made = [normal(batch, length, width), normal(batch, length, width).exp() * .1, -normal(width, state).exp(),
            normal(batch, length, state), normal(batch, length, state), normal(width)]
    up = normal(batch, length, width)
    types = [torch.bfloat16 if half and i in (0, 3, 4) else torch.float32 for i in range(6)]
    ours = [v.to(t).requires_grad_() for v, t in zip(made, types)]
    exact = [v.detach().double().requires_grad_() for v in ours]
    turn = (lambda v: v.flip(1)) if reverse else (lambda v: v)
    x, dt, a, b, c, d = exact
    expected = turn(stepwise(turn(x), turn(dt), a, turn(b), turn(c), d))
    up = up.to(ours[0].dtype).double()
    got = TritonScan.apply(*ours, reverse)
    assert got.dtype == ours[0].dtype
    found = torch.autograd.grad(got, ours, up.to(got.dtype), retain_graph=True)
    again = torch.autograd.grad(got, ours, up.to(got.dtype))
    assert all(torch.equal(one, two) for one, two in zip(found, again))
    for name, one, two in zip(("y", "x", "dt", "A", "B", "C", "D"),
                              (got, *found), (expected, *torch.autograd.grad(expected, exact, up))):
        assert one.shape == two.shape
        limit = 2**-7 if one.dtype == torch.bfloat16 else 1e-5
        assert relative(one, two) < limit, (name, relative(one, two))

check(2, 9, 5, 3, False, False)
check(1, 6, 3, 2, True, False)
check(1, 5, 3, 2, False, True)
check(1, 1, 1, 1, True, True)
"""

COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nearfar.ssl.backbones import scan_triton

half = ("x", "B", "C", "y", "grad", "to_x")
sizes = {"forward_kernel": scan_triton.FORWARD_BLOCK, "backward_kernel": scan_triton.BACKWARD_BLOCK}
for name, block in sizes.items():
    kernel = getattr(scan_triton, name)
    constants = {"REVERSE": True, "CHUNK": scan_triton.CHUNK, "BLOCK": block, "STATE": 16}
    types = {
        arg: "constexpr" if arg in constants else "i32" if arg in ("length", "width", "state")
        else "*bf16" if arg in half else "*fp32" for arg in kernel.arg_names
    }
    places = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    for capability in (80, 90, 100):
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert len(built.asm["cubin"]) > 1000
        assert not re.search(r"\\b(atom|red)[.]", built.asm["ptx"])  # sums in a fixed order
"""


def run(code: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_equals_the_recurrence_in_the_interpreter() -> None:
    """Odd sizes, both directions, float32 and bfloat16 in, against a float64 loop; the same bits twice."""
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_compiles_ahead_of_time_for_three_generations() -> None:
    run(COMPILED, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
