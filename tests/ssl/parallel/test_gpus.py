"""What is said of GPUs that are absent, hidden, full or shared: torch's answers are put in its place."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import distributed, gpus

CUDA = torch.device("cuda")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two GPUs, of which the second is current, with 2 of 80 GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that lists three processes on the second GPU, one of them this one, and one on the first."""
    program = tmp_path / "nvidia-smi"
    lines = ["GPU-uuid-1, 77, 1000, /usr/bin/python", "GPU-uuid-1, 78, 73000, /opt/my app", "GPU-uuid-0, 79, 9, x"]
    lines.append(f"GPU-uuid-1, {os.getpid()}, 400, python")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_as_many_as_torch_sees_and_none_for_a_cpu(two: None) -> None:
    assert [gpus.visible(device) for device in ("auto", "cuda", "cpu")] == [2, 2, 0]


def test_cuda_without_any_is_a_mistake_and_auto_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.visible("auto") == 0
    with pytest.raises(UserError, match=r"--device cuda, but torch sees no CUDA device here.* Or use --device cpu"):
        gpus.visible("cuda", "--device ")


def test_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    message = gpus.none_visible("train.device=", {})
    assert "built for CPUs only" in message and "pip install --force-reinstall torch" in message
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0" in gpus.none_visible("train.device=", {})
    for hidden in ("", "-1"):
        assert f"CUDA_VISIBLE_DEVICES={hidden!r} hides them" in gpus.none_visible("x", {gpus.HIDING: hidden})
    message = gpus.none_visible("x", {gpus.HIDING: "1"})
    assert "hides" not in message and "CUDA_VISIBLE_DEVICES=1 names GPUs that are there" in message


def test_a_full_gpu_is_refused_with_the_processes_that_fill_it(two: None, listed: None) -> None:
    gpus.require_room(torch.device("cpu"), 10**15, "the weights")
    gpus.require_room(CUDA, 2 * 10**9, "the weights")
    with pytest.raises(UserError) as caught:
        gpus.require_room(CUDA, 3 * 10**9, "the weights")
    message = str(caught.value)
    assert "GPU 1 (NVIDIA H100) has 2.0 of its 80.0 GB free, and the weights take 3.0 GB." in message
    assert "Its memory is held by process 78 (my app, 76.5 GB), process 77 (python, 1.0 GB)." in message
    assert "CUDA_VISIBLE_DEVICES" in message and "process 79" not in message and str(os.getpid()) not in message


def test_a_gpu_that_cannot_even_be_asked(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(index: int) -> tuple[int, int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    monkeypatch.setenv("PATH", "")  # and no nvidia-smi
    with pytest.raises(UserError, match=r"GPU 1 cannot be used \(CUDA out of memory\)\. Wait"):
        gpus.require_room(CUDA, 1, "the weights")


def test_two_ranks_on_one_gpu_are_refused(two: None) -> None:
    store = dist.HashStore()
    distributed._refuse_shared_gpu(store)
    with pytest.raises(UserError, match=r"share the GPU uuid-1 of .*more processes were started there than the 2"):
        distributed._refuse_shared_gpu(store)
