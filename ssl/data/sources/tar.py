"""Sources for data that has outgrown a folder: webdataset's tar shards, and Hugging Face data sets.

Both are read at random, image by image, so that order, ranks, seeking and replacement are those of every source; a
filesystem that takes such reads is all that is needed.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.decode import SUFFIXES, decode, upright
from nearfar.ssl.errors import BadImage, UserError


class TarSource:
    """Uncompressed tar files, a sample being the files of the same name up to its first dot: NAME.jpg, NAME.cls.

    `.cls` holds the class number as text; either all samples have one or none. `.txt`, `.json` and others are passed
    over. Opening reads the headers of all files once; images are then read at their offsets.

    Raises UserError for a shard that is no tar, is compressed or was cut off, and where there are no images.
    """

    classes: list[str] | None = None

    def __init__(self, shards: Iterable[str | Path]) -> None:
        self.shards = [str(shard) for shard in shards]
        self._names: list[str] = []
        places: list[tuple[int, int, int]] = []  # shard, offset, size
        labels: dict[tuple[int, str], int] = {}
        keys: list[tuple[int, str]] = []
        for number, shard in enumerate(self.shards):
            for name, offset, size in _members(shard):
                folder, _, base = name.rpartition("/")
                stem, _, kind = base.partition(".")
                key = (number, f"{folder}/{stem}")
                if f".{kind.lower()}" in SUFFIXES:
                    keys.append(key)
                    places.append((number, offset, size))
                    self._names.append(f"{os.path.basename(shard)}:{name}")
                elif kind == "cls":
                    labels[key] = _class_number(shard, name, offset, size)
        if not keys:
            raise UserError(f"There are no images in {', '.join(self.shards[:3]) or 'an empty list of shards'}.")
        self._places = np.array(places, np.int64)
        missing = [name for key, name in zip(keys, self._names, strict=True) if key not in labels]
        if labels and missing:
            raise UserError(f"{missing[0]} has no class beside it (.cls), as {len(labels)} others have: all or none.")
        self.labels: NDArray[np.int64] | None = np.array([labels[key] for key in keys], np.int64) if labels else None

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, i: int) -> bytes | None:
        return self._file(i)

    def _file(self, i: int) -> bytes:
        shard, offset, size = self._places[i].tolist()
        try:
            return _part(self.shards[shard], offset, size)
        except OSError as error:
            raise BadImage(self.name(i), str(error)) from error

    def read(self, i: int) -> Image.Image:
        return decode(BytesIO(self._file(i)), self.name(i))

    def name(self, i: int) -> str:
        return self._names[i]

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return _digest(["\n".join(self._names).encode(), self._places.tobytes(), labels])


def _members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file in a tar."""
    try:
        length = os.path.getsize(shard)
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if member.isfile():
                    if member.offset_data + member.size > length:
                        raise UserError(f"{shard} was cut off: {member.name} should end beyond its last byte.")
                    yield member.name, member.offset_data, member.size
            if file.offset + 512 > length:  # where the block of zeros should be that ends a tar
                raise UserError(f"{shard} was cut off: it has no end.")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read as an uncompressed tar file: {error}.") from error


def _part(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) != size:
        raise OSError(f"{os.path.basename(file)} ends before it")
    return data


def _class_number(shard: str, name: str, offset: int, size: int) -> int:
    text = _part(shard, offset, min(size, 100)).strip()
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{shard}: {name} holds {text[:20]!r}, where a class number is needed.") from None


class HuggingFaceSource:
    """A `datasets.Dataset` (or anything with rows by number, columns by name and `features` alike).

    Images are a column of the kind `datasets.Image`: read as bytes where the package is at hand to say so, else as the
    Pillow images that rows hold. Class names come from `features[label].names`. A streamed data set has no length, and
    so cannot be in an order that restarts keep: UserError.
    """

    def __init__(self, dataset: Any, image: str = "image", label: str = "label", name: str = "a data set") -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(f"{name} is streamed: rows by number are needed. Load it without streaming=True.")
        columns = list(dataset.features)
        if image not in columns:
            raise UserError(f"{name} has no column '{image}'; its columns are: {', '.join(columns)}.")
        self.file, self._image = name, image
        self.labels: NDArray[np.int64] | None = None
        self.classes: list[str] | None = None
        if label in columns:
            self.labels = np.asarray(list(dataset[label]), np.int64)
            self.classes = list(getattr(dataset.features[label], "names", None) or []) or None
        self._dataset = _as_bytes(dataset, image)

    def __len__(self) -> int:
        return len(self._dataset)

    def _cell(self, i: int) -> Any:
        try:
            return self._dataset[int(i)][self._image]
        except MemoryError:
            raise
        except Exception as error:  # rows that hold images are decoded on the way, by whatever
            raise BadImage(self.name(i), str(error) or type(error).__name__) from error

    def encoded(self, i: int) -> bytes | None:
        cell = self._cell(i)
        if not isinstance(cell, dict):
            return None
        if cell.get("bytes") is None:
            try:
                return Path(cell["path"]).read_bytes()
            except (OSError, TypeError) as error:
                raise BadImage(self.name(i), str(error)) from error
        return bytes(cell["bytes"])

    def read(self, i: int) -> Image.Image:
        cell = self._cell(i)
        if isinstance(cell, dict):
            return decode(BytesIO(self.encoded(i) or b""), self.name(i))
        if not isinstance(cell, Image.Image):
            raise BadImage(self.name(i), f"the column '{self._image}' holds {type(cell).__name__}, no image")
        return upright(cell, self.name(i))

    def name(self, i: int) -> str:
        return f"{self.file}[{i}]"

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        some = [self.encoded(i) or self.read(i).tobytes() for i in range(0, len(self), max(1, len(self) // 100))]
        return _digest([str(len(self)).encode(), labels, *some])


def _as_bytes(dataset: Any, column: str) -> Any:
    """The data set with its images undecoded, where `datasets` is installed and it is one of its own."""
    if not hasattr(dataset, "cast_column"):
        return dataset
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False))


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """A data set that `Dataset.save_to_disk` wrote. Raises UserError where the package `datasets` is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{folder} is a data set of Hugging Face's `datasets`, which is not installed: pip install datasets."
        ) from None
    return HuggingFaceSource(datasets.load_from_disk(str(folder)), name=folder.name)


def is_hugging_face(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "_data_files" in state


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]
