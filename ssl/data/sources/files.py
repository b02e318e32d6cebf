"""Image files on disk: class folders, a flat folder, a list of paths."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from nearfar.ssl.data.decode import FORMATS, decode_path, read_path
from nearfar.ssl.data.missing import SUFFIXES, found_in
from nearfar.ssl.data.sources.base import array_parts, class_numbers, first_bytes, sampled_images
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import printable

_NO_CLASSES = {"train", "training", "val", "valid", "validation", "test", "images", "masks"}


class PathSource:
    """Image files on disk; the base of FolderSource and ListSource. `names` are relative to `root`, or absolute."""

    passed_over: Sequence[str] = ()  # files that are not images, by their names

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
        self.labels = class_numbers(labels, len(self.names))
        self.classes = None if classes is None else list(classes)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        """The path of image i."""
        return os.path.join(self.root, self.names[i])

    def read(self, i: int) -> Image.Image:
        return decode_path(self.path(i), self.name(i))

    def encoded(self, i: int) -> bytes | None:
        return read_path(self.path(i), self.name(i))

    def name(self, i: int) -> str:
        return printable(self.names[i])

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        if self.masks is None:
            return None
        try:
            with Image.open(self.masks[i], formats=FORMATS) as image:
                if image.mode not in ("L", "P"):
                    raise UserError(f"The mask {self.masks[i]} has mode {image.mode}; 8-bit class numbers are needed.")
                return np.array(image, np.uint8)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            raise BadImage(self.names[i], f"its mask {self.masks[i]} cannot be read: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """All names and labels, the sizes of about a thousand files, and how about a hundred of them begin: names and
        sizes alone may be those of other images, such as the frames of another film. (All would take minutes on a
        cluster.)"""
        some = range(0, len(self), max(1, len(self) // 1000))
        sizes = [os.path.getsize(self.path(i)) if os.path.isfile(self.path(i)) else -1 for i in some]
        begins = (first_bytes(self.path(i)) for i in sampled_images(len(self)))
        return digests.fingerprint(["\n".join(self.names), str(sizes), *array_parts(self.labels), *begins])


class FolderSource(PathSource):
    """A folder: either of class folders (a class = a sub-folder, searched recursively) or of images (no labels).

    Where the path has a part `images` and the same path with `masks` in its place exists, masks are the .png files of
    the same stem there. Raises UserError where there are no images, or both images and class folders.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        found, others = _files_below(root)
        folders = sorted({name.split(os.sep, 1)[0] for name in found if os.sep in name})
        loose = [name for name in found if os.sep not in name]
        if not found:
            raise UserError(f"There are no images in {root}: {found_in(root)}")
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
            classes = [printable(name) for name in folders]
            super().__init__(root, found, [number[name.split(os.sep, 1)[0]] for name in found], classes)
        else:
            super().__init__(root, found)
        self.passed_over = others
        self.masks = _sibling_masks(root, found)


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths, sorted, of the image files, by suffix, and of all others; hidden ones do not count.

    Links are followed. Raises UserError for a folder that cannot be read, or folders too deep for it.
    """
    images: list[str] = []
    others: list[str] = []
    try:
        for name in _walk(root):
            (images if name.lower().endswith(SUFFIXES) else others).append(name)
    except RecursionError:
        raise UserError(f"The folders in {root} are nested too deeply to be classes of images.") from None
    return sorted(images), sorted(others)


def _walk(root: Path) -> Iterator[str]:
    seen = set()

    def unreadable(error: OSError) -> None:  # or its images, and maybe a class, would be missing silently
        raise UserError(f"The folder {error.filename} cannot be read: {error.strerror}.")

    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would loop forever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def kinds_of(names: Sequence[str]) -> str:
    """How many files of each type, each with an example: `3 .avif (a.avif), 1 without an ending (README)`."""
    examples: dict[str, list[str]] = {}
    for name in names:
        examples.setdefault(os.path.splitext(name)[1].lower() or "without an ending", []).append(name)
    most_first = sorted(examples.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(f"{len(those):,} {printable(kind)} ({printable(those[0])})" for kind, those in most_first)


def _sibling_masks(root: Path, names: Sequence[str]) -> list[str] | None:
    parts = list(root.absolute().parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "masks"
    folder = Path(*parts)
    if not folder.is_dir():
        return None
    masks = [str((folder / name).with_suffix(".png")) for name in names]
    found = {str(path) for path in folder.rglob("*.png")}
    missing = [mask for mask in masks if mask not in found]
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
