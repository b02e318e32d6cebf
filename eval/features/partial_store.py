"""A feature store that is being written: a hidden folder beside the final one, from which a killed process is resumed.

making.json says what is being made, progress.jsonl what is done: a line is added once the rows it describes are on
disk. A line that was cut off, and all rows after the last whole line, are made again.
"""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.eval.features.extraction import ReadRows
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import files
from nearfar.ssl.errors import BadImage, UserError

_LONGEST = 256 * 2**20  # bytes of progress.jsonl: a number for each image, and every unreadable one by name
_SUFFIX = 8  # letters behind the prefix: another store may have a name that begins with this one's
_MAKING, _PROGRESS, _FEATURES = "making.json", "progress.jsonl", "features.npy"


class PartialFeatures:
    """The features of the first `images` images of a source: `done` rows of `x`, and what else was read in `rows`."""

    def __init__(self, folder: Path, source: Source, masks: bool) -> None:
        """Continue from what the folder holds; start anew where it holds nothing, or nothing that fits."""
        self.folder, self.source = folder, source
        self._begin()
        try:
            self._read(masks)
        except (OSError, ValueError, TypeError, KeyError, EOFError, RecursionError, BadImage):
            self._begin()
            (folder / _PROGRESS).unlink(missing_ok=True)

    def _begin(self) -> None:
        self.rows = ReadRows()
        self.x: np.ndarray | None = None
        self.images = self.done = 0
        self._kept = (0, 0, 0)  # how much of index, bad and rescaled is in progress.jsonl

    def _read(self, masks: bool) -> None:
        file = self.folder / _PROGRESS
        if file.stat().st_size > _LONGEST:
            raise ValueError("far too long")
        lines, end, _ = file.read_bytes().rpartition(b"\n")
        os.truncate(file, len(lines + end))  # what follows was cut off
        for line in lines.splitlines():
            entry = json.loads(line)
            self.images = int(entry["images"])
            self.rows.index += map(int, entry["index"])
            self.rows.bad |= {str(name): str(why) for name, why in entry["bad"]}
            self.rows.rescaled += map(str, entry["rescaled"])
        self.done = len(self.rows.index)
        if not 0 < self.images <= len(self.source) or not self.rows.index == sorted(set(self.rows.index)):
            raise ValueError("not the progress of these images")
        if self.done:
            x = np.load(self.folder / _FEATURES, mmap_mode="r+", allow_pickle=False)
            if x.dtype != np.float32 or x.ndim not in (2, 4) or len(x) != len(self.source):
                raise ValueError("not the features of these images")
            self.x = x
        self.rows.masks = [self.source.mask(i) if masks else None for i in self.rows.index]
        self._count()

    def add(self, part: np.ndarray) -> None:
        """Features of the next images; `rows` says which."""
        if self.x is None:
            shape = (len(self.source), *part.shape[1:])
            self.x = np.lib.format.open_memmap(self.folder / _FEATURES, "w+", np.float32, shape)
        self.x[self.done : self.done + len(part)] = part
        self.done += len(part)

    def keep(self, images: int) -> None:
        """Make the first `images` images durable: from here on they outlive this process."""
        self.images = images
        if isinstance(self.x, np.memmap):
            self.x.flush()
        rows, (index, bad, rescaled) = self.rows, self._kept
        entry = {
            "images": images,
            "index": rows.index[index:],
            "bad": list(rows.bad.items())[bad:],
            "rescaled": rows.rescaled[rescaled:],
        }
        with (self.folder / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._count()

    def _count(self) -> None:
        self._kept = len(self.rows.index), len(self.rows.bad), len(self.rows.rescaled)

    def whole(self) -> np.ndarray | None:
        """All rows, cut to their number: unreadable images leave unused ones. None where there are no rows."""
        if self.x is not None and self.done < len(self.x):
            shape = (self.done, *self.x.shape[1:])
            short = np.lib.format.open_memmap(self.folder / "short.npy", "w+", np.float32, shape)
            for start in range(0, self.done, 4096):
                short[start : start + 4096] = self.x[start : min(start + 4096, self.done)]
            (self.folder / "short.npy").replace(self.folder / _FEATURES)
            self.x = short
        if isinstance(self.x, np.memmap):
            self.x.flush()
        for name in (_MAKING, _PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        return self.x


@contextlib.contextmanager
def partial_folder(final: Path, making: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `final` to fill and rename: one that a killed process left of the same work, else an empty one.

    Its writer holds a lock on it, so that the next one can tell a folder that was left from one that is being written;
    what was left of other work is removed. So is this one after a mistake of the user's or an error of the disk;
    after any other end it stays, if there is something to resume from.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = files.partial_prefix(final)
    partial, handle = _left(final.parent, prefix, making)
    if partial is None:
        partial = final.parent / f"{prefix}{secrets.token_hex(_SUFFIX // 2)}"
        partial.mkdir()  # with the rights that the umask leaves: colleagues read features
        handle = _lock(partial)
    try:
        (partial / _MAKING).write_text(json.dumps(making), encoding="utf-8")
        yield partial
    except BaseException as error:
        if isinstance(error, UserError | OSError) or not (partial / _PROGRESS).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _left(parent: Path, prefix: str, making: dict[str, Any]) -> tuple[Path | None, int | None]:
    """The folder that a killed process left of the same work, and the handle of its lock; others are removed."""
    found: tuple[Path | None, int | None] = (None, None)
    for left in sorted(parent.glob(f"{glob.escape(prefix)}{'?' * _SUFFIX}")):
        handle = _lock(left)
        if handle is None:
            continue
        if found[0] is None and (left / _PROGRESS).is_file() and _made_there(left) == making:
            found = left, handle
        else:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    return found


def _made_there(folder: Path) -> Any:
    try:
        file = folder / _MAKING
        return json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= _LONGEST else None
    except (OSError, ValueError, RecursionError):
        return None


def _lock(folder: Path) -> int | None:
    """A handle that holds the lock of a folder until it is closed; None where another process holds it, or where the
    file system has no locks."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
