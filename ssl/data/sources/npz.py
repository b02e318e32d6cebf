"""Images in one .npz file: encoded ones one after another, or pixels."""

import math
import zipfile
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from nearfar.ssl.data.decode import decode
from nearfar.ssl.data.sources.base import ArraySource, Source, array_parts, class_numbers
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import printable


class NpzSource:
    """An .npz of encoded images: `jpeg` (uint8, concatenated), `offset` (n + 1 positions) and, if any, `label` (n,).

    Held in memory once, inflated; workers share it by fork. Class names come from classes.txt beside it.
    Arrays of pixels (`images`, `label`, `mask`) are an ArraySource: see open_npz.
    """

    def __init__(
        self,
        jpeg: NDArray[np.uint8],
        offset: ArrayLike,
        labels: ArrayLike | None,
        classes: list[str] | None,
        name: str,
    ) -> None:
        found = np.asarray(offset)
        if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or found.dtype.kind not in "iu" or found.ndim != 1:
            raise UserError(
                f"{name}: `jpeg` must be uint8 (bytes,) and `offset` whole numbers (n + 1,), but they are {jpeg.dtype} "
                f"{jpeg.shape} and {found.dtype} {found.shape}."
            )
        if len(found) < 2 or (found[1:] < found[:-1]).any() or found[0] < 0 or found[-1] > len(jpeg):
            raise UserError(
                f"{name}: `offset` must rise from 0 to {len(jpeg)}, the length of `jpeg`, one entry more than images."
            )
        self.jpeg, self.offset = jpeg, found.astype(np.int64)
        self.labels = class_numbers(labels, len(self.offset) - 1)
        self.classes = classes
        self.file = printable(name)

    def __len__(self) -> int:
        return len(self.offset) - 1

    def read(self, i: int) -> Image.Image:
        return decode(BytesIO(self.jpeg[self.offset[i] : self.offset[i + 1]].data), self.name(i))

    def encoded(self, i: int) -> bytes | None:
        return self.jpeg[self.offset[i] : self.offset[i + 1]].tobytes()

    def name(self, i: int) -> str:
        return f"{self.file}[{i}]"

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        return digests.fingerprint(array_parts(self.jpeg, self.offset, self.labels))


_ARRAYS = ("jpeg", "offset", "label", "images", "mask")
_SMALL = 2**30  # bytes that may always be allocated
_MAX_RATIO = 100  # bytes in memory for one in the file, above that; photographs have less than 2


def open_npz(path: Path) -> Source:
    """The images of an .npz: an NpzSource, or an ArraySource of pixels. Raises UserError for what is neither."""
    try:
        _check_memory(path)
        with np.load(path, allow_pickle=False) as file:
            keys = [str(key) for key in file.files]
            arrays = {key: file[key] for key in keys if key in _ARRAYS}
        beside = path.with_name("classes.txt")
        classes = beside.read_text("utf-8").splitlines() if beside.is_file() else None
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path.with_name('classes.txt')} holds class names that are not UTF-8: {error}.") from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into the memory: {error}. Write it as a .beton elsewhere.") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{path} cannot be read as an .npz file: {error}.") from error
    if classes is not None:
        classes = [printable(name) for name in classes]
    _check_named(path, keys)
    if "jpeg" in arrays and "offset" in arrays:
        if arrays["offset"].shape == (1,):
            raise UserError(f"{path} holds no images: its `offset` has a single entry.")
        return NpzSource(arrays["jpeg"], arrays["offset"], arrays.get("label"), classes, path.name)
    if "images" in arrays:
        if not arrays["images"].ndim or not len(arrays["images"]):
            raise UserError(f"{path} holds no images: its `images` has shape {arrays['images'].shape}.")
        return ArraySource(arrays["images"], arrays.get("label"), arrays.get("mask"), classes)
    raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}; `jpeg` and `offset`, or `images`, are needed.")


def _check_named(path: Path, keys: list[str]) -> None:
    """Raises UserError for an array whose name is nearly one that is read."""
    for name in _ARRAYS:
        if name not in keys and (near := [key for key in keys if key.lower().rstrip("s") == name.rstrip("s")]):
            raise UserError(f"{path} holds `{printable(near[0])}`, which nothing reads: name it `{name}`.")


def _check_memory(path: Path) -> None:
    """Raises UserError where the arrays, by their headers, would be too large for a file of this size."""
    total = 0
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in _ARRAYS:
                continue
            with file.open(member) as stream:
                read_header = npy.read_array_header_1_0
                if npy.read_magic(stream) != (1, 0):
                    read_header = npy.read_array_header_2_0
                shape, _, dtype = read_header(stream)
                size = math.prod(shape) * dtype.itemsize
                if size > member.file_size:
                    raise UserError(f"{path} is damaged: `{name}` should have {size:,} bytes, more than it holds.")
                total += size
    if total > max(_SMALL, _MAX_RATIO * path.stat().st_size):
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes and would take {total:,} in memory, more than "
            f"{_MAX_RATIO} for each: this is not a file of images. If it is, save it without compression (np.savez)."
        )
