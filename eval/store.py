"""Features on disk: written once as the backbone makes them, memory-mapped by every evaluator afterwards."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.eval.features import Features, Rows, Size, describe, stream
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import UserError


class FeatureStore:
    """A folder of features.npy (memory-mapped), index, labels and masks where there are, manifest.json."""

    @staticmethod
    def write(
        folder: Path,
        backbone: Backbone,
        source: Source,
        *,
        size: Size,
        layer: str = "final",
        pooling: str = "cls",
        batch_size: int = 64,
        workers: int = 0,
        amp: bool = False,
        resize: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Features:
        """`extract` straight to disk, so that features need not fit in memory; what is already there is
        reused.

        A store made from the same weights, data and reading is opened; any other store in `folder` is
        replaced, and a folder that is no feature store is left alone (UserError). The folder appears complete
        or not at all.
        """
        manifest = describe(backbone, source, size=size, layer=layer, pooling=pooling, amp=amp, resize=resize)
        if folder.exists():
            if not (folder / "manifest.json").is_file() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} exists and is no feature store (it has no manifest.json), so nothing is "
                    "written over it. Choose another folder, or remove that one."
                )
            with contextlib.suppress(UserError):  # a damaged store is as good as none: it is made again
                return FeatureStore.open(folder, manifest)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            features = _fill(partial, backbone, source, manifest, batch_size, workers, progress)
            _save(partial, features)
            del features  # releases the memory map before its file moves
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return FeatureStore.open(folder)

    @staticmethod
    def open(folder: Path, expected: dict[str, Any] | None = None) -> Features:
        """Open a store. Raises UserError that names the file or entry which is missing, cut off or not as
        expected.

        expected: entries that the manifest must hold, such as {"checkpoint": digest(backbone)} or a whole
        `describe`.
        """
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            shape = tuple(manifest["shape"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is not a readable feature store: manifest.json: {error}.") from None
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
            except (OSError, ValueError) as error:
                raise UserError(f"The feature store {folder} is damaged: {file.name}: {error}.") from None
            if len(arrays[name]) != shape[0] or (name == "features" and arrays[name].shape != shape):
                raise UserError(
                    f"The feature store {folder} is damaged: {file.name} has shape {arrays[name].shape}, but "
                    f"the manifest says {shape if name == 'features' else f'{shape[0]} rows'}."
                )
        small = {name: np.array(arrays[name]) for name in arrays if name in ("index", "labels", "mask_size")}
        return Features(x=arrays["features"], masks=arrays.get("masks"), manifest=manifest, **small)


def _fill(
    folder: Path,
    backbone: Backbone,
    source: Source,
    manifest: dict[str, Any],
    batch_size: int,
    workers: int,
    progress: Callable[[int], object] | None,
) -> Features:
    """Features written to folder/features.npy as they are made."""
    file, rows = folder / "features.npy", Rows()
    x: np.ndarray | None = None
    done = 0
    for batch, part in stream(backbone, source, manifest, batch_size, workers):
        rows.add(batch)
        if part is not None:
            if x is None:
                x = np.lib.format.open_memmap(file, "w+", np.float32, (len(source), *part.shape[1:]))
            x[done : done + len(part)] = part
            done += len(part)
        if progress:
            progress(len(batch.index) + len(batch.bad))
    if x is not None and done < len(source):  # unreadable images leave rows over: write it once more
        short = np.lib.format.open_memmap(folder / "short.npy", "w+", np.float32, (done, *x.shape[1:]))
        for start in range(0, done, 4096):
            short[start : start + 4096] = x[start : min(start + 4096, done)]
        (folder / "short.npy").replace(file)
        x = short
    if isinstance(x, np.memmap):
        x.flush()
    return rows.features(np.empty(0) if x is None else x, source, manifest)


def _save(folder: Path, features: Features) -> None:
    """Everything of a store but features.npy; all of it is on the disk before the folder is renamed."""
    arrays = {
        "index": features.index,
        "labels": features.labels,
        "masks": features.masks,
        "mask_size": features.mask_size,
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    for name, array in present.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    manifest = {**features.manifest, "arrays": ["features", *present]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
