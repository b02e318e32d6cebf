"""Softmax attention, in the fastest way on each device."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v for q, k, v (B, heads, N, D) and a bias (B, heads, N, N).

    Under torch 2.13 the fused CPU kernels are slower than three plain products wherever there is a bias or the numbers
    are bfloat16 (training, N = 37: 24 ms against 2.6; N = 197: 33 against 13), so there the products are written out.
    """
    if q.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):  # after a norm they are still float32
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        if bias is not None or q.dtype in (torch.bfloat16, torch.float16):
            batch, heads = q.shape[:2]
            q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
            keys = k.transpose(1, 2)
            logits = torch.bmm(q, keys) if bias is None else torch.baddbmm(bias.flatten(0, 1), q, keys)
            return torch.bmm(logits.softmax(-1), v).unflatten(0, (batch, heads))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention with a separable bias on the grid: softmax(q k^T / sqrt(D) + S) v.

    q, k, v are (B, heads, N, D), of which the last h*w tokens are patches row by row; `rows` (B, heads, h*w, h) and
    `columns` (B, heads, h*w, w) make S[p, (r, c)] = rows[p, r] * columns[p, c] between patches, and 0 elsewhere.

    S is written out in q's type, or read from the two tables by FlexAttention: see `reads_tables`. The first is the
    oracle of the second.
    """
    if reads_tables(q.shape[-2], q.shape[-1], q.device.type):
        flex = _flex() if torch.compiler.is_compiling() else compiled_once(_flex())
        return flex_windows(flex, q, k, v, rows, columns)
    return attend(q, k, v, written_bias(rows, columns, q.shape[-2], q.dtype))


LONG = 512  # tokens from which on a written-out bias costs more than the tables' scattered gradients


def reads_tables(tokens: int, head_dim: int, device: str) -> bool:
    """Whether attention with a separable bias goes through FlexAttention, which never stores N x N numbers.

    On CUDA with a compiler, heads of at least 16 numbers (its kernels take no narrower ones) and more than `LONG`
    tokens. It adds the gradients of the tables one atomic at a time, N*N of them twice a head, where a written-out bias
    moves some 12 bytes N*N a head through memory. So short sequences (197 tokens of a 224-pixel view: 78 kB a head) are
    written out, and long ones (1,025: 2.1 MB a head and layer, kept for the backward pass) are not. The
    bound is reasoned, not measured.
    """
    return device == "cuda" and head_dim >= 16 and tokens > LONG and _has_compiler()


def flex_windows(flex: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`attend_in_windows` by a FlexAttention."""
    prefix = q.shape[-2] - rows.shape[-2]
    rows, columns = F.pad(rows, (0, 0, prefix, 0)), F.pad(columns, (0, 0, prefix, 0))
    out: Tensor = flex(q, k, v, score_mod=local_score_mod(rows, columns, prefix))
    return out


def window_bias(rows: Tensor, columns: Tensor, tokens: int) -> Tensor:
    """S of `attend_in_windows`, written out: (..., N, N) for N = `tokens`, 0 for the prefix tokens in front."""
    prefix, width = tokens - rows.shape[-2], columns.shape[-1]
    # The prefix keys are the end of enough rows of zeros above the grid: padding the tables is cheaper than padding S.
    above = (prefix + width - 1) // width  # upwards; ONNX rounds a negative quotient towards 0
    rows, columns = F.pad(rows, (above, 0, prefix, 0)), F.pad(columns, (0, 0, prefix, 0))
    bias = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)
    return bias[..., above * width - prefix :]


def written_bias(rows: Tensor, columns: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """S of `window_bias`, computed as the tables are and rounded to the type of the logits."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rounded_bias(rows, columns, tokens, dtype)
    bias: Tensor = _BiasByProducts.apply(rows, columns, tokens, dtype)
    return bias


def rounded_bias(rows: Tensor, columns: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """`written_bias` with the gradients of autograd."""
    return window_bias(rows, columns, tokens).to(dtype)


class _BiasByProducts(torch.autograd.Function):
    """`rounded_bias` for a CPU: the gradients are two small matrix products a query, not two products and sums of all
    N x N numbers, and forward and backward pass together take half the time (N = 197, bf16: 7.5 ms against 15)."""

    @staticmethod
    def forward(rows: Tensor, columns: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return rounded_bias(rows, columns, tokens, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        prefix = gradients[0].shape[-1] - rows.shape[-2]
        of_patches = gradients[0][..., prefix:, prefix:].to(rows.dtype, memory_format=torch.contiguous_format)
        grids = of_patches.unflatten(-1, (rows.shape[-1], columns.shape[-1]))  # (..., h*w, h, w)
        of_rows = torch.matmul(grids, columns.unsqueeze(-1)).squeeze(-1)
        of_columns = torch.matmul(rows.unsqueeze(-2), grids).squeeze(-2)
        return of_rows, of_columns, None, None


def local_score_mod(rows: Tensor, columns: Tensor, prefix: int) -> Callable[..., Tensor]:
    """S of `attend_in_windows` as a FlexAttention score_mod, from tables with `prefix` rows of zeros in front."""
    width = columns.shape[-1]

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        patch = (key - prefix).clamp(min=0)
        bias = rows[batch, head, query, patch // width] * columns[batch, head, query, patch % width]
        return score + torch.where(key >= prefix, bias, 0.0)

    return add


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache(maxsize=16)
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for CUDA, one graph for each shape; `function` itself where there is no compiler."""
    return function if cuda_compiler_missing() else torch.compile(function, dynamic=False)


@torch.compiler.assume_constant_result
def _has_compiler() -> bool:
    return not cuda_compiler_missing()


@lru_cache(maxsize=1)
def cuda_compiler_missing() -> str:
    """Why torch.compile cannot make CUDA kernels here, "" if it can: tried once, with a small one."""
    try:
        torch.compile(torch.Tensor.square, dynamic=False)(torch.ones(2, device="cuda"))
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old: each its own exception
        reason = " ".join(str(error).split())[:200]
        log.warning("torch.compile does not work here, so GAug runs without fused kernels, slower (%s)", reason)
        return reason or type(error).__name__
    return ""
