"""The selective scan of Vision Mamba (docs/methods.md section 4) as two Triton kernels, one launch each way.

A program reads one image's sequence for a block of channels, a chunk of steps at a time. Within a chunk all states are
one parallel scan over pairs (decay, drive), kept in registers; from chunk to chunk a single state is carried on. The
forward pass keeps the state before each chunk. The backward pass goes through the chunks from the last to the first,
recomputes their states, and runs the same parallel scan backwards for the gradients.

Sums over channels and over images are written as parts and added up by torch in a fixed order: nothing is atomic, so
two passes over the same numbers give the same bits. States and sums are float32 whatever comes in.

Importing this needs Triton, which comes with CUDA builds of torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Names of the literature: A (D, N), B and C (batch, L, N), D (D,); and of Triton, for what is fixed when compiling.

CHUNK = 16  # steps of one parallel scan
FORWARD_BLOCK, BACKWARD_BLOCK = 16, 8  # channels of a program: what keeps all states of a chunk in registers
WARPS = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def then(decay, drive, next_decay, next_drive):  # type: ignore[no-untyped-def]
    """h -> decay h + drive, and after it the next such step, as one."""
    return decay * next_decay, next_decay * drive + next_drive


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, dt, A, B, C, D, y, starts, length, width, state,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """y (batch, L, D) and the state before each chunk, starts (batch, chunks, D, N)."""
    batch = tl.program_id(1).to(tl.int64)
    channel, cell, tick = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE), tl.arange(0, CHUNK)
    real_channel, real_cell = channel < width, cell < state
    square = channel[:, None] * state + cell[None, :]
    in_square = real_channel[:, None] & real_cell[None, :]
    rates = tl.load(A + square, in_square, 0.0).to(tl.float32) * LOG2_E
    skip = tl.load(D + channel, real_channel, 0.0).to(tl.float32)
    before = tl.zeros((BLOCK, STATE), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in range(chunks):
        tl.store(starts + (batch * chunks + chunk) * width * state + square, before, in_square)
        step = chunk * CHUNK + tick
        row = batch * length + ((length - 1 - step) if REVERSE else step)
        wide, in_wide = row[:, None] * width + channel[None, :], (step < length)[:, None] & real_channel[None, :]
        narrow, in_narrow = row[:, None] * state + cell[None, :], (step < length)[:, None] & real_cell[None, :]
        xs = tl.load(x + wide, in_wide, 0.0).to(tl.float32)
        dts = tl.load(dt + wide, in_wide, 0.0).to(tl.float32)
        bs = tl.load(B + narrow, in_narrow, 0.0).to(tl.float32)
        cs = tl.load(C + narrow, in_narrow, 0.0).to(tl.float32)
        decay = tl.exp2(dts[:, :, None] * rates[None, :, :])  # 1 past the end, where drive is 0: the state stays
        drive = (dts * xs)[:, :, None] * bs[:, None, :]
        carried, added = tl.associative_scan((decay, drive), 0, then)
        states = added + carried * before[None, :, :]
        out = tl.sum(states * cs[:, None, :], 2) + skip[None, :] * xs
        tl.store(y + wide, out.to(y.dtype.element_ty), in_wide)
        before = tl.sum(tl.where(tick[:, None, None] == CHUNK - 1, states, 0.0), 0)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, dt, A, B, C, D, starts, to_x, to_dt, narrow_parts, wide_parts, skip_parts, length, width, state,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Gradients of x and dt, and the parts of the others.

    narrow_parts (2, blocks, batch, L, N) of B and C, wide_parts (batch, D, N) of A, skip_parts (batch, D) of D.
    """
    block, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel, cell, tick = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE), tl.arange(0, CHUNK)
    real_channel, real_cell = channel < width, cell < state
    square = channel[:, None] * state + cell[None, :]
    in_square = real_channel[:, None] & real_cell[None, :]
    rates = tl.load(A + square, in_square, 0.0).to(tl.float32)
    skip = tl.load(D + channel, real_channel, 0.0).to(tl.float32)
    to_b = narrow_parts + (block * tl.num_programs(1)) * length * state
    to_c = to_b + (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64) * length * state
    later = tl.zeros((BLOCK, STATE), tl.float32)  # gradient of the state of the first step of the chunk after
    to_rates = tl.zeros((BLOCK, STATE), tl.float32)
    to_skip = tl.zeros((BLOCK,), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        step = chunk * CHUNK + tick
        row = batch * length + ((length - 1 - step) if REVERSE else step)
        wide, in_wide = row[:, None] * width + channel[None, :], (step < length)[:, None] & real_channel[None, :]
        narrow, in_narrow = row[:, None] * state + cell[None, :], (step < length)[:, None] & real_cell[None, :]
        xs = tl.load(x + wide, in_wide, 0.0).to(tl.float32)
        dts = tl.load(dt + wide, in_wide, 0.0).to(tl.float32)
        ups = tl.load(grad + wide, in_wide, 0.0).to(tl.float32)
        bs = tl.load(B + narrow, in_narrow, 0.0).to(tl.float32)
        cs = tl.load(C + narrow, in_narrow, 0.0).to(tl.float32)
        before = tl.load(starts + (batch * chunks + chunk) * width * state + square, in_square, 0.0)
        decay = tl.exp2(dts[:, :, None] * (rates * LOG2_E)[None, :, :])
        drive = (dts * xs)[:, :, None] * bs[:, None, :]
        carried, added = tl.associative_scan((decay, drive), 0, then)
        kept = carried * before[None, :, :] + (added - drive)  # decay times the state of the step before
        tl.store(to_c + narrow, tl.sum((kept + drive) * ups[:, :, None], 1), in_narrow)

        # The gradient of the state, from y of the same step and from all later steps.
        wide_next = wide + (-width if REVERSE else width)
        dt_next = tl.load(dt + wide_next, (step + 1 < length)[:, None] & real_channel[None, :], 0.0).to(tl.float32)
        decay_next = tl.exp2(dt_next[:, :, None] * (rates * LOG2_E)[None, :, :])
        carried, added = tl.associative_scan((decay_next, ups[:, :, None] * cs[:, None, :]), 0, then, reverse=True)
        g = added + carried * later[None, :, :]
        later = tl.sum(tl.where(tick[:, None, None] == 0, g, 0.0), 0)

        tl.store(to_b + narrow, tl.sum(g * (dts * xs)[:, :, None], 1), in_narrow)
        to_drive = tl.sum(g * bs[:, None, :], 2)
        exponent = g * kept  # gradient of dt * A
        to_rates += tl.sum(exponent * dts[:, :, None], 0)
        to_skip += tl.sum(ups * xs, 0)
        dts_grad = tl.sum(exponent * rates[None, :, :], 2) + to_drive * xs
        tl.store(to_dt + wide, dts_grad.to(to_dt.dtype.element_ty), in_wide)
        tl.store(to_x + wide, (to_drive * dts + ups * skip[None, :]).to(to_x.dtype.element_ty), in_wide)
    tl.store(wide_parts + batch * width * state + square, to_rates, in_square)
    tl.store(skip_parts + batch * width + channel, to_skip, real_channel)


class TritonScan(torch.autograd.Function):
    """`selective_scan` for tensors on CUDA: x, dt, A, B, C, D, and whether to read from the end to the start."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> Tensor:
        inputs = [v.contiguous() for v in (x, dt, A, B, C, D)]
        y, starts = triton_scan_forward(*inputs, reverse)
        ctx.save_for_backward(*inputs, starts)
        ctx.reverse = reverse
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = triton_scan_backward(grad.contiguous(), *ctx.saved_tensors, ctx.reverse)
        return *gradients, None


@torch.library.custom_op("nearfar::triton_scan_forward", mutates_args=())
def triton_scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y, and the state before each chunk of steps (batch, chunks, D, N); all inputs contiguous."""
    (batch, length, width), state = x.shape, A.shape[1]
    y = torch.empty_like(x)
    starts = x.new_empty((batch, triton.cdiv(length, CHUNK), width, state), dtype=torch.float32)
    forward_kernel[(triton.cdiv(width, FORWARD_BLOCK), batch)](
        x, dt, A, B, C, D, y, starts, length, width, state,
        REVERSE=reverse, CHUNK=CHUNK, BLOCK=FORWARD_BLOCK, STATE=triton.next_power_of_2(state), num_warps=WARPS,
    )  # fmt: skip
    return y, starts


@torch.library.custom_op("nearfar::triton_scan_backward", mutates_args=())
def triton_scan_backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D from that of y."""
    (batch, length, width), state = x.shape, A.shape[1]
    blocks = triton.cdiv(width, BACKWARD_BLOCK)
    to_x, to_dt = torch.empty_like(x), torch.empty_like(dt)
    narrow_parts = x.new_empty((2, blocks, batch, length, state), dtype=torch.float32)
    wide_parts = x.new_empty((batch, width, state), dtype=torch.float32)
    skip_parts = x.new_empty((batch, width), dtype=torch.float32)
    backward_kernel[(blocks, batch)](
        grad, x, dt, A, B, C, D, starts, to_x, to_dt, narrow_parts, wide_parts, skip_parts, length, width, state,
        REVERSE=reverse, CHUNK=CHUNK, BLOCK=BACKWARD_BLOCK, STATE=triton.next_power_of_2(state), num_warps=WARPS,
    )  # fmt: skip
    to_b, to_c = narrow_parts.sum(1).unbind()
    to_b, to_c = to_b.to(B.dtype, copy=True), to_c.to(C.dtype, copy=True)
    return to_x, to_dt, wide_parts.sum(0).to(A.dtype), to_b, to_c, skip_parts.sum(0).to(D.dtype)


@triton_scan_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], -(-x.shape[1] // CHUNK), *A.shape)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.float32)


@triton_scan_backward.register_fake
def _(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(v) for v in saved[:6])
