"""What a source of images is, and the sources that need no file: arrays in memory, and parts of other sources.

A source knows how many images there are and reads one of them as an upright 8-bit RGB Pillow image; everything that
makes a file unreadable is raised as `BadImage`.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from nearfar.ssl.disk import digests
from nearfar.ssl.errors import UserError


class Source(Protocol):
    """A fixed list of images."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(n,) class numbers, or None where there are none."""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in the order of their numbers."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data does (names, sizes, labels; a sample of the bytes): cheap, not cryptographic proof."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Image.Image:
        """Image i, upright, mode RGB. Raises BadImage."""

    def encoded(self, i: int) -> bytes | None:
        """The encoded file of image i as it is stored; None where pixels are stored. Raises BadImage."""

    def name(self, i: int) -> str:
        """The name of image i in messages, made `printable`."""

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        """The class of each pixel of image i, (H, W), 255 = ignore; None where there are no masks."""


def passed_over(source: Source) -> list[str]:
    """Names of the files that were skipped because of their type; empty for sources of other kinds."""
    return list(getattr(source, "passed_over", []))


def array_parts(*arrays: NDArray | None) -> Iterator[bytes]:
    """Shapes and up to about a thousand evenly spaced rows of each array."""
    for array in arrays:
        if array is None:
            yield b"none"
        else:
            yield f"{array.dtype.str}{array.shape}".encode()
            yield np.ascontiguousarray(array[:: max(1, len(array) // 1000)]).tobytes()


def sampled_images(n: int) -> range:
    """About a hundred of n images, evenly spaced: those whose bytes a fingerprint holds."""
    return range(0, n, max(1, n // 100))


def first_bytes(path: str, offset: int = 0, size: int = 2**16) -> bytes:
    """Of a file's `size` bytes from `offset` on at most the first 64 KiB; none where they cannot be read."""
    if not os.path.isfile(path):  # a pipe, say, on which open() would hang
        return b""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(min(size, 2**16))
    except OSError:
        return b""


def class_numbers(labels: ArrayLike | None, n: int) -> NDArray[np.int64] | None:
    """Labels of n images as int64 (n,). Raises UserError for what is not one whole number an image."""
    if labels is None:
        return None
    found = np.asarray(labels)
    try:
        with np.errstate(invalid="ignore"):  # NaN
            numbers = found.astype(np.int64)
        whole = found.dtype.kind in "biuf" and bool((numbers == found).all())
    except (ValueError, TypeError, OverflowError):  # text; None among numbers; beyond 64 bits
        whole = False
    if not whole:
        some = ", ".join(repr(label)[:40] for label in np.ravel(found)[:3].tolist())
        raise UserError(
            f"Labels must be class numbers (whole, of at most 63 bits), but these begin with {some}. Turn names "
            "into numbers with classes, numbers = np.unique(labels, return_inverse=True)."
        )
    if numbers.shape != (n,):
        raise UserError(f"There are {n} images, but labels of shape {numbers.shape}.")
    return numbers


class ArraySource:
    """Images in memory: uint8 (N, H, W, 3) or gray (N, H, W), with labels (N,) and masks uint8 (N, H, W) if any."""

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.images = np.asarray(images)
        if self.images.dtype != np.uint8 or self.images.ndim not in (3, 4) or self.images.shape[3:] not in ((), (3,)):
            raise UserError(
                "Images in an array must be uint8 (N, H, W, 3) or gray (N, H, W), "
                f"but these are {self.images.dtype} {self.images.shape}."
            )
        self.masks = None if masks is None else np.asarray(masks)
        if self.masks is not None:
            if self.masks.shape != self.images.shape[:3]:
                raise UserError(f"Masks {self.masks.shape} do not fit images {self.images.shape}.")
            if self.masks.dtype.kind not in "biu" or self.masks.min() < 0 or self.masks.max() > 255:
                raise UserError("Masks must be class numbers from 0 to 255 (255 = ignore), as integers.")
            self.masks = self.masks.astype(np.uint8, copy=False)
        self.labels = class_numbers(labels, len(self.images))
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i]).convert("RGB")

    def encoded(self, i: int) -> bytes | None:
        return None

    def name(self, i: int) -> str:
        return f"image {i}"

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None if self.masks is None else self.masks[i]

    @cached_property
    def fingerprint(self) -> str:
        return digests.fingerprint(array_parts(self.images, self.labels, self.masks))


class Subset:
    """Some images of a source, in the order of `index` (m,)."""

    def __init__(self, source: Source, index: ArrayLike) -> None:
        self.source, self.index = source, np.asarray(index, np.int64)
        self.labels = None if source.labels is None else source.labels[self.index]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Image.Image:
        return self.source.read(int(self.index[i]))

    def encoded(self, i: int) -> bytes | None:
        return self.source.encoded(int(self.index[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.index[i]))

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return self.source.mask(int(self.index[i]))

    @cached_property
    def fingerprint(self) -> str:
        return digests.fingerprint([self.source.fingerprint, self.index.tobytes()])


def spread(source: Source, most: int) -> Source:
    """At most so many images, evenly spread over a source."""
    n = len(source)
    return source if n <= most else Subset(source, np.linspace(0, n - 1, most).astype(np.int64))
