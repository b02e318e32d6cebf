"""What other programs get is the same network: loaded again strictly, by them where they are installed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from nearfar.eval import results
from nearfar.eval.features.extraction import digest
from nearfar.eval.results import DataName, Score
from nearfar.launch import cli
from nearfar.launch.exports import folders, graphs, plain
from nearfar.launch.exports.card import model_card
from nearfar.launch.exports.exported import ExportedBackbone, difference, example
from nearfar.launch.verbs.adapt import settings_for
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.backbones.weights import load_weights
from nearfar.ssl.data.transforms.eval_view import eval_view
from nearfar.ssl.data.transforms.normalize import MEAN, STD
from nearfar.ssl.errors import UserError

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
IDEAS = {"lgp": True, "gaug": True, "prr": True}
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in graphs.NEEDED_BY_ONNX),
    reason="needs onnx, onnxscript and onnxruntime (pip install nearfar[dev])",
)


def make_run(folder: Path, name: str = "vit_tiny_patch8", **switches: object) -> Path:
    """A run folder as training leaves it, with weights that are far from their initialization."""
    given = ["name=mine", f"folder={folder}", "data.path=/home/somebody/pictures/train", "train.epochs=7"]
    run = config.load(None, [*given, "views.global_crops_size=32", "views.local_crops_size=16"])
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_text(config.to_yaml(run))
    torch.manual_seed(0)
    backbone = create(name, **{**SMALL, **switches})
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    about = {"run": run.model_dump(mode="json"), "step": 3, "versions": {"torch": "2.13"}}
    checkpoint.export(run.path / "teacher.safetensors", backbone, about)
    return run.path


def to_export(name: str = "vit_tiny_patch8", **switches: object) -> ExportedBackbone:
    torch.manual_seed(0)
    backbone = create(name, **{**SMALL, **switches}).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return ExportedBackbone(backbone, {"step": 3}, Path("nowhere/results.json"))


# --- timm ------------------------------------------------------------------------------------------------------


DINOV2 = {"layer_scale": 1e-5, "mask_token": True}


@pytest.mark.parametrize(
    "switches", [{}, {"registers": 2}, {"img_size": 64, "pos_size": 32}, DINOV2], ids=["", "reg", "pos", "dinov2"]
)
def test_timm_loads_the_folder_and_gives_the_same_features(tmp_path: Path, switches: dict[str, Any]) -> None:
    run, out = make_run(tmp_path, **switches), tmp_path / "for-timm"
    assert cli.main(["export", str(run), "--to", "timm", str(out)]) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert type(model).__module__ == "timm.models.vision_transformer"
    images = torch.randn(2, 3, 32, 32)
    tokens = checkpoint.load(run)(images)
    found = model.forward_features(images)
    torch.testing.assert_close(found, torch.cat([tokens.prefix, tokens.patches], 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images), tokens.cls, rtol=1e-4, atol=1e-4)
    assert tuple(model.pretrained_cfg["mean"]) == MEAN and tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
def test_a_network_of_our_own_says_who_loads_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run, out = make_run(tmp_path, **IDEAS), tmp_path / "out"
    assert cli.main(["export", str(run), "--to", kind, str(out)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "has LGP and GAug and PRR" in output and "alone cannot load it: the folder is loaded by nearfar" in output
    assert 'load("PATH_OF_THIS_FOLDER/model.safetensors")' in (out / "README.md").read_text()
    images = torch.randn(1, 3, 32, 32)
    loaded = checkpoint.load(out / "model.safetensors")
    assert torch.equal(loaded(images).patches, checkpoint.load(run)(images).patches)
    assert json.loads((out / "config.json").read_text())["nearfar"]["lgp"] is True


def test_a_folder_that_timm_loads_as_another_network_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = plain.timm_tensors

    def wrong(vit: Any) -> Any:
        tensors = right(vit)
        tensors["blocks.1.norm1.weight"] = tensors["blocks.1.norm1.weight"] * 1.01
        return tensors

    monkeypatch.setattr(plain, "timm_tensors", wrong)
    with pytest.raises(UserError, match="timm gives other features than the network itself"):
        folders.write_timm(to_export(), tmp_path / "out")
    monkeypatch.setattr(plain, "timm_tensors", lambda vit: {k: v for k, v in right(vit).items() if k != "norm.bias"})
    with pytest.raises(UserError, match="timm does not load what was written"):
        folders.write_timm(to_export(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("registers", "more"), [(0, {}), (2, {}), (0, DINOV2)])
def test_the_folder_for_transformers_computes_the_same_by_its_own_layout(
    tmp_path: Path, registers: int, more: dict[str, Any]
) -> None:
    """The reference is the float64 computation of `dinov2_tokens`, which reads the folder alone; transformers itself
    is asked in the next test, where it is installed."""
    run, out = make_run(tmp_path, registers=registers, **more), tmp_path / "for-transformers"
    assert cli.main(["export", str(run), str(out), "--to", "huggingface", "--license", "cc-by-4.0"]) == 0
    about = json.loads((out / "config.json").read_text())
    assert about["model_type"] == ("dinov2_with_registers" if registers else "dinov2")
    images = torch.randn(2, 3, 32, 32)
    backbone = checkpoint.load(run).double()
    tokens = backbone(images.double())
    found = plain.dinov2_tokens(load_file(out / "model.safetensors"), about, images)
    torch.testing.assert_close(found, torch.cat([tokens.prefix, tokens.patches], 1), rtol=1e-9, atol=1e-9)
    changed = load_file(out / "model.safetensors")
    changed["encoder.layer.0.attention.attention.key.weight"] = changed["encoder.layer.0.mlp.fc1.weight"][:48]
    assert (plain.dinov2_tokens(changed, about, images) - found).abs().max() > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("registers", [0, 2])
def test_transformers_loads_the_folder(tmp_path: Path, registers: int) -> None:
    written = folders.write_huggingface(to_export(registers=registers), tmp_path / "out")
    assert written.loaded_by == "transformers" and written.difference < 1e-4


@pytest.mark.parametrize("switches", [{}, {"registers": 2, **DINOV2}], ids=["", "reg-dinov2"])
def test_nearfar_starts_from_the_folder_for_transformers(tmp_path: Path, switches: dict[str, Any]) -> None:
    """Its settings are found, and its weights are those that were exported."""
    run, out = make_run(tmp_path, **switches), tmp_path / "for-transformers"
    assert cli.main(["export", str(run), str(out), "--to", "huggingface"]) == 0
    expected = {"backbone.embed_dim=48", "backbone.depth=2", "backbone.pos_size=32", f"backbone.weights={out}"}
    found = set(settings_for(str(out)))
    assert expected <= found and ("backbone.layer_scale=1e-05" in found) == bool(switches)
    again = create("vit_tiny_patch8", **{**SMALL, **switches})
    load_weights(again, out)
    tokens, images = checkpoint.load(run), torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(images).patches, tokens(images).patches)


def test_a_layout_that_lacks_a_matrix_is_told(tmp_path: Path) -> None:
    run, out = make_run(tmp_path), tmp_path / "for-transformers"
    assert cli.main(["export", str(run), str(out), "--to", "huggingface"]) == 0
    tensors = load_file(out / "model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"misshapen: blocks\.1\.attn\.qkv\.weight \(96, 48\) instead of \(144, 48\)"):
        load_weights(create("vit_tiny_patch8", **SMALL), tmp_path / "less.safetensors")


@pytest.mark.parametrize("shape", [(), (48, 7), (2, 3, 48)], ids=str)
def test_matrices_that_do_not_fit_each_other_are_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    run, out = make_run(tmp_path), tmp_path / "for-transformers"
    assert cli.main(["export", str(run), str(out), "--to", "huggingface"]) == 0
    tensors = load_file(out / "model.safetensors")
    tensors["encoder.layer.1.attention.attention.key.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.attn\.qkv\.weight.*attention\.key"):
        load_weights(create("vit_tiny_patch8", **SMALL), tmp_path / "other.safetensors")


def test_preprocessing_is_that_of_the_evaluation(tmp_path: Path) -> None:
    """What the folder says, done with Pillow, gives the pixels that the evaluation sees."""
    exported = to_export()
    folders.write_huggingface(exported, tmp_path / "out")
    preprocessor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)
    image, short = Image.fromarray(pixels), preprocessor["size"]["shortest_edge"]
    resized = image.resize((short, round(80 * short / 60)), Image.Resampling(preprocessor["resample"]))
    side = preprocessor["crop_size"]["height"]
    top, left = round((resized.height - side) / 2), round((resized.width - side) / 2)
    expected = np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    assert np.array_equal(np.asarray(eval_view(image, side, short)), expected)
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == (list(MEAN), list(STD))


# --- the card --------------------------------------------------------------------------------------------------


def test_the_card_has_the_scores_of_exactly_these_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    weights, data = (
        digest(checkpoint.load(run)),
        (DataName("/a/imagenette/train", "t", 9469), DataName("/a/v", "v", 39)),
    )
    for exported, percent, made in (("trained", 61.25, weights), ("trained", 99.0, "later"), ("pixels", 20.5, "p")):
        results.add(run / "results.json", Score(exported, "knn", percent, made, *data, {"layer": "final"}, 3))
    assert cli.main(["export", str(run), "--to", "timm", str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "timm"
    assert "| trained | 61.2 |" in card and "| raw pixels | 20.5 |" in card and "99.0" not in card
    assert "Learned from imagenette/train (9,469 images), scored on a/v (39 images)" in card
    assert "on pictures/train for 7 epochs; these are the weights of step 3" in card and "somebody" not in card


@pytest.mark.parametrize(
    ("run", "message", "tags"),
    [
        ({"loss": {}}, "pretrained without labels by nearfar (DINO)", ["self-supervised-learning", "dino"]),
        (
            {"loss": {}, "distill": {"teacher": "/home/me/runs/large"}},
            "from a frozen teacher (large)",
            ["distillation"],
        ),
        ({"classifier": {"pooling": "cls"}}, "backbone of a classifier that nearfar trained with", ["supervised"]),
        ({}, "does not say how it was trained", []),
    ],
)
def test_the_card_says_how_the_weights_were_trained(
    tmp_path: Path, run: dict[str, Any], message: str, tags: list[str]
) -> None:
    exported = to_export()
    about = {"run": run, "lineage": [{"from": "/home/me/runs/first", "step": 7}]}
    exported = ExportedBackbone(exported.backbone, about, tmp_path / "results.json")
    card = model_card(exported, "timm")
    assert message in card and "It began with the weights of runs/first." in card and "/home/me" not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["nearfar", *tags]


def test_the_card_of_weights_without_scores_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert cli.main(["export", str(run), "--to", "huggingface", str(tmp_path / "one")]) == 0
    assert "These weights have not been scored." in (tmp_path / "one" / "README.md").read_text()
    (run / "results.json").write_text("{}")
    assert cli.main(["export", str(run), "--to", "huggingface", str(tmp_path / "two")]) == 2
    assert not (tmp_path / "two").exists()


# --- graphs ----------------------------------------------------------------------------------------------------

LONG = pytest.mark.long
ROPE = {"rope": True, "registers": 2, "gaug": True}
NETWORKS = [
    pytest.param("vit_tiny_patch8", {}, True, id="plain"),
    pytest.param("vit_tiny_patch8", {"pos_antialias": True}, False, id="antialiased", marks=LONG),
    pytest.param("vit_tiny_patch8", IDEAS, True, id="lgp-gaug-prr"),
    pytest.param("vit_tiny_patch8", ROPE, True, id="rope", marks=LONG),
    pytest.param("vim_tiny_patch8", {"num_heads": None, "lgp": True, "depth": 1}, False, id="vim"),
]


@needs_onnx
@pytest.mark.parametrize(("name", "switches", "any_size"), NETWORKS)
def test_onnxruntime_gives_the_same_features(
    tmp_path: Path, name: str, switches: dict[str, object], any_size: bool
) -> None:
    import onnxruntime

    exported = to_export(name, **switches)
    written = graphs.write_onnx(exported, tmp_path / "x.onnx")
    assert written.any_size == any_size and len(written.sizes) == 1 + any_size
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    # The last two are none that the export compared; one has a side in common with the table of positions.
    for size in [(32, 32), (16, 72), (32, 72)] if any_size else [(32, 32)]:
        images = example(size, batch=4)
        cls, patches = session.run(None, {"images": images.numpy()})
        tokens = exported.backbone(images)
        np.testing.assert_allclose(cls, tokens.cls.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(patches, tokens.patches.numpy(), rtol=1e-4, atol=1e-4)


LOAD_ALONE = """
import sys, torch
sys.modules["nearfar"] = None  # any import of it fails
images, cls, patches = torch.load(sys.argv[2], weights_only=True)
found = torch.export.load(sys.argv[1]).module()(images)
torch.testing.assert_close(found[0], cls, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(found[1], patches, rtol=1e-4, atol=1e-4)
"""


# One of the graphs, which are traced alike for both formats: the test of ONNX has them all.
ARCHIVED = [
    pytest.param(*each.values, id=each.id, marks=() if each.id == "lgp-gaug-prr" else LONG) for each in NETWORKS
]


@pytest.mark.parametrize(("name", "switches", "any_size"), ARCHIVED)
def test_an_archive_of_torch_export_needs_torch_alone(
    tmp_path: Path, name: str, switches: dict[str, object], any_size: bool
) -> None:
    exported = to_export(name, **switches)
    graphs.write_torch_export(exported, tmp_path / "x.pt2")
    images = example((16, 72) if any_size else (32, 32), batch=4)
    tokens = exported.backbone(images)
    torch.save([images, tokens.cls, tokens.patches], tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOAD_ALONE, str(tmp_path / "x.pt2"), str(tmp_path / "expected.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"here onnxscript is missing: pip install onnxscript\."):
        graphs.write_onnx(to_export(), tmp_path / "x.onnx")


def test_sizes_that_a_graph_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Try 40x32"):
        graphs.write_torch_export(to_export(pos_antialias=True), tmp_path / "x.pt2", (39, 32))
    with pytest.raises(UserError, match="for images of every size; leave out --size"):
        graphs.write_torch_export(to_export(**IDEAS), tmp_path / "x.pt2", (48, 32))
    assert list(tmp_path.iterdir()) == []
    one = to_export(pos_antialias=True)
    assert graphs.write_torch_export(one, tmp_path / "x.pt2", (48, 32)).sizes == [(48, 32)]


# --- the verb --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_step_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, backbone = make_run(tmp_path), to_export().backbone
    tensors = {f"learner/teacher.backbone.{name}": t + 1 for name, t in backbone.state_dict().items()}
    state = {"arch": backbone.arch, "step": 2, "run": {}}
    checkpoint.save(run / "checkpoints", 2, tensors, state)
    assert cli.main(["export", str(run), "--checkpoint", "2", str(tmp_path / "two.safetensors")]) == 0
    kept = (tmp_path / "two.safetensors").read_bytes()
    assert cli.main(["export", str(run), str(tmp_path / "two.safetensors")]) == 2  # other weights under a name in use
    assert (tmp_path / "two.safetensors").read_bytes() == kept
    assert "of step 2" in capsys.readouterr().out
    saved = load_file(tmp_path / "two.safetensors")
    assert torch.equal(saved["model.norm.bias"], tensors["learner/teacher.backbone.model.norm.bias"])
    (run / "metrics.jsonl").write_text('{"step": 2, "knn_top1": 61.5}\n')
    assert cli.main(["export", str(run), "--checkpoint", "best", str(tmp_path / "best.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "best.safetensors")["model.norm.bias"], saved["model.norm.bias"])
    assert cli.main(["export", str(run), "--checkpoint", "1", str(tmp_path / "one.safetensors")]) == 2
    assert "has no checkpoint of step 1. There are those of steps 2" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("timm", "full", "full is a folder with something in it, and an export never overwrites anything"),
        ("onnx", "old.onnx", "old.onnx is a file, and an export never overwrites anything"),
        ("torch-export", "net.onnx", "name it .*net.pt2"),
        ("huggingface", "no/where", "There is no folder .*no to write where to"),
    ],
)
def test_a_wrong_target_is_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, name: str, message: str
) -> None:
    run = make_run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "old.onnx").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["export", str(run), "--to", to, str(tmp_path / name)]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    run, out = make_run(tmp_path), tmp_path / "out"
    out.mkdir()
    assert cli.main(["export", str(run), "--to", "timm", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_weights_that_are_not_finite_are_not_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives other features"):
        difference([torch.tensor([float("nan")])], [torch.tensor([0.0])], "timm")
    with pytest.raises(UserError, match="features of shape"):
        difference([torch.zeros(2)], [torch.zeros(3)], "timm")
