"""`nearfar export`: a backbone as one file, or as a folder, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.launch.verbs.command_line import add_model
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from nearfar.launch.exports.exported import ExportedBackbone

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
FORMATS = ("safetensors", "timm", "huggingface", "onnx", "torch-export")


def add_export(verbs: argparse._SubParsersAction) -> None:
    export = verbs.add_parser(
        "export",
        help="write the teacher backbone for nearfar (one self-describing file), timm, transformers, ONNX or torch",
        description="Write the teacher backbone. What is written for other programs is loaded again and compared with "
        "the network before it gets its name; nothing that exists is written over.",
    )
    add_model(export)
    export.add_argument(
        "out", type=Path, help="NAME.safetensors, NAME.onnx or NAME.pt2; for timm and huggingface a new folder"
    )
    export.add_argument(
        "--to", choices=FORMATS, default="safetensors", help="format to write (default safetensors, for nearfar)"
    )
    export.add_argument(
        "--checkpoint", metavar="STEP", help="weights of this step of the run, not its last; best: of the highest k-NN"
    )
    export.add_argument(
        "--license", default="unknown", help="license of the weights for the model card, such as apache-2.0"
    )
    export.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images in a graph that takes one size only (default: what the network is made for)",
    )
    export.set_defaults(verb=run_export)


def run_export(arguments: argparse.Namespace) -> None:
    kind, out = arguments.to, arguments.out
    suffix = SUFFIXES.get(kind)
    if suffix and out.suffix != suffix:
        holds = "safetensors" if kind == "safetensors" else f"what --to {kind} writes"
        raise UserError(f"{out} would hold {holds}, whatever its name says: name it {out.with_suffix(suffix)}.")
    if arguments.size and kind not in ("onnx", "torch-export"):
        raise UserError(f"--size is for --to onnx and --to torch-export; {kind} keeps the weights for every size.")
    from nearfar.launch.exports.exported import require_free, to_export

    require_free(out)
    exported = to_export(arguments.model, arguments.checkpoint, arguments.license)
    try:
        outcome = _write(exported, kind, out, tuple(arguments.size) if arguments.size else None)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error.strerror or error}.") from error
    origin = exported.about.get("origin") or f"step {exported.about.get('step')}"
    print(f"{out}: {exported.arch['name']} of {origin}{outcome}")


def _write(exported: ExportedBackbone, kind: str, out: Path, size: tuple[int, int] | None) -> str:
    """Write one format; what was found when it was loaded again, in words."""
    if kind == "safetensors":
        from nearfar.ssl import checkpoint

        checkpoint.export(out, exported.backbone, exported.about)
        return ""
    if kind in ("timm", "huggingface"):
        from nearfar.launch.exports import folders

        write = folders.write_timm if kind == "timm" else folders.write_huggingface
        folder = write(exported, out)
        note = f"\n{folder.note}" if folder.note else ""
        return f"; loaded strictly by {folder.loaded_by}, largest difference of a feature {folder.difference:.1e}{note}"
    from nearfar.launch.exports import graphs

    graph = (graphs.write_onnx if kind == "onnx" else graphs.write_torch_export)(exported, out, size)
    sizes = " and ".join(f"{height}x{width}" for height, width in graph.sizes)
    which = "any size" if graph.any_size else "this size only (a table in it depends on the size)"
    return f"; loaded and compared at {sizes}, largest difference {graph.difference:.1e}; for images of {which}"
