"""Where images come from: class folders, a flat folder, a list of paths, an .npz file, arrays in memory.

A source knows how many images there are and reads one of them as an upright 8-bit RGB Pillow image; everything that
makes a file unreadable is told as `decode.BadImage`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from nearfar.ssl.data.decode import SUFFIXES, decode, decode_path, read_path
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.sources.tar import TarSource, is_hugging_face, open_hugging_face
from nearfar.ssl.errors import BadImage, UserError

_NO_CLASSES = {"train", "training", "val", "valid", "validation", "test", "images", "masks"}


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
        """The file of image i as it is stored, None where pixels are. Raises BadImage."""

    def name(self, i: int) -> str:
        """What to call image i in a message."""

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        """The class of each pixel of image i, (H, W), 255 = ignore; None where there are no masks."""


def _digest(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _array_parts(*arrays: NDArray | None) -> Iterator[bytes]:
    """Shapes and up to about a thousand evenly spaced rows of each array."""
    for array in arrays:
        if array is None:
            yield b"none"
        else:
            yield f"{array.dtype.str}{array.shape}".encode()
            yield np.ascontiguousarray(array[:: max(1, len(array) // 1000)]).tobytes()


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
        self.masks = None if masks is None else np.asarray(masks, np.uint8)
        if self.masks is not None and self.masks.shape != self.images.shape[:3]:
            raise UserError(f"Masks {self.masks.shape} do not fit images {self.images.shape}.")
        self.labels = _labels(labels, len(self.images))
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
        return _digest(_array_parts(self.images, self.labels, self.masks))


def _labels(labels: ArrayLike | None, n: int) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    numbers = np.asarray(labels).astype(np.int64)
    if numbers.shape != (n,):
        raise UserError(f"There are {n} images, but labels of shape {numbers.shape}.")
    return numbers


class PathSource:
    """Image files on disk; the base of FolderSource and ListSource. `names` are relative to `root`, or absolute."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        masks: Sequence[str] | None = None,
    ) -> None:
        self.root = str(root)
        self.names = list(names)
        self.labels = _labels(labels, len(self.names))
        self.classes = None if classes is None else list(classes)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        """Where image i lies."""
        return os.path.join(self.root, self.names[i])

    def read(self, i: int) -> Image.Image:
        return decode_path(self.path(i), self.names[i])

    def encoded(self, i: int) -> bytes | None:
        return read_path(self.path(i), self.names[i])

    def name(self, i: int) -> str:
        return self.names[i]

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        if self.masks is None:
            return None
        try:
            with Image.open(self.masks[i]) as image:
                if image.mode not in ("L", "P"):
                    raise UserError(f"The mask {self.masks[i]} has mode {image.mode}; 8-bit class numbers are needed.")
                return np.array(image, np.uint8)
        except (OSError, SyntaxError) as error:
            raise BadImage(self.names[i], f"its mask {self.masks[i]} cannot be read: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """All names and labels, and the sizes of at most a thousand files (all would take minutes on a cluster)."""
        some = range(0, len(self), max(1, len(self) // 1000))
        sizes = [os.path.getsize(self.path(i)) if os.path.isfile(self.path(i)) else -1 for i in some]
        return _digest(["\n".join(self.names), str(sizes), *_array_parts(self.labels)])


class FolderSource(PathSource):
    """A folder: either of class folders (a class = a sub-folder, searched in depth) or of images (no labels).

    Where the path has a part `images` and the same path with `masks` in its place exists, masks are the .png files of
    the same stem there. Raises UserError where there are no images, or both images and class folders.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        found = sorted(_images_below(root))
        folders = sorted({name.split(os.sep, 1)[0] for name in found if os.sep in name})
        loose = [name for name in found if os.sep not in name]
        if not found:
            raise UserError(f"There are no images in {root}: {_contents(root)}")
        if loose and folders:
            raise UserError(
                f"{root} holds both images ({loose[0]}, {len(loose)} in all) and folders of images ({folders[0]}, "
                f"{len(folders)} in all), so what is a class is not clear. "
                "Move the loose images away, or name one folder."
            )
        if _NO_CLASSES.issuperset(name.lower() for name in folders) and folders:
            raise UserError(
                f"{root} holds parts of a data set ({', '.join(folders)}), not classes. Name one of them, such as "
                f"{root / ('images' if 'images' in folders else folders[0])}."
            )
        if folders:
            number = {name: k for k, name in enumerate(folders)}
            super().__init__(root, found, [number[name.split(os.sep, 1)[0]] for name in found], folders)
        else:
            super().__init__(root, found)
        self.masks = _sibling_masks(root, found)


def _images_below(root: Path) -> Iterator[str]:
    """Relative paths of the image files, by suffix; hidden files and folders are passed over, links followed."""
    seen = set()

    def unreadable(error: OSError) -> None:  # or its images, and maybe a class, would be missing without a word
        raise UserError(f"The folder {error.filename} cannot be read: {error.strerror}.")

    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def _contents(root: Path) -> str:
    """What lies in a folder, for a message about what does not."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    if not names:
        return "the folder is empty."
    return (
        f"it holds {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}. Images are files "
        f"that end in {', '.join(SUFFIXES)}."
    )


def _sibling_masks(root: Path, names: Sequence[str]) -> list[str] | None:
    parts = list(root.absolute().parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "masks"
    folder = Path(*parts)
    if not folder.is_dir():
        return None
    masks = [str((folder / name).with_suffix(".png")) for name in names]
    there = {str(path) for path in folder.rglob("*.png")}
    missing = [mask for mask in masks if mask not in there]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(masks)} images in {root} have no mask; the first that is missing is {missing[0]}."
        )
    return masks


class ListSource(PathSource):
    """A text file with one path a line, relative to the file's folder or absolute, and after a tab a label if any:
    class numbers, or class names (then numbered in sorted order). Raises UserError for an empty or half-labeled list.
    """

    def __init__(self, file: str | Path) -> None:
        file = Path(file)
        try:
            lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{file} cannot be read as a list of image paths: {error}.") from error
        if not lines:
            raise UserError(f"{file} is empty: one image path a line is needed.")
        names = [line.partition("\t")[0].strip() for line in lines]
        labels = [line.partition("\t")[2].strip() for line in lines]
        if not any(os.path.isfile(file.parent / name) for name in names[:20]):
            raise UserError(f"{file} lists {names[0]}, which does not exist (relative paths start at {file.parent}).")
        if not any(labels):
            super().__init__(file.parent, names)
        elif not all(labels):
            where = labels.index("")
            raise UserError(
                f"{file} has labels, but none for {names[where]}: give every line one after a tab, or no line."
            )
        elif all(label.isdecimal() for label in labels):
            super().__init__(file.parent, names, [int(label) for label in labels])
        else:
            classes, numbers = np.unique(labels, return_inverse=True)
            super().__init__(file.parent, names, numbers, classes.tolist())


class NpzSource:
    """An .npz of encoded images: `jpeg` (bytes on end, uint8), `offset` (n + 1 positions) and, if any, `label` (n,).

    Held in memory once, inflated; workers share it by fork. Class names come from classes.txt beside it.
    Arrays of pixels (`images`, `label`, `mask`) are an ArraySource: see open_source.
    """

    def __init__(
        self,
        jpeg: NDArray[np.uint8],
        offset: ArrayLike,
        labels: ArrayLike | None,
        classes: list[str] | None,
        name: str,
    ) -> None:
        self.jpeg, self.offset = jpeg, np.asarray(offset).astype(np.int64)
        if (
            len(self.offset) < 2
            or (np.diff(self.offset) < 0).any()
            or self.offset[0] < 0
            or self.offset[-1] > len(jpeg)
        ):
            raise UserError(
                f"{name}: `offset` must rise from 0 to {len(jpeg)}, the length of `jpeg`, one entry more than images."
            )
        self.labels = _labels(labels, len(self.offset) - 1)
        self.classes = classes
        self.file = name

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
        return _digest(_array_parts(self.jpeg, self.offset, self.labels))


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
        return _digest([self.source.fingerprint, self.index.tobytes()])


def open_source(path: str | Path) -> Source:
    """The images at a path: a folder of images or of .tar shards, a .txt list, an .npz, .beton or .tar file.

    Raises UserError, telling what was found instead.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if is_hugging_face(path):
            return open_hugging_face(path)
        try:
            inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise UserError(f"The folder {path} cannot be read: {error.strerror}.") from None
        if any(entry.suffix == ".tar" for entry in inside) and not any(
            entry.is_dir() or entry.suffix.lower() in SUFFIXES for entry in inside
        ):
            return TarSource(entry for entry in inside if entry.suffix == ".tar")
        return FolderSource(path)
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise UserError(f"There is nothing at {path}. The nearest folder that exists is {parent}: {_contents(parent)}")
    if path.suffix == ".txt":
        return ListSource(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix == ".beton":
        return BetonSource(path)
    if path.suffix == ".tar":
        return TarSource([path])
    raise UserError(
        f"{path} is a file that cannot hold a data set: a folder of images, a .txt list, an .npz, a .beton or a .tar "
        "is needed."
    )


def _open_npz(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in ("jpeg", "offset", "label", "images", "mask")}
            keys = file.files
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{path} cannot be read as an .npz file: {error}.") from error
    beside = path.with_name("classes.txt")
    classes = beside.read_text("utf-8").splitlines() if beside.is_file() else None
    if "jpeg" in arrays and "offset" in arrays:
        return NpzSource(arrays["jpeg"], arrays["offset"], arrays.get("label"), classes, path.name)
    if "images" in arrays:
        return ArraySource(arrays["images"], arrays.get("label"), arrays.get("mask"), classes)
    raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}; `jpeg` and `offset`, or `images`, are needed.")
