"""SHA-256 digests of files, parts of a data set and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors on any device: 64 hexadecimal digits."""
    import torch

    def parts() -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return of_bytes(parts())


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """SHA-256 of the parts and where each ends: the first 32 hexadecimal digits."""
    encoded = (part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts)
    return of_bytes(len(part).to_bytes(8, "little") + part for part in encoded)[:32]
