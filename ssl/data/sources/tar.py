"""Tar shards, as webdataset writes them, read image by image in any order, so that order, ranks, seeking and
replacement are those of every source; the file system must be quick at such reads.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.decode import decode
from nearfar.ssl.data.missing import SUFFIXES
from nearfar.ssl.data.sources.base import first_bytes, sampled_images
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import printable

_TEXTS = {"cls", "txt", "json"}  # beside an image, and not for pretraining
_MAX_DIGITS = 18  # any such number fits into 63 bits


class TarSource:
    """Uncompressed tar files, a sample being the files of the same name up to its first dot: NAME.jpg, NAME.cls.

    `.cls` holds the class number as text; either all samples have one or none. `.txt`, `.json` and others are
    skipped. Opening reads the headers of all files once; images are then read at their offsets.

    Raises UserError for a shard that is not a tar, is compressed or was cut off, and where there are no images.
    """

    classes: list[str] | None = None
    passed_over: Sequence[str] = ()  # files that are not images, by their names

    def __init__(self, shards: Iterable[str | Path]) -> None:
        self.shards = [str(shard) for shard in shards]
        self._names: list[str] = []
        places: list[tuple[int, int, int]] = []  # shard, offset, size
        labels: dict[tuple[int, str], int] = {}
        keys: list[tuple[int, str]] = []
        others: list[str] = []
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
                elif kind not in _TEXTS:
                    others.append(f"{os.path.basename(shard)}:{name}")
        self.passed_over = others
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
        return printable(self._names[i])

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        """All names, labels and where images are, and how about a hundred of them begin."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        begins = (
            first_bytes(self.shards[shard], offset, size)
            for shard, offset, size in self._places[list(sampled_images(len(self)))].tolist()
        )
        return digests.fingerprint(["\n".join(self._names), self._places.tobytes(), labels, *begins])


def _members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file in a tar."""
    try:
        length, before = os.path.getsize(shard), -1
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if member.size < 0 or member.offset_data <= before:  # else it could loop forever
                    raise UserError(f"{shard} is damaged: {member.name} is listed as lying before its predecessor.")
                before = member.offset_data
                if member.isfile() and not member.issparse():
                    if member.offset_data + member.size > length:
                        raise UserError(f"{shard} was cut off: {member.name} should end beyond its last byte.")
                    yield member.name, member.offset_data, member.size
            if file.offset + 512 > length:  # where the block of zeros should be that ends a tar
                raise UserError(f"{shard} was cut off: it has no end.")
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged headers make tarfile raise nearly anything
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
    digits = text.removeprefix(b"-")
    if size > 100 or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        long = f" and {size - 20:,} bytes more" if size > 20 else ""
        raise UserError(f"{shard}: {name} holds {text[:20]!r}{long}, where a class number is needed.")
    return int(text)
