"""Paths that are not there, on a command line and in settings: told before what would read them is imported."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.ssl.data.missing import require_path
from nearfar.ssl.disk.checkpoint_names import WHAT_TO_GIVE
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from nearfar.ssl.settings.run import AnyRun

# Arguments that are paths of images, or of their features.
_IMAGES = ("source", "images", "data", "file", "train", "val")


def require_paths(arguments: argparse.Namespace) -> None:
    """Raises UserError where a path on the command line is not there: said before what reads it is imported."""
    with contextlib.suppress(OSError):  # which opening it will tell
        for name in ("model", "weights"):
            _require_weights(getattr(arguments, name, None))
        submitted = hasattr(arguments, "training")  # to a cluster, where a node's set-up may bring the images
        for name in () if submitted else _IMAGES:
            path = getattr(arguments, name, None)
            if path is not None and "=" not in str(path):  # a setting in its place is the verb's to tell
                require_path(path)


def _require_weights(given: Path | str | None) -> None:
    """given: a path, or what timm publishes; as a string also a setting that came too early."""
    if given is None or str(given).startswith("timm/") or (isinstance(given, str) and "=" in given):
        return
    path = Path(given).expanduser()
    if not path.exists():
        raise UserError(f"{given} does not exist. {WHAT_TO_GIVE}")
    if isinstance(given, Path) and path.is_file():
        with path.open("rb") as file:
            begin = file.read(9)
        # Of safetensors a header of JSON after its length; of torch.save a zip, in older versions a pickle.
        if begin[8:] != b"{" and not begin.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise UserError(f"{given} is no file of weights. {WHAT_TO_GIVE}")


def require_settings_paths(run: AnyRun) -> None:
    """Raises UserError where images that `run` names are not on this machine, or the weights that it begins with."""
    for path in (run.data.path, run.data.val):
        if path:
            require_path(path)
    from nearfar.ssl.run import kept
    from nearfar.ssl.settings.run import Run

    if run.path.exists():  # it goes on from its own checkpoint
        return
    if run.train.start_from:
        kept.named(run.train.start_from)
    weights = {"backbone.weights": run.backbone.weights}
    if isinstance(run, Run):
        weights |= {"loss.gram_teacher": run.loss.gram_teacher, "distill.teacher_weights": run.distill.teacher_weights}
    for key, file in weights.items():
        if _is_missing(file):
            raise UserError(f"{key}={file} does not exist. {WHAT_TO_GIVE}")
    if isinstance(run, Run) and not run.distill.teacher_weights and _is_missing(run.distill.teacher):
        raise UserError(
            f"There is no teacher {run.distill.teacher}: no such file or folder. distill.teacher is a run's folder, an "
            "exported .safetensors, timm/NAME or, with distill.teacher_weights=FILE, the name of a network."
        )


def _is_missing(weights: str | None) -> bool:
    """Is it a path where nothing is? What timm publishes goes by its name."""
    return weights is not None and not weights.startswith("timm/") and not os.path.exists(os.path.expanduser(weights))
