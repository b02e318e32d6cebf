"""Folders that timm and transformers load: config.json, model.safetensors, and a model card.

A network with parts of our own is none of theirs. Its folder holds the self-describing file that nearfar loads, and the
card says so.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nearfar.launch.exports import plain
from nearfar.launch.exports.card import Preprocessing, model_card, preprocessing_of
from nearfar.launch.exports.exported import ExportedBackbone, difference, example
from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import VisionTransformer
from nearfar.ssl.data.transforms.normalize import MEAN, STD
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError

WEIGHTS = "model.safetensors"


class FolderExport(NamedTuple):
    difference: float  # the largest one between the features of the folder and of the network
    loaded_by: str  # what loaded it, in words
    note: str | None  # what the folder is not


def write_timm(exported: ExportedBackbone, out: Path) -> FolderExport:
    """A folder for timm.create_model("local-dir:OUT"), or for nearfar where timm does not know the network.

    Raises:
        UserError: what was written is not loaded as the same network, or the disk refuses.
    """
    vit = plain.plain_vit(exported)
    with files.atomic_folder(out) as partial:
        if vit is None:
            return _write_ours(exported, partial, "timm")
        _save(partial, plain.timm_tensors(vit))
        _write_json(partial / "config.json", timm_config(exported, vit))
        _write_card(exported, partial, "timm")
        return FolderExport(_check_timm(exported, partial), "timm", None)


def write_huggingface(exported: ExportedBackbone, out: Path) -> FolderExport:
    """A folder for transformers' AutoModel.from_pretrained("OUT"), or for nearfar where the network is not a plain ViT.

    Raises UserError as `write_timm`.
    """
    vit = plain.plain_vit(exported)
    with files.atomic_folder(out) as partial:
        _write_json(partial / "preprocessor_config.json", _processor(preprocessing_of(exported)))
        if vit is None:
            return _write_ours(exported, partial, "transformers")
        if vit.pos_grid[0] != vit.pos_grid[1]:
            raise UserError("transformers' ViTs have a square table of positions, and this network has another.")
        _save(partial, plain.dinov2_tensors(vit))
        _write_json(partial / "config.json", plain.dinov2_config(vit))
        _write_card(exported, partial, "transformers")
        return _check_huggingface(exported, partial)


def timm_config(exported: ExportedBackbone, vit: VisionTransformer) -> dict[str, Any]:
    """timm's config.json. Its own models of 192, 384 and 768 numbers a token lend their names."""
    size = {192: "tiny", 384: "small"}.get(vit.embed_dim, "base")
    prepared = preprocessing_of(exported)
    height, width = exported.size
    return {
        "architecture": f"vit_{size}_patch16_224",
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "global_pool": "token",
        "model_args": plain.timm_arguments(vit),
        "pretrained_cfg": {
            "tag": "nearfar",
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": round(prepared.crop / prepared.resize, 4),
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": exported.license,
        },
    }


def _check_timm(exported: ExportedBackbone, folder: Path) -> float:
    import timm

    try:
        model: Any = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"timm does not load what was written: {' '.join(str(error).split())[:300]}") from error
    _require_all(model.state_dict(), load_file(folder / WEIGHTS), "timm")
    images = example(exported.size)
    with torch.no_grad():
        return difference([model.eval().forward_features(images)], [exported.tokens(images)], "timm")


def _check_huggingface(exported: ExportedBackbone, folder: Path) -> FolderExport:
    """By transformers where it is installed; always by a computation from the file alone."""
    images = example(exported.size)
    expected = [exported.tokens(images)]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = plain.dinov2_tokens(load_file(folder / WEIGHTS), config, images).float()
    largest = difference([own], expected, "the layout of transformers")
    if importlib.util.find_spec("transformers") is None:
        return FolderExport(largest, "a computation in its layout (transformers is not installed)", None)
    import transformers

    try:
        model, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"transformers does not load what was written: {' '.join(str(error).split())[:300]}") from error
    misfits = {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]}
    if wrong := sorted(misfits):
        raise UserError(f"transformers does not know the tensors {', '.join(wrong[:5])}, so nothing was written.")
    with torch.no_grad():
        found = model.eval()(images).last_hidden_state
    return FolderExport(max(largest, difference([found], expected, "transformers")), "transformers", None)


def _write_ours(exported: ExportedBackbone, folder: Path, program: str) -> FolderExport:
    """The folder of a network that `program` does not know."""
    checkpoint.export(folder / WEIGHTS, exported.backbone, exported.about)
    name = str(exported.arch["name"])
    config = {"architecture": name, "architectures": [name], "model_type": "nearfar", "library_name": "nearfar"}
    _write_json(
        folder / "config.json", config | {"nearfar": exported.arch, "num_features": exported.backbone.embed_dim}
    )
    _write_card(exported, folder, "nearfar")
    images = example(exported.size)
    loaded = ExportedBackbone(checkpoint.load(folder / WEIGHTS), {}, exported.results)
    largest = difference([loaded.tokens(images)], [exported.tokens(images)], "nearfar")
    why = f"has {' and '.join(exported.ideas)}" if exported.ideas else "is none of our plain ViTs"
    note = (
        f"{name} {why}, so {program} alone cannot load it: the folder is loaded by nearfar, as its README.md says. "
        "--to onnx and --to torch-export write files that need no nearfar."
    )
    return FolderExport(largest, "nearfar", note)


def _require_all(model: dict[str, Tensor], file: dict[str, Tensor], by: str) -> None:
    if different := sorted(model.keys() ^ file.keys()):
        raise UserError(f"{by} has other tensors than were written ({', '.join(different[:5])}); nothing was written.")


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    with files.atomic(folder / WEIGHTS) as partial:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    files.write_text(file, json.dumps(content, indent=2) + "\n")


def _write_card(exported: ExportedBackbone, folder: Path, library: str) -> None:
    files.write_text(folder / "README.md", model_card(exported, library))


def _processor(prepared: Preprocessing) -> dict[str, Any]:
    """transformers' preprocessor_config.json: shorter side, center crop, ImageNet's mean and deviation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": prepared.resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": prepared.crop, "width": prepared.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
