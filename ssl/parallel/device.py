"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import gpus

# Below this width, casting costs what bf16 matrix products save on a CPU (a ViT of width 96 still gains 1.65x).
MIN_BF16_WIDTH = 64
BF16, FP16 = "bf16 autocast", "fp16 autocast"


class Compute(NamedTuple):
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]  # a fresh context for every forward pass
    precision: str  # in words
    compiled: bool = False  # what blocks do in training

    @property
    def bf16(self) -> bool:
        return self.precision == BF16

    @property
    def fp16(self) -> bool:
        """The loss has to be scaled (`loss_scale`)."""
        return self.precision == FP16

    @property
    def rounding(self) -> str:
        """All that decides how sums are rounded, in words: a run is continued bit for bit where it is the same."""
        return f"{self.precision}, compiled" if self.compiled else self.precision


def choose(device: str, precision: str, width: int, setting: str = "train.device=") -> Compute:
    """Resolve `train.device` and `train.precision` on this machine, for a backbone of `width`.

    setting: the option by which the user chose a device, as messages repeat it.

    Raises:
        UserError: an explicit choice that the hardware does not support.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(gpus.none_visible(setting))
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    supported = has_bf16(chosen)
    if precision == "bf16" and not supported:
        raise UserError(f"train.precision=bf16, but this {chosen.type} has no bf16 matrix product. Use fp32 or auto.")
    if precision == "fp16" and not has_fp16(chosen):
        raise UserError(f"train.precision=fp16, but this {chosen.type} has no fp16 matrix product. Use fp32 or auto.")
    worthwhile = chosen.type == "cuda" or width >= MIN_BF16_WIDTH
    if precision == "bf16" or (precision == "auto" and supported and worthwhile):
        return Compute(chosen, lambda: torch.autocast(chosen.type, torch.bfloat16), BF16)
    if precision == "fp16" or (precision == "auto" and chosen.type == "cuda" and has_fp16(chosen)):
        return Compute(chosen, lambda: torch.autocast(chosen.type, torch.float16), FP16)
    return Compute(chosen, nullcontext, "float32")


def has_bf16(device: torch.device) -> bool:
    """Does the hardware have bf16 matrix products (and not only emulate them)?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch: a processor with AMX has AVX-512's bf16 too
        return bool(torch.cpu._is_avx512_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def has_fp16(device: torch.device) -> bool:
    """Does the hardware have fp16 matrix products?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (5, 3)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch, which can be asked for AMX's alone
        return bool(torch.cpu._is_amx_fp16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_fp16") or capabilities.get("amx_fp16"))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free: the next step or batch allocates the same, and new pages cost time.

    A step on a CPU allocates and frees some hundred MB, and returning them to the system to fault them in again took
    about a tenth of a small step's time, and two thirds of the time of features of 240x320 pixels: what is mapped by
    itself is returned at once, and above 32 MiB all is, unless mapping is off. Nothing happens where the C library has
    no such switches.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 256 * 2**20)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
