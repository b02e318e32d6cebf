"""A path -> the source of the images there."""

import os
from pathlib import Path

from nearfar.ssl.data.missing import SUFFIXES, require_path
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.data.sources.dense import dense_source
from nearfar.ssl.data.sources.files import FolderSource, ListSource
from nearfar.ssl.data.sources.hugging_face import is_hugging_face, open_hugging_face
from nearfar.ssl.data.sources.npz import open_npz
from nearfar.ssl.data.sources.tar import TarSource
from nearfar.ssl.errors import UserError


def open_source(path: str | Path) -> Source:
    """The images at a path: a folder of images or of .tar shards, a .txt list, an .npz, .beton or .tar file, or a split
    of a data set with masks (`nearfar.ssl.data.sources.dense`).

    Raises UserError, telling what was found instead.
    """
    path = Path(os.path.expanduser(path))
    if (masked := dense_source(path)) is not None:
        return masked
    if os.path.isdir(path):
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
    require_path(path)
    return _open_file(path)


def _open_file(path: Path) -> Source:
    if path.suffix == ".txt":
        return ListSource(path)
    if path.suffix == ".npz":
        return open_npz(path)
    if path.suffix == ".beton":
        return BetonSource(path)
    if path.suffix == ".tar":
        return TarSource([path])
    raise UserError(
        f"{path} is a file that cannot hold a data set: a folder of images, a .txt list, an .npz, a .beton or a .tar "
        "is needed."
    )
