"""Features for other programs than ours: several layers from one pass, and tables beside the store."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nearfar.eval.features.extraction import DEFAULT_DECODING, Features, Reading, layer_count, manifest_of
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.store import FeatureStore, is_store, row_name, save_rest
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError

Table = Literal["csv", "parquet"]
_ROWS = 4096  # of a table or a store that are in memory at once


def write_layers(
    folder: Path,
    backbone: Backbone,
    source: Source,
    reading: Reading,
    layers: Sequence[str],
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, Features]:
    """A feature store for each layer, folder/LAYER, of images that are decoded once; what is there is reused.

    Each store is the one that `FeatureStore.write` makes of that layer alone, to the bit. Until the last image is read
    all layers are one store beside `folder`, which a killed process continues.

    Raises:
        UserError: a layer that is not there or is named twice, a folder with something else in it, or a refusing disk.
    """
    if len(set(layers)) < len(layers) or reading.pooling == "grid":
        raise UserError("Several layers are read each once, and pooled: name each once, or write grids one by one.")
    manifests = {layer: manifest_of(backbone, source, replace(reading, layer=layer)) for layer in layers}
    try:
        return {layer: FeatureStore.open(folder / layer, manifests[layer]) for layer in layers}
    except UserError:
        _require_stores(folder)
    try:
        joined = folder.with_name(f".{folder.name}-layers")
        whole = FeatureStore.write(joined, backbone, source, replace(reading, layer="+".join(layers)), decoding)
        widths = _widths(whole.x.shape[1], layers)
        with files.atomic_folder(folder) as partial:
            start = 0
            for layer in layers:
                _write_columns(partial / layer, whole, source, manifests[layer], slice(start, start + widths[layer]))
                start += widths[layer]
        del whole  # releases the memory map before its file goes
        shutil.rmtree(joined, ignore_errors=True)
    except OSError as error:
        raise UserError(f"The features cannot be written to {folder}: {error.strerror or error}.") from error
    return {layer: FeatureStore.open(folder / layer) for layer in layers}


def _require_stores(folder: Path) -> None:
    """Raises UserError where something else than the stores of layers is in the way."""
    if folder.is_dir() and all(is_store(inside) for inside in folder.iterdir()):
        return
    if folder.exists():
        raise UserError(
            f"{folder} holds something other than the features of several layers, so it is not overwritten. Choose "
            "another folder, or remove that one."
        )


def _widths(whole: int, layers: Sequence[str]) -> dict[str, int]:
    """Columns of each layer, of `whole` together: every block is as wide as the others."""
    blocks = {layer: layer_count(layer) for layer in layers}
    if whole % sum(blocks.values()):
        raise UserError("The layers of this network differ in width: write them one by one.")
    return {layer: number * (whole // sum(blocks.values())) for layer, number in blocks.items()}


def _write_columns(folder: Path, whole: Features, source: Source, manifest: dict[str, Any], columns: slice) -> None:
    folder.mkdir()
    shape = len(whole.x), columns.stop - columns.start
    x = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, shape)
    for start in range(0, shape[0], _ROWS):
        x[start : start + _ROWS] = whole.x[start : start + _ROWS, columns]
    x.flush()
    kept = {key: value for key, value in whole.manifest.items() if key not in (*manifest, "arrays")}
    merged = {**manifest, **kept, "shape": list(shape)}
    save_rest(folder, replace(whole, x=x, manifest=merged), source)


# Tables -----------------------------------------------------------------------------------------------------


def check_table(kind: Table, pooling: str) -> None:
    """Raises UserError where `write_table` could not write: before hours of computing find out."""
    if pooling == "grid":
        raise UserError(
            f"A table has a row for each image, and grids have one for each patch: leave out --format {kind}."
        )
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "--format parquet needs the package pyarrow, which is not installed: pip install pyarrow (or "
            "nearfar[parquet]), or take --format csv."
        )


def write_table(folder: Path, features: Features, source: Source, kind: Table) -> Path:
    """features.csv or features.parquet beside the store: name, label and class where there are labels, the feature.

    CSV has a column for each number of the feature, f0, f1, ..., in the fewest digits that give the same float32;
    Parquet one column of lists. Raises UserError as `check_table`, and where the disk refuses.
    """
    check_table(kind, "grid" if features.x.ndim != 2 else "")
    file = folder / f"features.{kind}"
    try:
        with files.atomic(file) as partial:
            (_write_csv if kind == "csv" else _write_parquet)(partial, features, source)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
    return file


def _columns(features: Features, source: Source, rows: slice) -> Iterator[tuple[str, list[Any]]]:
    """What stands before the features of some rows."""
    yield "name", [row_name(source, int(i)) for i in features.index[rows]]
    if features.labels is not None:
        labels = features.labels[rows].tolist()
        yield "label", labels
        if (classes := features.manifest.get("classes")) is not None:
            yield "class", [classes[label] if 0 <= label < len(classes) else "" for label in labels]


def _parts(features: Features) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, len(features.x))) for start in range(0, len(features.x), _ROWS))


def _write_csv(file: Path, features: Features, source: Source) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        for part in _parts(features):
            columns = dict(_columns(features, source, part))
            if part.start == 0:
                table.writerow([*columns, *(f"f{i}" for i in range(features.x.shape[1]))])
            for *about, x in zip(*columns.values(), features.x[part], strict=True):
                table.writerow([*about, *map(str, x)])


def _write_parquet(file: Path, features: Features, source: Source) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for part in _parts(features):
            x = np.ascontiguousarray(features.x[part])
            lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
            table = pa.table({**dict(_columns(features, source, part)), "feature": lists})
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
