"""Where and in which precision: a wish that cannot be met is told, `auto` takes what is there."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import device


@pytest.fixture(params=[True, False])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device, "has_bf16", lambda _: request.param)
    return bool(request.param)


def in_autocast(compute: device.Compute) -> torch.dtype:
    x = torch.ones(4, 4)
    with compute.autocast():
        return (x @ x).dtype


def test_auto_takes_bf16_where_the_hardware_has_it_and_the_model_is_wide_enough(bf16: bool) -> None:
    wide, narrow = device.choose("cpu", "auto", 384), device.choose("cpu", "auto", 24)
    assert wide.device.type == narrow.device.type == "cpu"
    assert in_autocast(wide) == (torch.bfloat16 if bf16 else torch.float32)
    assert wide.precision == ("bf16 autocast" if bf16 else "float32")
    assert in_autocast(narrow) == torch.float32 and narrow.precision == "float32"


def test_fp32_is_fp32_everywhere(bf16: bool) -> None:
    assert in_autocast(device.choose("cpu", "fp32", 384)) == torch.float32


def test_an_explicit_bf16_is_met_or_refused(bf16: bool) -> None:
    if bf16:
        assert in_autocast(device.choose("cpu", "bf16", 24)) == torch.bfloat16
    else:
        with pytest.raises(UserError, match=r"train.precision=bf16, but this cpu has no bf16 matrix product"):
            device.choose("cpu", "bf16", 384)


@pytest.mark.parametrize("supported", [True, False])
def test_an_explicit_fp16_is_met_or_refused(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_fp16", lambda _: supported)
    if supported:
        compute = device.choose("cpu", "fp16", 24)
        assert in_autocast(compute) == torch.float16
        assert compute.fp16 and not compute.bf16 and compute.precision == "fp16 autocast"
    else:
        with pytest.raises(UserError, match=r"train.precision=fp16, but this cpu has no fp16 .*fp32 or auto"):
            device.choose("cpu", "fp16", 384)


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16 autocast"), (False, "fp16 autocast")], ids=["new", "old"])
def test_auto_takes_fp16_on_a_gpu_without_bf16(bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert device.choose("auto", "auto", 24).precision == expected
    assert device.choose("auto", "fp32", 24).precision == "float32"
    assert device.choose("auto", "fp16", 24).precision == "fp16 autocast"


def test_auto_takes_no_fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    monkeypatch.setattr(device, "has_fp16", lambda _: True)
    assert device.choose("auto", "auto", 384).precision == "float32"


@pytest.mark.parametrize(
    ("capabilities", "answer"), [({}, False), ({"avx512_fp16": True}, True), ({"amx_fp16": True}, True)]
)
def test_a_cpu_has_fp16_when_it_multiplies_it(
    capabilities: dict[str, bool], answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.has_fp16(torch.device("cpu")) is answer


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's switches")
def test_freed_memory_is_kept_in_tensors_of_any_size() -> None:
    """Those above 32 MiB were mapped anew each time, and given back to the system each time."""
    code = """
import torch
from nearfar.ssl.parallel.device import keep_freed_memory
def heap():
    line = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
    return [int(end, 16) for end in line.split()[0].split("-")]
keep_freed_memory()
for megabytes in (1, 40, 1000):  # untouched, so no page is taken
    there = torch.empty(megabytes * 2**18).data_ptr()
    first, last = heap()
    print(first <= there < last - megabytes * 2**20)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["True"] * 3


def test_what_is_compiled_is_part_of_the_rounding() -> None:
    compute = device.choose("cpu", "fp32", 24)
    assert compute.rounding == "float32" and compute._replace(compiled=True).rounding == "float32, compiled"


def test_a_context_may_be_entered_again_and_again(bf16: bool) -> None:
    compute = device.choose("cpu", "auto", 384)
    assert [in_autocast(compute) for _ in range(3)] == [torch.bfloat16 if bf16 else torch.float32] * 3
    assert not torch.is_autocast_enabled("cpu")  # outside of it


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train.device=cuda, but .* Or use train.device=cpu or auto"):
        device.choose("cuda", "auto", 384)
    assert device.choose("auto", "fp32", 384).device.type == "cpu"


@pytest.mark.parametrize(
    ("capabilities", "answer"),
    [({}, False), ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False), ({"avx512_bf16": True}, True),
     ({"avx512_bf16": False, "amx_bf16": True}, True)],
)  # fmt: skip
def test_a_cpu_has_bf16_when_it_multiplies_it(
    capabilities: dict[str, bool], answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.has_bf16(torch.device("cpu")) is answer


@pytest.mark.parametrize("answer", [True, False])
def test_a_torch_without_capabilities_is_asked_in_the_older_way(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: answer)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: answer, raising=False)
    assert device.has_bf16(torch.device("cpu")) is device.has_fp16(torch.device("cpu")) is answer


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernel calls the flags otherwise")
def test_what_is_asked_of_this_cpu_is_what_the_kernel_says() -> None:
    (flags, *_) = re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert device.has_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
