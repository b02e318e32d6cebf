"""The network as one graph that runs without its code: ONNX, or an archive of torch.export."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearfar.launch.exports.exported import ExportedBackbone, difference, example
from nearfar.ssl.backbones import Backbone, VisionTransformer
from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.backbones.tokens import check_divides
from nearfar.ssl.data.transforms.normalize import MEAN, STD
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError

NEEDED_BY_ONNX = ("onnx", "onnxscript", "onnxruntime")
MOST_IMAGES = 4096  # of one batch


class GraphExport(NamedTuple):
    difference: float  # the largest one between the features of the file and of the network
    sizes: list[tuple[int, int]]  # of the images on which they were compared
    any_size: bool  # does the graph take images of any size?


class TokenTensors(nn.Module):
    """Normalized images (B, 3, H, W) -> CLS (B, D) and patch tokens (B, h*w, D)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone(images)
        return tokens.cls, tokens.patches


def takes_any_size(backbone: Backbone) -> bool:
    """May one graph hold for images of all sizes? Not where something is written out for one: positions that are
    resampled antialiased, the filters of wavelets other than Haar's, Vision Mamba's scan."""
    model = backbone.model
    if not isinstance(model, VisionTransformer) or (model.pos_embed is not None and model.pos_antialias):
        return False
    return not isinstance(model.patch_embed, LGPPatchEmbed) or model.patch_embed.folds


def write_onnx(exported: ExportedBackbone, out: Path, size: tuple[int, int] | None = None) -> GraphExport:
    """An ONNX file with the input `images` and the outputs `cls` and `patches`; any batch size.

    size: of the images, for a network that is exported for one; default: what it is made for.

    Raises:
        UserError: a package is missing, the network cannot be exported, or ONNX Runtime computes other features.
    """
    if missing := [name for name in NEEDED_BY_ONNX if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"An ONNX file needs {', '.join(NEEDED_BY_ONNX)}, to be written and to be checked, and here "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: pip install {' '.join(missing)}. "
            "--to torch-export needs none of them."
        )
    import onnxruntime

    program = _traced(exported, size)
    with files.atomic(out) as partial:
        with _quiet():
            graph: Any = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["cls", "patches"], verbose=False
            )
            graph.model.metadata_props["nearfar"] = _description(exported)
            graph.save(str(partial))
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]

        return _compared(exported, run, size, "ONNX Runtime")


def write_torch_export(exported: ExportedBackbone, out: Path, size: tuple[int, int] | None = None) -> GraphExport:
    """An archive for torch.export.load, which needs torch alone; its module gives (cls, patches). Any batch size.

    Raises UserError as `write_onnx`.
    """
    program = _traced(exported, size)
    with files.atomic(out) as partial:
        with _quiet(), partial.open("wb") as file:
            torch.export.save(program, file, extra_files={"nearfar.json": _description(exported)})
        with _quiet(), partial.open("rb") as file:
            module = torch.export.load(file).module()
        return _compared(exported, lambda images: list(module(images)), size, "torch.export")


def _traced(exported: ExportedBackbone, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """The graph; of any size where the network allows that, else of `size`."""
    backbone, patch = exported.backbone, exported.backbone.patch_size
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
    height, width = size or exported.size
    if takes_any_size(backbone):
        if size is not None:
            raise UserError("This network is exported for images of every size; leave out --size.")
        dims |= {axis: patch * torch.export.Dim(name, min=2, max=256) for axis, name in ((2, "rows"), (3, "columns"))}
        height, width = 5 * patch, 7 * patch  # nothing that a dimension could be mistaken for
    check_divides(height, width, patch)
    with _quiet(), torch.no_grad():
        backbone(example((height, width)))  # a size that does not fit is named before anything is traced
        try:
            return torch.export.export(
                TokenTensors(backbone), (example((height, width)),), dynamic_shapes=(dims,), strict=False
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{exported.arch['name']} cannot be exported as a graph: {reason}") from error


def _compared(
    exported: ExportedBackbone, run: Callable[[Tensor], list[Tensor]], size: tuple[int, int] | None, by: str
) -> GraphExport:
    """Compare at the size of the network and, where the graph takes every size, at one that is not square."""
    any_size = takes_any_size(exported.backbone)
    height, width = size or exported.size
    sizes = [(height, width)]
    if any_size:
        sizes.append((height + 2 * exported.backbone.patch_size, max(width // 2, 2 * exported.backbone.patch_size)))
        sizes[1] = (sizes[1][0], sizes[1][1] // exported.backbone.patch_size * exported.backbone.patch_size)
    largest = 0.0
    for batch, each in zip((1, 3), (sizes * 2)[:2], strict=True):
        images = example(each, batch)
        with torch.no_grad():
            expected = list(TokenTensors(exported.backbone)(images))
        largest = max(largest, difference(run(images), expected, by))
    return GraphExport(largest, sizes, any_size)


def _description(exported: ExportedBackbone) -> str:
    about = {"arch": exported.arch, "step": exported.about.get("step"), "mean": list(MEAN), "std": list(STD)}
    return json.dumps(about)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own notes: what goes wrong is compared afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
