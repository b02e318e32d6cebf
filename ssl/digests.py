"""SHA-256 digests of files, parts of a data set and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def of_bytes(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the parts, one after the other: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of the bytes in a file: 64 hexadecimal digits. Raises OSError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """SHA-256 of the parts and where each ends: the first 32 hexadecimal digits."""
    encoded = (part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts)
    return of_bytes(len(part).to_bytes(8, "little") + part for part in encoded)[:32]
