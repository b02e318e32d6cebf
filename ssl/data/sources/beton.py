"""FFCV's file format (.beton): its layout, and the file as a source. Reading needs numpy only.

    header | field descriptors | one record a sample | pages of data | table of allocations

A record holds numbers, and pointers into the pages; the table at the end holds the size of what each pointer points at
(FFCV 1.0's `types.py`, format version 2). Files of FFCV's own writer are read as well. Ours (beton_writer.py) have the
fields `image` (JPEG bytes or raw pixels), `label`, `mask` (PNG bytes, one channel) and `name` (JSON: name, index
in the source, CRC-32 of the image's bytes), and a JSON block about the file, to which the descriptor of `name` points.
"""

import json
import os
import weakref
import zlib
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.decode import FORMATS, decode
from nearfar.ssl.data.sources.base import sampled_images
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import printable

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FLOAT, INT, IMAGE, BYTES, ARRAY, JSON, TENSOR = range(7)  # types of fields
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
RECORD = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")]),
    BYTES: _BYTES,
    ARRAY: np.dtype("<u8"),
    JSON: _BYTES,
    TENSOR: np.dtype("<u8"),
}
TYPE_NAMES = {
    FLOAT: "number", INT: "integer", IMAGE: "image", BYTES: "bytes", ARRAY: "array", JSON: "JSON", TENSOR: "tensor",
}  # fmt: skip
JPEG, RAW = 0, 1  # modes of an image
_LONGEST_ENTRY = 2**16  # bytes that the field `name` may take for one image
ABOUT = b"nearfar1"  # in the arguments of `name`, before the offset and size of the block about the whole file


class BetonSource:
    """A .beton as a source. Images are stored upright, so the loader ignores EXIF orientations.

    Raises UserError for a file that is not whole, of another version, or without a field `image`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._bytes = os.fstat(file.fileno()).st_size
                self._open(np.memmap(file, np.uint8, "r") if self._bytes else np.zeros(0, np.uint8))
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error}.") from error
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[type["BetonSource"], tuple[Path]]:
        return BetonSource, (self.path,)  # another process opens the file itself

    def _open(self, file: NDArray[np.uint8]) -> None:
        """Read everything but the images, and check that it fits together."""
        if self.path.suffix != ".beton" and len(file) < HEADER.itemsize:
            raise UserError(f"{self.path} is not a .beton: it has {len(file)} bytes.")

        def part(begin: int, dtype: np.dtype, count: int, what: str) -> NDArray:
            size = dtype.itemsize * count
            if begin + size > len(file):
                raise UserError(
                    f"{self.path} is not a whole .beton: {what} should end at byte {begin + size:,}, and the file has "
                    f"{len(file):,}. It was cut off, perhaps by a copy that did not finish: copy or write it again."
                )
            return file[begin : begin + size].view(dtype).copy()

        self.header = part(0, HEADER, 1, "the header")[0]
        if self.header["version"] != VERSION:
            raise UserError(
                f"{self.path} is not a .beton, or has a version that cannot be read: a .beton begins with the number "
                f"{VERSION}, and this file with {self.header['version']}. To write one from images: nearfar data "
                "beton SRC NEW.beton."
            )
        fields = part(HEADER.itemsize, FIELD, int(self.header["fields"]), "the list of fields")
        names = [bytes(field["name"]).partition(b"\0")[0].decode("ascii", "replace") for field in fields]
        self.fields = dict(zip(names, (int(field["type"]) for field in fields), strict=True))
        if unknown := [name for name, kind in self.fields.items() if kind not in RECORD]:
            raise UserError(f"{self.path} has a field of a custom type, {unknown[0]}, which only its writer can read.")
        if len(self.fields) != len(names) or "" in self.fields:
            raise UserError(f"{self.path} is damaged: its fields are called {', '.join(names)}. Write it again.")
        self.require("image", IMAGE)
        count = int(self.header["samples"])
        if count == 0:
            raise UserError(f"{self.path} holds no images: it was written from an empty source.")
        record = np.dtype([(name, RECORD[kind]) for name, kind in self.fields.items()], align=True)
        self.records = part(HEADER.itemsize + fields.nbytes, record, count, "the list of images")
        begin = HEADER.itemsize + fields.nbytes
        self._records_digest = bytes.fromhex(digests.of_bytes([file[begin : begin + self.records.nbytes].tobytes()]))
        self.table = int(self.header["table"])
        part(self.table, ALLOCATION, 1, "the table of contents")
        table = file[self.table : len(file) - (len(file) - self.table) % ALLOCATION.itemsize].view(ALLOCATION)
        if ((table["ptr"] > self.table) | (table["size"] > self.table - table["ptr"])).any():
            raise UserError(f"{self.path} is damaged: its table of contents points beyond the data. Write it again.")
        self._locate(table)
        self.labels: NDArray[np.int64] | None = None
        if self.fields.get("label") == INT:
            self.labels = self.records["label"].astype(np.int64)
        self.about = self._about(fields, names, file)
        self.classes = self._class_names()

    def _locate(self, table: NDArray) -> None:
        """Where the bytes of each image begin and how many there are."""
        images = self.records["image"]
        order = np.argsort(table["ptr"], kind="stable")
        at = np.minimum(np.searchsorted(table["ptr"][order], images["ptr"]), len(table) - 1)
        if not (table["ptr"][order][at] == images["ptr"]).all():
            raise UserError(
                f"{self.path} is not a whole .beton: its table of contents lacks images. Copy or write it again."
            )
        self.size = np.stack([images["height"], images["width"]], 1).astype(np.int64)  # (n, 2)
        self._extent = np.stack([images["ptr"], table["size"][order][at]], 1).astype(np.int64)

    def _about(self, fields: NDArray, names: list[str], file: NDArray[np.uint8]) -> dict[str, Any]:
        if self.fields.get("name") != JSON:
            return {}
        arguments = bytes(fields["arguments"][names.index("name")])
        if not arguments.startswith(ABOUT):
            return {}
        begin, size = np.frombuffer(arguments, "<u8", 2, len(ABOUT)).tolist()
        try:
            about = json.loads(bytes(file[begin : begin + size]))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: what it says about itself cannot be read ({error}).") from error
        if not isinstance(about, dict):
            raise UserError(f"{self.path} is damaged: what it says about itself is a {type(about).__name__}.")
        return about

    def _class_names(self) -> list[str] | None:
        classes = self.about.get("classes")
        if classes is None:
            return None
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{self.path} is damaged: its classes have no names. Write it again.")
        return [printable(name) for name in classes]

    def require(self, name: str, kind: int) -> None:
        """Raises UserError unless there is a field of this name and type."""
        if self.fields.get(name) != kind:
            there = ", ".join(f"{key} ({TYPE_NAMES.get(value, 'custom')})" for key, value in self.fields.items())
            raise UserError(
                f"{self.path} has no field '{name}' of type {TYPE_NAMES[kind]}; its fields are: {there or 'none'}."
            )

    def __len__(self) -> int:
        return len(self.records)

    def raw(self, i: int) -> bool:
        """Whether image i is kept as pixels, (height, width, 3) bytes, and not as a JPEG."""
        return bool(self.records["image"]["mode"][i] == RAW)

    def stored(self, i: int) -> bytes:
        """The bytes of image i as they are in the file. Raises BadImage where they cannot be read."""
        begin, size = self._extent[i].tolist()
        return self._read(i, begin, size)

    def checked(self, i: int) -> bytes:
        """As `stored`. Raises BadImage also where the CRC-32, if there is one, shows that the bytes were changed."""
        data, crc = self.stored(i), self._entry(i).get("crc")
        if crc is not None and zlib.crc32(data) != crc:
            raise BadImage(self.name(i), f"its bytes in {self.path.name} are not those that were written (CRC-32)")
        return data

    def _read(self, i: int, begin: int, size: int) -> bytes:
        """Read, not mapped: an error of the disk under a mapped file is a signal that kills the process."""
        if begin + size > self._bytes:
            raise BadImage(f"{self.path.name}[{i}]", "it is listed beyond the end of the file")
        try:
            data = os.pread(self._descriptor, size, begin)
        except OSError as error:
            raise BadImage(f"{self.path.name}[{i}]", str(error)) from error
        if len(data) != size:
            raise BadImage(f"{self.path.name}[{i}]", "the file ends before it")
        return data

    def _entry(self, i: int) -> dict[str, Any]:
        """What the field `name` holds for image i."""
        if self.fields.get("name") != JSON:
            return {}
        ptr, size = self.records["name"][i].tolist()
        if size > _LONGEST_ENTRY:
            return {}
        try:
            entry = json.loads(self._read(i, ptr, size).rstrip(b"\0"))
        except (ValueError, RecursionError, BadImage):  # damaged: a name is not worth losing the image
            return {}
        return entry if isinstance(entry, dict) else {}

    def name(self, i: int) -> str:
        return printable(str(self._entry(i).get("name", f"{self.path.name}[{i}]")))

    def encoded(self, i: int) -> bytes | None:
        return None if self.raw(i) else self.checked(i)

    def read(self, i: int) -> Image.Image:
        data = self.checked(i)
        height, width = self.size[i].tolist()
        if not self.raw(i):
            image = decode(BytesIO(data), self.name(i))
            if image.size != (width, height):
                raise BadImage(
                    self.name(i),
                    f"its JPEG header says {image.width} x {image.height} pixels instead of {width} x {height}",
                )
            if "crc" not in self._entry(i) and libjpeg.available():  # the ffcv loader would refuse warnings too
                self._check_clean(i, data, height, width)
            return image
        if len(data) != height * width * 3:
            raise BadImage(self.name(i), f"{len(data)} bytes are not {width} x {height} pixels")
        return Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3))

    def _check_clean(self, i: int, data: bytes, height: int, width: int) -> None:
        try:
            libjpeg.Decoder().decode(data, np.empty(3 * height * width, np.uint8), height, width, 3 * width)
        except libjpeg.JPEGError as error:
            raise BadImage(self.name(i), str(error)) from error

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        if self.fields.get("mask") != BYTES:
            return None
        data = self._read(i, *self.records["mask"][i].tolist())
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return np.array(image, np.uint8)
        except MemoryError:
            raise
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            raise BadImage(self.name(i), f"its mask cannot be read: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """The writer's digest of all bytes; for files of other writers sizes, offsets and some of the bytes."""
        some = () if "digest" in self.about else sampled_images(len(self))
        known = [str(self.about.get("digest")).encode(), self._records_digest]
        return digests.of_bytes(chain(known, (self.stored(i) for i in some)))[:32]
