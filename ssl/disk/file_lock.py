"""Advisory locks on files (flock): acquired, held by another process, or not supported by the file system."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

# Errors of file systems without flock: Lustre mounted without it, some FUSE and NFS servers.
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def acquire(file: IO[str] | int, wait: bool = False) -> bool:
    """Take the lock of an open file or folder (its descriptor); False where its file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file system failed in another way.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:  # what some NFS servers say for "held"
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def holder(path: Path) -> str | None:
    """Who holds the lock of a file, as its content says ("process 12 on node3"); None while nobody does."""
    try:
        with path.open("r+") as file:
            try:
                acquire(file)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None
