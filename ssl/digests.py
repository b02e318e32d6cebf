"""SHA-256 of what decides something: files, parts of a data set, weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def of_bytes(parts: Iterable[bytes | memoryview]) -> str:
    """Of the parts, one after the other: 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def of_file(path: Path) -> str:
    """Of the bytes in a file: 64 hexadecimal digits. Raises OSError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """Of the parts and where each ends: 32 hexadecimal digits."""
    encoded = (part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts)
    return of_bytes(len(part).to_bytes(8, "little") + part for part in encoded)[:32]
