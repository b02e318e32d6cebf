"""Whose weights a path holds, and what reads both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import create
from nearfar.ssl.errors import UserError
from nearfar.ssl.given_weights import folder_of, is_public, is_published, load_given

TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}


def test_ours_and_public_files_are_told_apart(tmp_path: Path) -> None:
    backbone = create("vit_tiny_patch8", **TINY).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()}
    checkpoint.export(tmp_path / "ours.safetensors", backbone, {"step": 3})
    save_file(state, tmp_path / "theirs.safetensors")
    torch.save({"teacher": state}, tmp_path / "theirs.pth")
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "run").mkdir()
    save_file(state, tmp_path / "run" / "model.safetensors")  # a run's folder that somebody put a file into
    checkpoint.export(tmp_path / "run" / "teacher.safetensors", backbone, {"step": 4})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ours.safetensors").read_bytes()[:100])
    save_file(state, tmp_path / checkpoint.TENSORS)  # of a checkpoint of ours
    public = [path.name for path in sorted(tmp_path.iterdir()) if is_public(path)]
    assert public == ["folder", "theirs.pth", "theirs.safetensors"] and not is_public(tmp_path / "nothing")
    assert folder_of(tmp_path / "folder") == tmp_path / "folder" and folder_of(tmp_path / "theirs.pth") == tmp_path
    assert folder_of(tmp_path / "run") == tmp_path / "run"


def test_both_kinds_load(tmp_path: Path) -> None:
    backbone = create("vit_tiny_patch8", **TINY | {"num_heads": 1, "embed_dim": 64}).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()}
    checkpoint.export(tmp_path / "ours.safetensors", backbone, {"step": 3})
    torch.save(state, tmp_path / "theirs.pth")
    images = torch.randn(1, 3, 32, 32)
    for name, about in (("ours.safetensors", ("step", 3)), ("theirs.pth", ("origin", "theirs.pth"))):
        found, recorded = load_given(tmp_path / name)
        assert torch.equal(found(images).patches, backbone(images).patches) and not found.training
        assert recorded["arch"] == found.arch and about in recorded.items()


def test_what_timm_publishes_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def published(name: str, pretrained: bool, **more: Any) -> Any:
        torch.manual_seed(5 if pretrained else 6)
        return make(name, **more)

    monkeypatch.setattr(timm, "create_model", published)
    monkeypatch.chdir(tmp_path)
    backbone, about = load_given("timm/resnet10t")
    torch.manual_seed(5)
    expected = make("resnet10t", num_classes=0).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(images).map(), expected.forward_features(images), rtol=1e-4, atol=1e-5)
    assert about["origin"] == "timm/resnet10t" and folder_of(Path("timm/resnet10t")) == Path()
    Path("timm/resnet10t").mkdir(parents=True)  # a path of that name is meant
    assert not is_published(Path("timm/resnet10t"))


def test_neither_is_a_sentence(tmp_path: Path) -> None:
    torch.save({"stem.conv.weight": torch.ones(2, 2)}, tmp_path / "resnet.pth")
    (tmp_path / "picture.pth").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    for name, reason in (
        ("resnet.pth", "not known which network they belong to. Give a run folder"),
        ("picture.pth", "cannot be read"),
        ("nothing", "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            load_given(tmp_path / name)
