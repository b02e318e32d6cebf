"""Our models where timm's go: feature extraction, safetensors, torch.compile and ONNX."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import save_file
from torch import nn

from nearfar.ssl.backbones import VisionTransformer, add_gaug
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWITCHES: list[dict[str, Any]] = [{}, {"lgp": True}, {"gaug": True, "prr": True}, {"rope": True, "registers": 2}]
IDS = ["plain", "lgp", "locat", "rope"]
ALL: dict[str, Any] = {"lgp": True, "gaug": True, "prr": True, "rope": True, "registers": 2}


def randomized(model: nn.Module) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("switches", SWITCHES, ids=IDS)
def test_features_only(switches: dict[str, Any]) -> None:
    """timm.create_model(..., features_only=True): maps of the wanted blocks, and no block behind the last of them."""
    extractor = timm.create_model("vit_tiny_patch16", features_only=True, out_indices=(0, 2), **SMALL, **switches)
    assert extractor.feature_info.channels() == [48, 48]
    assert extractor.feature_info.reduction() == [8, 8]
    randomized(extractor)
    images = torch.randn(2, 3, 32, 48)
    maps = extractor(images)
    assert [tuple(x.shape) for x in maps] == [(2, 48, 4, 6)] * 2
    whole = VisionTransformer(**SMALL, **switches, num_classes=0).eval()
    whole.load_state_dict(extractor.model.state_dict(), strict=False)
    for a, b in zip(maps, whole.forward_intermediates(images, indices=[0, 2], intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b)
    shallow = timm.create_model("vit_tiny_patch16", features_only=True, out_indices=[1], **SMALL, **switches)
    assert len(shallow.model.blocks) == 2
    shallow(images)[0].sum().backward()
    assert not [name for name, p in shallow.named_parameters() if p.grad is None]
    (normed,) = timm.create_model("vit_tiny_patch16", features_only=True, out_indices=1, norm=True, **SMALL)(images)
    assert normed.mean(1).abs().max() < 1e-5
    with pytest.raises(UserError, match="features_only"):
        timm.create_model("vit_tiny_patch16", out_indices=(0,))


@pytest.mark.parametrize("switches", SWITCHES, ids=IDS)
def test_safetensors_through_timm(switches: dict[str, Any], tmp_path: Path) -> None:
    """What safetensors writes, timm's own loader reads, strictly."""
    first = randomized(timm.create_model("vit_tiny_patch16", num_classes=5, **SMALL, **switches))
    path = str(tmp_path / "model.safetensors")
    save_file(first.state_dict(), path)
    again = timm.create_model("vit_tiny_patch16", num_classes=5, checkpoint_path=path, **SMALL, **switches).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(images), again(images))


def test_interface() -> None:
    model = timm.create_model("vit_tiny_patch16_lgp_locat_reg4_rope", num_classes=7, **SMALL)
    assert (model.num_features, model.num_prefix_tokens, model.num_classes) == (48, 5, 7)
    assert model.pretrained_cfg["architecture"] == "vit_tiny_patch16_lgp_locat_reg4_rope"
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 48)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.set_grad_checkpointing()
    model(images).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    groups = timm.optim.param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert len(groups) == 2


@pytest.mark.parametrize("switches", [{}, ALL], ids=["plain", "all"])
def test_graph_is_whole_under_compile(switches: dict[str, Any]) -> None:
    """Dynamo sees no break at any of two sizes, and what it captured computes the same."""
    model = randomized(VisionTransformer(**{**SMALL, "depth": 1}, **switches, num_classes=0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in (32, 16):
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_gradients_under_compile() -> None:
    """With all sizes traced at once, as after the first local view."""
    model = randomized(VisionTransformer(**{**SMALL, "depth": 1}, gaug=True, prr=True, registers=1, num_classes=0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (32, 16):
        images, found = torch.randn(2, 3, size, size), []
        for run in (compiled, model):
            model.zero_grad()
            run(images).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    model = randomized(VisionTransformer(**{**SMALL, "depth": 1}, gaug=True, num_classes=0))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_grafted_model_compiles() -> None:
    options: dict[str, Any] = {**SMALL, "depth": 1, "dynamic_img_size": True}
    model = add_gaug(randomized(timm.models.VisionTransformer(**options, num_classes=0)))
    compiled = torch.compile(model, backend="eager")
    for size in (32, 16):
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX export needs onnx, onnxscript and onnxruntime (pip install nearfar[dev])",
)
@pytest.mark.parametrize("switches", SWITCHES[:3], ids=IDS[:3])
def test_onnxruntime_agrees(switches: dict[str, Any], tmp_path: Path) -> None:
    """One export per size, with any batch; at the second size positions are resampled and views are not square."""
    import onnxruntime

    model = randomized(VisionTransformer(**{**SMALL, "depth": 1}, **switches, num_classes=5))
    for height, width in [(32, 32), (48, 24)]:
        images = torch.randn(2, 3, height, width)
        path = str(tmp_path / f"{height}x{width}.onnx")
        batch = torch.export.Dim("batch", min=1, max=64)
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for number in (2, 5):
            images = torch.randn(number, 3, height, width)
            (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-4)
