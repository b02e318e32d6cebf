"""Weights that a user names: ours, which describe themselves, a public file, which its tensors tell, or timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.backbones.recognized import load_public
from nearfar.ssl.backbones.weights import weights_in
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.errors import UserError


def load_given(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone, in evaluation mode, and what is recorded about it (`checkpoint.about`; of public weights `arch` and
    the `origin`, their name).

    path: a folder or a file, or timm/NAME for what timm publishes.

    Raises:
        UserError: nothing there, damaged, or a network that nobody knows.
    """
    path = Path(path)
    if is_published(path):
        backbone = create(path.as_posix(), pretrained=True).eval().requires_grad_(False)
        return backbone, {"arch": backbone.arch, "origin": path.as_posix()}
    if not is_public(path):
        return checkpoint.load(path), checkpoint.about(path)
    try:
        backbone = load_public(path)
    except UserError as error:
        raise UserError(f"{error} {checkpoint_names.WHAT_TO_GIVE}") from None
    return backbone, {"arch": backbone.arch, "origin": path.name}


def folder_of(path: Path) -> Path:
    """Where the scores of these weights belong: beside their file, and for timm/NAME here.

    Raises UserError where there is nothing.
    """
    if is_published(path):
        return Path()
    return (weights_in(path) if is_public(path) else checkpoint.weights_file(path)).parent


def is_published(path: Path) -> bool:
    """Is it the name of what timm publishes (timm/NAME), and no path of that name?"""
    return len(path.parts) == 2 and path.parts[0] == "timm" and not path.exists()


def is_public(path: Path) -> bool:
    """Is it a file of another code base, or a folder with such a file? What is not there or damaged: no."""
    if path.is_dir():
        ours = (checkpoint.TEACHER, checkpoint.CLASSIFIER, checkpoint.TENSORS, "checkpoints")
        return (path / "model.safetensors").is_file() and not any((path / name).exists() for name in ours)
    if not path.is_file() or path.name == checkpoint.TENSORS:  # of a checkpoint, which is described beside it
        return False
    if path.suffix != ".safetensors":
        return True
    try:
        with safe_open(path, "pt") as handle:
            return "nearfar" not in (handle.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False
