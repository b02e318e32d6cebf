"""Scores and features are computed where the user says, and a device that is not there is named."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.eval.features import extraction
from nearfar.launch import cli, computing
from nearfar.launch.computing import compute_for
from nearfar.launch.slurm import job
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import device, gpus

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, with a few labeled images."""
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    images = tmp_path / "images"
    settings = ["name=r", f"folder={tmp_path}", f"data.path={images}", f"data.val={images}"]
    made = config.load(None, [*settings, "views.global_crops_size=16", "views.local_crops_size=16"])
    made.path.mkdir()
    (made.path / "config.yaml").write_text(config.to_yaml(made))
    torch.manual_seed(0)
    about = {"run": made.model_dump(mode="json"), "step": 3}
    network = create("vit_tiny_patch8", img_size=16, embed_dim=64, depth=1, num_heads=2)
    checkpoint.export(made.path / "teacher.safetensors", network, about)
    return made.path


@without_gpu
@pytest.mark.parametrize("verb", ["eval", "features"])
def test_a_device_that_is_not_there_is_a_paragraph_and_exit_code_2(
    verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["knn", str(run)] if verb == "eval" else [str(run), str(tmp_path / "images"), str(tmp_path / "store")]
    assert cli.main([verb, *rest, "--device", "cuda"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--device cuda, but torch sees no CUDA device here: " in message and "Or use --device cpu or auto" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("able", [False, True])
def test_bf16_where_it_is_good_is_written_into_the_manifest(
    able: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: able)
    store = tmp_path / "store"
    assert cli.main(["features", str(run), str(tmp_path / "images"), str(store), "--device", "cpu"]) == 0
    compute = "bfloat16" if able else "float32"
    assert json.loads((store / "manifest.json").read_text())["compute"] == compute
    assert compute_for(create("vit_tiny_patch8", img_size=16, embed_dim=24, num_heads=2), "cpu").bf16 is False  # narrow


@without_gpu
def test_the_evaluation_after_a_job_takes_the_jobs_device(run: Path) -> None:
    made = config.validate(checkpoint.about(run / "teacher.safetensors")["run"])
    on_gpu = made.model_copy(update={"train": made.train.model_copy(update={"device": "cuda"})})
    about = {"run": on_gpu.model_dump(mode="json"), "step": 3}
    checkpoint.export(run / "teacher.safetensors", checkpoint.load(run), about)
    with pytest.raises(UserError, match=r"train\.device=cuda, but torch sees no CUDA device"):
        job.score_run(run, ["knn"])


@pytest.mark.parametrize("verb", ["eval", "features"])
def test_a_full_gpu_is_a_paragraph_and_exit_code_2(
    verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "choose", lambda *_: device.Compute(torch.device("cuda"), nullcontext, "float32"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(gpus, "identity", lambda index: "uuid")
    rest = ["knn", str(run)] if verb == "eval" else [str(run), str(tmp_path / "images"), str(tmp_path / "store")]
    assert cli.main([verb, *rest, "--device", "cuda"]) == 2
    assert "GPU 0 (H100) has 0.0 of its 80.0 GB free, and the weights take" in capsys.readouterr().err


def test_the_backbone_is_where_the_features_are_computed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: what is asked for is where the backbone is when images come."""
    seen = []
    on_device = extraction.Forward.on_device

    def watched(self: extraction.Forward, images: torch.Tensor) -> torch.Tensor:
        seen.append((self.device, images.device))
        return on_device(self, images)

    monkeypatch.setattr(extraction.Forward, "on_device", watched)
    assert cli.main(["eval", "knn", str(run), "--device", "cpu", "--workers", "0"]) == 0
    assert set(seen) == {(torch.device("cpu"), torch.device("cpu"))}
    (score,) = json.loads((run / "results.json").read_text())["scores"]
    assert score["detail"]["leave_one_out"] is True  # data.val is data.path
