"""What a run says when it is continued differently than it was begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from nearfar.ssl import config
from nearfar.ssl.data import open_source
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.parallel.device import choose
from nearfar.ssl.run.announce import changed_versions, continuation_changes, out_of_memory, start_lines
from nearfar.ssl.settings.defaults import resolve


def test_only_what_differs_is_said() -> None:
    run = config.load(None, ["name=r", "train.world_size=2", "backbone.drop_path=0.1"])
    still = config.load(None, ["name=r", "train.world_size=2", "backbone.drop_path=0"])
    assert continuation_changes({"world_size": 2, "precision": "float32"}, run, "float32") == []
    (ranks,) = continuation_changes({"world_size": 1, "precision": "float32"}, run, "float32")
    assert "Saved by 1 ranks, continued by 2" in ranks and "drop-path draws other numbers" in ranks
    (ranks,) = continuation_changes({"world_size": 1}, still, "float32")
    assert "drop-path" not in ranks
    (precision,) = continuation_changes({"world_size": 2, "precision": "bf16 autocast"}, run, "float32")
    assert "Saved in bf16 autocast, continued in float32" in precision


def test_what_needs_less_memory_is_named_with_what_it_is_now() -> None:
    run = config.load(None, ["name=r", "train.batch_size=96", "train.accumulate_steps=2"])
    for error in (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):
        message = out_of_memory(error, run, ranks=2)
        assert message is not None and (str(error)[:200] or "MemoryError") in message and "\n" not in message
        assert "train.accumulate_steps=3 (now 2: 24 images at a time in each process)" in message
        assert "train.checkpoint_activations=true (now false; a run may be continued with it)" in message
        assert "train.batch_size (now 96) or a smaller views.local_crops_number (now 8)." in message
    assert out_of_memory(RuntimeError("a bug"), run) is None


def test_what_cannot_be_set_lower_is_not_named() -> None:
    settings = ["train.batch_size=2", "train.accumulate_steps=2", "train.checkpoint_activations=true"]
    message = out_of_memory(MemoryError(), config.load(None, ["name=r", *settings, "views.local_crops_number=1"]))
    assert message is not None and "accumulate_steps" not in message and "checkpoint_activations" not in message
    assert "Try a smaller train.batch_size (now 2) or a smaller views.local_crops_number (now 1)." in message


def test_another_torch_or_cuda_is_told() -> None:
    now = {"torch": "2.13.0", "cuda": "13.0", "python": "3.11.7"}
    assert changed_versions({"versions": dict(now)}, now) == [] == changed_versions({}, now)
    (message,) = changed_versions({"versions": {**now, "torch": "2.12.1", "cuda": "12.8"}}, now)
    assert "torch 2.12.1 -> 2.13.0, cuda 12.8 -> 13.0" in message and "python" not in message


@pytest.mark.parametrize("others", [(), ("a.avif", "b.jp2", "c.AVIF", "noending")])
def test_files_passed_over_for_their_type_are_told_at_the_start(tmp_path: Path, others: tuple[str, ...]) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    tiny = ["backbone.embed_dim=8", "backbone.depth=1", "backbone.num_heads=1", "backbone.patch_size=8"]
    tiny += ["views.global_crops_size=16", "views.local_crops_size=8", "head.hidden_dim=8", "head.bottleneck_dim=4"]
    run = config.load(None, ["name=r", *tiny, "head.prototypes=4"])
    source = open_source(tmp_path)
    resolved, _ = resolve(run, 1, 1, world_size=1)
    learner = build_dino_learner(resolved)
    lines = start_lines(resolved, [], learner, 1, choose("cpu", "fp32", 8), 0, source, "pillow loader")
    skipped = [line for line in lines if "skipped" in line]
    counted = "4 files of data.path are skipped because of their type: 2 .avif (a.avif), 1 .jp2 (b.jp2), 1 without an "
    assert skipped == ([f"{counted}ending (noending)."] if others else [])
