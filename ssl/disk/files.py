"""Atomic writes: under a temporary name in the same folder, synced to disk, then renamed.

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

PARTIAL = ".writing-"  # prefix of the names of files and folders that are not complete yet


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; at the end it is synced to disk and renamed to `path`.

    An error inside leaves `path` as it was, and nothing beside it.

    Raises:
        OSError: the folder is not there, cannot be written, or is full.
    """
    partial = _beside(path)
    with suppress(FileNotFoundError):
        path.lstat()  # a name that no file system accepts fails now, and not after the writing
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # as the umask, or the folder's access list, sets it
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
    """An empty folder beside `path` to fill; at the end all in it is synced to disk, and it is renamed to `path`.

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
    """Rename a folder to `path`; one that is there already is removed only after the new one has its name."""
    if path.exists():
        old = _beside(path)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # folders cannot be synced here
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync a folder and all in it."""
    for inner, _, names in os.walk(folder):
        for name in names:
            sync(Path(inner, name))
        sync(Path(inner))


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; only its sole owner may call this."""
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
