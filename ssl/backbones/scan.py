"""The selective scan of Vision Mamba (docs/methods.md section 4): in plain torch, in Triton, or by mamba-ssm's kernel.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t h_t + D x_t

In plain torch a step's state is a slice (batch, N, D) with D innermost, so that every product runs along contiguous
memory. States and decays of a few steps at a time are scratch that stays in the cache; only the state before each
such chunk is kept, and the backward pass rebuilds the rest from it. So what is kept is an eighth of the states and
none of the decays, and the second exponential costs less than fetching the first from memory would.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from nearfar.ssl.errors import UserError

# Names of the literature: A (D, N), B and C (batch, L, N), D (D,).
# ruff: noqa: N803

log = logging.getLogger(__name__)

Scan = Literal["auto", "torch", "triton", "mamba"]
CHUNK = 8  # steps whose states are in memory at once
CELLS = 2**16  # numbers of one step's state that a CPU works on at once: a few such slices fit into a core's cache
LOG2_E = 1 / math.log(2)  # torch's exp2 is about three times as fast as its exp on a CPU


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scan: Scan = "auto", reverse: bool = False
) -> Tensor:
    """x and dt (batch, L, D), A (D, N), B and C (batch, L, N), D (D,) -> y (batch, L, D) in x's dtype.

    `dt` is positive (after softplus) and `A` negative. State and sums are float32 (float64 for float64) whatever the
    dtypes and autocast say; gradients of first order flow to all six. `reverse` reads from the last step to the first.
    `scan` as in `choose_scan`; the two kernels have no float64, which is torch's. While torch.export traces a network,
    it is `prefix_scan`, which any program can run.
    """
    if torch.compiler.is_exporting():
        return prefix_scan(x, dt, A, B, C, D, reverse)
    chosen = choose_scan(scan, x.device.type)
    if chosen == "triton" and torch.float64 not in (x.dtype, A.dtype):
        return _triton_scan(x, dt, A, B, C, D, reverse)
    if reverse:
        return selective_scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, scan).flip(1)
    if chosen == "mamba":
        return _mamba_scan(x, dt, A, B, C, D)
    y: Tensor = _SelectiveScan.apply(x, dt, A, B, C, D)
    return y


def prefix_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool = False) -> Tensor:
    """`selective_scan` in log2(L) rounds of plain operators, for graphs that leave torch: neither kernels nor a loop
    over steps. Each round joins every step with the one 1, 2, 4, ... before it (Hillis and Steele, 1986), so it does
    log2(L) times the work of the recurrence, and keeps all states (batch, L, N, D) at once.
    """
    if reverse:
        return prefix_scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D).flip(1)
    precise, rates, skip = _precise(x, A, D)
    dt, drive = dt.to(precise), dt.to(precise) * x.to(precise)
    decay = torch.exp(dt.unsqueeze(2) * rates)  # (batch, L, N, D)
    state = drive.unsqueeze(2) * B.to(precise).unsqueeze(3)
    span, length = 1, x.shape[1]
    while span < length:
        late = decay[:, span:]
        state = torch.cat([state[:, :span], state[:, span:] + late * state[:, :-span]], 1)
        decay = torch.cat([decay[:, :span], late * decay[:, :-span]], 1)
        span *= 2
    y = (C.to(precise).unsqueeze(3) * state).sum(2) + x.to(precise) * skip
    return y.to(x.dtype)


@torch.compiler.assume_constant_result
def choose_scan(requested: Scan, device: str) -> Literal["torch", "triton", "mamba"]:
    """The scan that runs on tensors of a device type ("cpu", "cuda", ...).

    "auto" is Triton on CUDA, where a tiny scan has to run first (the log says if it does not), and otherwise torch.

    Raises UserError for "triton" and "mamba" where they cannot run.
    """
    if requested == "torch" or (requested == "auto" and device != "cuda"):
        return "torch"
    if device != "cuda":
        raise UserError(
            f"scan={requested} is made of CUDA kernels and cannot run on the device {device!r}. Set "
            "backbone.scan=torch (or auto), or train on a CUDA device."
        )
    if requested == "mamba":
        if reason := _mamba_missing():
            raise UserError(
                f"scan=mamba needs the package mamba-ssm with its CUDA kernel, and a tiny scan does not run here "
                f"({reason}). Install it against the torch that is there with pip install --no-build-isolation "
                "-c constraints.txt -e '.[mamba]', or set backbone.scan=auto."
            )
        return "mamba"
    if reason := _triton_missing():
        if requested == "auto":
            return "torch"
        raise UserError(
            f"scan=triton needs Triton, which CUDA builds of torch bring, and a tiny scan does not run here ({reason})."
            " Set backbone.scan=torch (or auto)."
        )
    return "triton"


@torch.compiler.disable  # Triton's own launches are not for torch.compile to trace
def _triton_scan(*inputs: Any) -> Tensor:
    from nearfar.ssl.backbones.scan_triton import TritonScan  # needs Triton, which a CPU has no use for

    y: Tensor = TritonScan.apply(*inputs)
    return y


@torch.compiler.disable
def _mamba_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    u, delta, b, c = (v.transpose(1, 2).float().contiguous() for v in (x, dt, B, C))
    return _mamba_kernel()(u, delta, A.float(), b, c, D.float()).transpose(1, 2).to(x.dtype)


def _mamba_kernel() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = importlib.import_module(
        "mamba_ssm.ops.selective_scan_interface"
    ).selective_scan_fn
    return function


@lru_cache(maxsize=1)
def _triton_missing() -> str:
    """Why the Triton kernels cannot be used, "" if they can."""
    reason = _trial(lambda *inputs: _triton_scan(*inputs, False))
    if reason:
        log.warning("Vision Mamba's scan runs in plain torch, many times slower: Triton does not work (%s)", reason)
    return reason


@lru_cache(maxsize=1)
def _mamba_missing() -> str:
    """Why mamba-ssm's kernel cannot be used, "" if it can."""

    def run(*inputs: Tensor) -> Tensor:
        u, delta, b, c = (inputs[i].transpose(1, 2).contiguous() for i in (0, 1, 3, 4))
        return _mamba_kernel()(u, delta, inputs[2], b, c, inputs[5])

    return _trial(run)


def _trial(run: Callable[..., Tensor]) -> str:
    """Why a tiny scan on the GPU, forward and backward, does not run; "" if it does.

    A package that imports is not enough: some import without their kernel and fail at the first call.
    """
    try:
        shapes = ((1, 2, 4), (1, 2, 4), (4, 2), (1, 2, 2), (1, 2, 2), (4,))
        inputs = [torch.ones(shape, device="cuda", requires_grad=True) for shape in shapes]
        with torch.enable_grad():
            run(*inputs).sum().backward()
    except Exception as error:  # a build for another torch raises whatever its loader raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y, starts = scan_forward(*inputs)
        ctx.save_for_backward(*inputs, starts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = scan_backward(grad, *ctx.saved_tensors)
        return gradients


# The two passes are operators of their own, so that torch.compile sees one node each and not L steps.


@torch.library.custom_op("nearfar::scan_forward", mutates_args=())
def scan_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the state before each chunk of steps (chunks, batch, N, D)."""
    precise, rates, skip = _precise(x, A, D)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    starts = x.new_empty(_starts_shape(x, A), dtype=precise)
    for rows in _blocks(x, A):
        steps = _Steps(x[rows], dt[rows], B[rows], rates, precise)
        c = _time_first(C[rows], precise)
        out = steps.x * skip
        starts[0, rows] = 0
        for index, span in steps.chunks():
            states, _ = steps.run(starts[index, rows], span)
            if index + 1 < len(starts):
                starts[index + 1, rows] = states[-1]
            out[span] += _contract(c[span], states[1:])
        y[rows] = out.transpose(0, 1)
    return y, starts


@torch.library.custom_op("nearfar::scan_backward", mutates_args=())
def scan_backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D from that of y."""
    precise, rates, skip = _precise(x, A, D)
    to_x, to_dt, to_b, to_c = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
    to_rates = torch.zeros_like(rates)
    to_skip = torch.zeros_like(skip)
    for rows in _blocks(x, A):
        steps = _Steps(x[rows], dt[rows], B[rows], rates, precise)
        c, gy = _time_first(C[rows], precise), _time_first(grad[rows], precise)
        gb, gc, g_drive, g_dt = (torch.empty_like(v) for v in (steps.b, c, steps.x, steps.x))
        adjoint, scratch = torch.empty_like(steps.decays), torch.empty_like(steps.decays)
        from_later = torch.zeros_like(adjoint[0])
        for index, span in reversed(list(steps.chunks())):
            states, decays = steps.run(starts[index, rows], span)
            g, product = adjoint[: len(decays)], scratch[: len(decays)]
            torch.mul(gy[span].unsqueeze(2), c[span].unsqueeze(3), out=g)  # the gradient from y of the same step,
            g[-1] += from_later  # and from all later steps
            for t in range(len(g) - 1, 0, -1):
                g[t - 1].addcmul_(decays[t], g[t])
            torch.sum(torch.mul(states[1:], gy[span].unsqueeze(2), out=product), 3, out=gc[span])
            torch.sum(torch.mul(g, steps.drive[span].unsqueeze(2), out=product), 3, out=gb[span])
            g_drive[span] = _contract(steps.b[span], g)
            g.mul_(decays)
            from_later.copy_(g[0])
            g.mul_(states[:-1])  # now the gradient of the exponent dt * A
            torch.sum(torch.mul(g, rates, out=product), 2, out=g_dt[span])
            to_rates += torch.mul(g, steps.dt[span].unsqueeze(2), out=product).sum((0, 1))
        to_b[rows], to_c[rows] = gb.transpose(0, 1), gc.transpose(0, 1)
        to_dt[rows] = g_dt.addcmul_(g_drive, steps.x).transpose(0, 1)
        to_x[rows] = g_drive.mul_(steps.dt).addcmul_(gy, skip).transpose(0, 1)
        to_skip += torch.mul(gy, steps.x, out=g_drive).sum((0, 1))
    return to_x, to_dt, to_rates.t().to(A.dtype).contiguous(), to_b, to_c, to_skip.to(D.dtype)


class _Steps:
    """The sequences of one block of the batch, time first, and the scratch in which chunks of their steps run."""

    def __init__(self, x: Tensor, dt: Tensor, b: Tensor, rates: Tensor, precise: torch.dtype) -> None:
        self.x, self.dt, self.b = (_time_first(v, precise) for v in (x, dt, b))
        self.drive = self.dt * self.x
        self.rates2 = rates * LOG2_E
        slice_ = (x.shape[0], *rates.shape)
        self.decays = x.new_empty((CHUNK, *slice_), dtype=precise)
        self.states = x.new_empty((CHUNK + 1, *slice_), dtype=precise)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        length = len(self.x)
        for index, first in enumerate(range(0, length, CHUNK)):
            yield index, slice(first, min(first + CHUNK, length))

    def run(self, start: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        """States (steps + 1, batch, N, D), the first being `start`, and decays (steps, batch, N, D) of a chunk."""
        length = span.stop - span.start
        states, decays = self.states[: length + 1], self.decays[:length]
        torch.mul(self.dt[span].unsqueeze(2), self.rates2, out=decays).exp2_()
        torch.mul(self.drive[span].unsqueeze(2), self.b[span].unsqueeze(3), out=states[1:])
        states[0] = start
        for t in range(length):
            states[t + 1].addcmul_(decays[t], states[t])
        return states, decays


def _contract(weights: Tensor, cells: Tensor) -> Tensor:
    """Sum over N: weights (steps, batch, N) and cells (steps, batch, N, D) -> (steps, batch, D)."""
    with torch.autocast(cells.device.type, enabled=False):
        product = torch.bmm(weights.flatten(0, 1).unsqueeze(1), cells.flatten(0, 1))
    return product.view(*weights.shape[:2], -1)


def _precise(x: Tensor, A: Tensor, D: Tensor) -> tuple[torch.dtype, Tensor, Tensor]:
    """The dtype of the state, and in it A as (N, D) and the skip D."""
    precise = torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    return precise, A.t().to(precise).contiguous(), D.to(precise)


def _time_first(v: Tensor, precise: torch.dtype) -> Tensor:
    return v.transpose(0, 1).to(precise).contiguous()


def _blocks(x: Tensor, A: Tensor) -> Iterator[slice]:
    """The batch in parts whose steps fit a CPU's cache; whole on any other device, where launches are what costs."""
    batch = x.shape[0]
    rows = max(1, CELLS // A.numel()) if x.device.type == "cpu" else max(1, batch)
    for first in range(0, batch, rows):
        yield slice(first, min(first + rows, batch))


def _starts_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    batch, length, width = x.shape
    return -(-length // CHUNK), batch, A.shape[1], width


@scan_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    return x.new_empty(x.shape), x.new_empty(_starts_shape(x, A), dtype=precise)


@scan_backward.register_fake
def _(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(v.shape) for v in saved[:6])
