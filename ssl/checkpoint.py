"""Checkpoints: atomic, without pickle, strict, and describing themselves.

    step-000001200/
        tensors.safetensors      student, teacher, heads, center and optimizer, by name
        state.json               step, the resolved config, the data's fingerprint, versions
        manifest.json            sha256 and size of the two files above, and the seconds that writing took

A folder appears under its final name only when it is complete and on disk. Reading checks every digest; a damaged
checkpoint is set aside under `.damaged` and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfar.ssl.backbones import Backbone, create_described
from nearfar.ssl.backbones.weights import misfits
from nearfar.ssl.disk import checkpoint_names, digests, files
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import Classifier
from nearfar.ssl.parallel.sharding import is_sharded, split_like

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
TEACHER, CLASSIFIER = "teacher.safetensors", "classifier.safetensors"  # what a run leaves beside its checkpoints


class Checkpoint(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint differs from what was written; the message says how."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
    spared: Callable[[int], bool] = lambda _: False,
) -> Path:
    """Write `folder/step-XXXXXXXXX` atomically, then drop all but the newest `keep` checkpoints and those of the steps
    that are `spared`.

    Raises:
        UserError: the disk refused (no space, no right to write). Earlier checkpoints are untouched.
    """
    begun = time.monotonic()
    final = folder / checkpoint_names.name_of(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_partial(folder)
        with files.atomic_folder(final) as partial:
            _write_tensors(partial / TENSORS, tensors)
            (partial / STATE).write_text(json.dumps(state, indent=1))
            manifest = {**_manifest(partial), "seconds": round(time.monotonic() - begun, 3)}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except (OSError, SafetensorError) as error:
        kept = [path.name for path in checkpoint_names.finished(folder)]
        safe = f"{kept[-1]} is intact and the run continues from it" if kept else "no earlier checkpoint exists"
        raise UserError(
            f"The checkpoint of step {step} could not be written to {folder}: {error}. Nothing half-written was left; "
            f"{safe}. Free some space (or choose folder= on another disk) and start the same command again."
        ) from error
    for old in checkpoint_names.finished(folder)[:-keep]:
        if not spared(checkpoint_names.step_of(old) or 0):
            shutil.rmtree(old, ignore_errors=True)
    return final


def read(path: Path) -> Checkpoint:
    """One checkpoint, every digest checked.

    Raises:
        DamagedError: a file is missing, cut off or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, written in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise DamagedError(f"{name} is missing")
            size = file.stat().st_size
            if size != written["bytes"]:
                raise DamagedError(f"{name} has {size:,} bytes instead of {written['bytes']:,}")
            if digests.of_file(file) != written["sha256"]:
                raise DamagedError(f"{name} was changed after it was written (its digest differs)")
        return Checkpoint(path, load_file(path / TENSORS), json.loads((path / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"{MANIFEST} or its files cannot be read: {error}") from error


def latest(folder: Path, say: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest intact checkpoint; damaged newer ones are reported and set aside. None where there is none.

    Raises:
        UserError: there were checkpoints, and every one is damaged.
    """
    wrong: list[str] = []
    for path in reversed(checkpoint_names.finished(folder)):
        try:
            checkpoint = read(path)
        except DamagedError as error:
            wrong.append(f"{path.name}: {error}")
            continue
        for text in wrong:
            name = text.partition(":")[0]
            aside = folder / f"{name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (folder / name).rename(aside)
            say(f"Checkpoint {text}. It was set aside as {aside.name}; continuing from {path.name}.")
        return checkpoint
    if wrong:
        raise UserError(
            f"No checkpoint in {folder} is intact ({'; '.join(wrong)}). Put a good copy there, or remove the folder to "
            "start the run afresh."
        )
    return None


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy `tensors` into `module`: every name and shape must agree.

    Raises:
        UserError: naming the missing, unexpected and misshapen tensors.
    """
    own = module.state_dict()
    problems = misfits(own, tensors)
    if problems:
        raise UserError(f"The weights of {what} do not fit this model: {'; '.join(problems)}.")
    module.load_state_dict({name: _split(t, own[name]) for name, t in tensors.items()}, strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `exp_avg/blocks.0...` and so on."""
    return {
        f"{key}/{name}": value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; a parameter that had no state yet gets none."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise UserError(f"The checkpoint holds optimizer state for {name}, which this model does not have.")
        parameter = parameters[name]
        if key != "step" and value.shape != parameter.shape:
            raise UserError(
                f"The optimizer state {full} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}."
            )
        if key == "step":
            device = parameter.device if _capturable(optimizer) else "cpu"
            optimizer.state[parameter][key] = value.to(device, copy=True)
        else:  # a copy: the tensor may be mapped from the file
            optimizer.state[parameter][key] = split_like(value, parameter)


def export(path: str | Path, backbone: Backbone, about: dict[str, Any]) -> None:
    """Write a backbone as one safetensors file that records its architecture; `load` reads it."""
    export_tensors(Path(path), backbone.state_dict(), {"arch": backbone.arch, **about})


def export_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """`export` of a backbone's state; `about` must hold its `arch`."""
    try:
        _write_tensors(path, tensors, {"format": "pt", "nearfar": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written: {error}. Nothing half-written was left, and checkpoints are intact. Free "
            "some space (or choose another place) and start the same command again."
        ) from error


def load(path: str | Path) -> Backbone:
    """The teacher backbone of an exported file, a checkpoint folder or a run folder, in evaluation mode.

    Raises:
        UserError: nothing there, not nearfar's, damaged, or weights that do not fit the architecture they name.
    """
    file = weights_file(path)
    state = about(file)
    tensors = _teacher(file)
    if "classifier" in state or file.name == TENSORS:
        tensors = _within(tensors, "backbone.")
    backbone = create_described(state.get("arch"), tensors, str(file))
    load_strict(backbone, tensors, str(file))
    return backbone.eval().requires_grad_(False)


def load_classifier(path: str | Path) -> Classifier:
    """The classifier of a supervised run's folder, of one of its checkpoints or of a classifier.safetensors, in
    evaluation mode. Its `classes` are the names of its outputs.

    Raises:
        UserError: nothing there, not a classifier, damaged, or weights that do not fit what they describe.
    """
    file = weights_file(path)
    state = about(file)
    classes, pooling = _classes(state, file)
    tensors = _teacher(file)
    backbone = create_described(state.get("arch"), _within(tensors, "backbone."), str(file))
    if (weight := tensors.get("head.weight")) is None or weight.shape != (len(classes), backbone.embed_dim):
        raise UserError(f"{file} is damaged: its head does not fit its {len(classes)} classes.")
    classifier = Classifier(backbone, classes, pooling)
    load_strict(classifier, tensors, str(file))
    return classifier.eval().requires_grad_(False)


def _classes(state: dict[str, Any], file: Path) -> tuple[list[str], Literal["cls", "mean"]]:
    """Names of the classes, and what the head reads. Raises UserError where there is no head."""
    described = state.get("classifier")
    if described is None:
        raise UserError(
            f"{file} holds a backbone without a classifier: train one from it with `nearfar finetune RECIPE "
            f"backbone.weights={file} data.path=LABELED_IMAGES`."
        )
    classes, pooling = (described.get("classes"), described.get("pooling")) if isinstance(described, dict) else (0, 0)
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{file} is damaged: the names of its classes cannot be read.")
    if pooling not in ("cls", "mean"):
        raise UserError(f"{file} is damaged: it does not say what its head reads.")
    return classes, pooling


def _teacher(file: Path) -> dict[str, Tensor]:
    """The tensors of an exported file, or those of the teacher in a checkpoint."""
    if file.name == TENSORS:
        return _within(_intact(file.parent).tensors, "learner/teacher.")
    try:
        return load_file(file)
    except (OSError, MemoryError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def about(path: str | Path) -> dict[str, Any]:
    """What the weights of `path` (as in `load`) record about themselves: `arch`, `step`, `run`, `data`, `versions`.

    Raises:
        UserError: nothing there, not nearfar's, or damaged.
    """
    file = weights_file(path)
    if file.name == TENSORS:
        return _intact(file.parent).state
    try:
        with safe_open(file, "pt") as handle:
            text = (handle.metadata() or {}).get("nearfar")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}.") from None
    if text is None:
        raise UserError(f"{file} was not written by nearfar: it does not say which architecture it holds.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: its description of the architecture cannot be read.")
    return found


def weights_file(path: str | Path) -> Path:
    """The file of weights of a run folder or a checkpoint folder, or the file itself."""
    path = Path(path)
    try:
        if path.is_file():
            return path
        for file in (path / TEACHER, path / CLASSIFIER, path / TENSORS):
            if file.is_file():
                return file
        if found := checkpoint_names.finished(path / "checkpoints"):
            return found[-1] / TENSORS
        state = "has no weights in it (yet)" if path.is_dir() else "does not exist"
    except OSError as error:  # no right to look, or a name longer than names can be
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    raise UserError(f"{path} {state}. {checkpoint_names.WHAT_TO_GIVE}")


def _intact(folder: Path) -> Checkpoint:
    try:
        return read(folder)
    except DamagedError as error:
        raise UserError(f"The checkpoint {folder} is damaged: {error}.") from None


def _manifest(folder: Path) -> dict[str, Any]:
    return {
        "format": "nearfar checkpoint 1",
        "files": {
            name: {"sha256": digests.of_file(folder / name), "bytes": (folder / name).stat().st_size}
            for name in (TENSORS, STATE)
        },
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Through `files.atomic`, since safetensors makes its files readable by their owner only, whatever the umask."""
    with files.atomic(path) as partial:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata)


def _split(tensor: Tensor, like: Tensor) -> Tensor:
    return split_like(tensor, like) if is_sharded(like) else tensor


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
