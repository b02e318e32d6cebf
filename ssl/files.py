"""Files that are whole or not there: written beside their place, brought to the disk, renamed.

Every file and folder follows the umask, whatever mode the library that writes it prefers (temporary files are 0600).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".writing-"  # in front of the names of files and folders that are not whole yet


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; at the end it is on the disk, and in the place of `path`.

    An error inside leaves `path` as it was, and nothing beside it.

    Raises:
        OSError: the folder is not there, cannot be written, or is full.
    """
    partial = _beside(path)
    with suppress(FileNotFoundError):
        path.lstat()  # a name that no file system takes is refused now, and not after the writing
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # as umask, or the folder's access list, will have it
        yield partial
        partial.chmod(mode)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill; at the end all in it is on the disk, and it takes the place of `path`.

    An error inside leaves `path` as it was, and nothing beside it.

    Raises:
        OSError: the parent is not there, cannot be written, or is full.
    """
    partial = _beside(path)
    with suppress(FileNotFoundError):
        path.lstat()
    try:
        partial.mkdir()
        yield partial
        sync_tree(partial)
        move(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The whole text in UTF-8, or what was there before. Raises OSError as `atomic`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """All the bytes, or what was there before. Raises OSError as `atomic`."""
    with atomic(path) as partial:
        partial.write_bytes(content)


def check_writable(path: Path) -> None:
    """Raise the OSError with which `atomic` would fail at once. Nothing is left, and `path` stays as it is."""
    partial = _beside(path)
    partial.touch(exist_ok=False)
    partial.unlink()


def move(partial: Path, path: Path) -> None:
    """Rename a folder into its place; one that is there already is taken away only once the new one stands."""
    if path.exists():
        old = _beside(path)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # a file system that cannot
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all in it to the disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            sync(Path(inner, name))
        sync(Path(inner))


def remove_partial(folder: Path) -> None:
    """Sweep up what killed processes left half-written in `folder`; only for who owns it alone."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def partial_prefix(path: Path) -> str:
    """How the names begin under which `path` is written. Not with its whole name: a file system takes 255 bytes."""
    return f"{PARTIAL}{path.name[:50]}-"


def _beside(path: Path) -> Path:
    return path.with_name(f"{partial_prefix(path)}{secrets.token_hex(4)}")
