"""Features on disk: written once as the backbone makes them, memory-mapped by every evaluator afterwards."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.eval.features.extraction import DEFAULT_DECODING, Features, Reading, manifest_of, stream
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.partial_store import PartialFeatures, partial_folder
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import bounded_files, files
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import printable

_KINDS = {  # what each array of a store may hold: kinds of dtype, and dimensions
    "features": ("f", (2, 4)),
    "index": ("iu", (1,)),
    "labels": ("iu", (1,)),
    "masks": ("u", (3,)),
    "mask_size": ("iu", (2,)),
}
_KEPT_EVERY = 1024  # images between two points from which a killed process can be resumed
_MOST_BYTES = 256 * 2**20  # bytes; it names every unreadable image


class FeatureStore:
    """A folder of features.npy (memory-mapped), index, labels and masks where there are, names.txt, manifest.json."""

    @staticmethod
    def write(
        folder: Path, backbone: Backbone, source: Source, reading: Reading, decoding: Decoding = DEFAULT_DECODING
    ) -> Features:
        """`extract` straight to disk, so that features need not fit in memory; what is already there is
        reused.

        A store made from the same weights, data and reading is opened; any other store in `folder` is
        replaced, and a folder that is not a feature store is left alone (UserError). The folder appears complete
        or not at all. What a killed process left of the same work (weights, data, reading, batch size, kind of device,
        torch) is continued, to the same bits; what it left of other work is removed. Raises UserError also
        where the disk refuses, before anything is computed if it does so at once.
        """
        manifest = manifest_of(backbone, source, reading)
        try:
            if folder.exists():
                if not (folder / "manifest.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
                    raise UserError(
                        f"{folder} exists and is not a feature store (it has no manifest.json), so it is not "
                        "overwritten. Choose another folder, or remove that one."
                    )
                with contextlib.suppress(UserError):  # a damaged store is made again, like a missing one
                    return FeatureStore.open(folder, manifest)
            making = {**manifest, "batch_size": decoding.batch_size, "torch": torch.__version__}
            making["device"] = next(backbone.parameters()).device.type
            with partial_folder(folder, making) as partial:
                features = _fill(partial, backbone, source, manifest, decoding)
                save_rest(partial, features, source)
                del features  # releases the memory map before its file moves
                files.sync_tree(partial)
                files.move(partial, folder)
        except OSError as error:
            raise UserError(
                f"The features cannot be written to {folder}: {error.strerror or error}. Name a folder that you may "
                "write to, with room for them."
            ) from error
        return FeatureStore.open(folder)

    @staticmethod
    def open(folder: Path, expected: dict[str, Any] | None = None) -> Features:
        """Open a store. Raises UserError that names the file or entry which is missing, cut off or not as
        expected.

        expected: entries that the manifest must hold, such as {"checkpoint": digest(backbone)} or a whole
        `manifest_of`.
        """
        manifest = _read_manifest(folder)
        for key, value in (expected or {}).items():
            if manifest.get(key) != value:
                raise UserError(
                    f"The feature store {folder} was made with {key} = {manifest.get(key)}, not {value}. "
                    "Make it again, or give the checkpoint and data it was made from."
                )
        arrays: dict[str, np.ndarray] = {}
        for name in manifest["arrays"]:
            file = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError, SyntaxError) as error:
                raise UserError(f"The feature store {folder} is damaged: {file.name}: {error}.") from None
            if wrong := _misshapen(name, arrays[name], tuple(manifest["shape"])):
                raise UserError(f"The feature store {folder} is damaged: {file.name} has {wrong}.")
        if ("masks" in arrays) != ("mask_size" in arrays):
            raise UserError(f"The feature store {folder} is damaged: masks.npy and mask_size.npy belong together.")
        small = {name: np.array(arrays[name]) for name in ("index", "labels", "mask_size") if name in arrays}
        return Features(x=arrays["features"], masks=arrays.get("masks"), manifest=manifest, **small)


def is_store(folder: Path) -> bool:
    """Does a folder hold features? (A checkpoint has a manifest too.)"""
    return (folder / "manifest.json").is_file() and not (folder / "tensors.safetensors").is_file()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json with `shape` and `arrays` checked."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(bounded_files.read_text(file, _MOST_BYTES))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no names and values")
        shape, arrays = manifest["shape"], manifest["arrays"]
        if not isinstance(shape, list) or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError("`shape` is not a shape")
        if not isinstance(arrays, list) or not {"features", "index"} <= set(arrays) <= _KINDS.keys():
            raise ValueError("`arrays` are not those of a feature store")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is not a readable feature store: manifest.json: {error}.") from None
    return manifest


def _misshapen(name: str, array: np.ndarray, shape: tuple[int, ...]) -> str | None:
    """What is wrong with an array of a store whose features should have `shape`; None when nothing is."""
    kinds, dimensions = _KINDS[name]
    if array.dtype.kind not in kinds:
        return f"entries of type {array.dtype}"
    if array.ndim not in dimensions or len(array) != shape[0] or (name == "features" and array.shape != shape):
        expected = shape if name == "features" else f"{shape[0]} rows"
        return f"shape {array.shape}, but the manifest says {expected}"
    return None


def _fill(folder: Path, backbone: Backbone, source: Source, manifest: dict[str, Any], decoding: Decoding) -> Features:
    """Features written to folder/features.npy as they are made, from where the folder stands."""
    progress = PartialFeatures(folder, source, masks=manifest["pooling"] == "grid")
    images, kept = progress.images, progress.images
    if images and decoding.progress:
        decoding.progress(images)
    for batch, part in stream(backbone, source, manifest, decoding, start=images):
        progress.rows.add(batch)
        if part is not None:
            progress.add(part)
        images += len(batch.index) + len(batch.bad)
        if images - kept >= _KEPT_EVERY:
            progress.keep(images)
            kept = images
    x = progress.whole()
    return progress.rows.features(np.empty(0) if x is None else x, source, manifest)


def row_name(source: Source, i: int) -> str:
    """The name of an image on one line."""
    return printable(source.name(i)).replace("\n", "\\n")


def save_rest(folder: Path, features: Features, source: Source) -> None:
    """Everything of a store but features.npy; all of it is on the disk before the folder is renamed.

    names.txt has the name of each row's image, one a line, printable.
    """
    arrays = {
        "index": features.index,
        "labels": features.labels,
        "masks": features.masks,
        "mask_size": features.mask_size,
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    for name, array in present.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    names = "".join(f"{row_name(source, int(i))}\n" for i in features.index)
    (folder / "names.txt").write_text(names, encoding="utf-8")
    manifest = {**features.manifest, "arrays": ["features", *present]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    files.sync_tree(folder)
