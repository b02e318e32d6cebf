"""Digests against the standard library, part by part."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nearfar.ssl.disk import digests


def test_bytes_and_files_have_the_digest_that_the_standard_library_gives(tmp_path: Path) -> None:
    content = bytes(range(256)) * 300
    (tmp_path / "file").write_bytes(content)
    known = hashlib.sha256(content).hexdigest()
    assert digests.of_bytes([content[:1000], memoryview(content)[1000:]]) == known
    assert digests.of_file(tmp_path / "file") == known


def test_a_fingerprint_knows_where_each_part_ends() -> None:
    assert digests.fingerprint(["ab", b"c"]) == digests.fingerprint([b"ab", "c"])
    assert digests.fingerprint(["ab", "c"]) != digests.fingerprint(["a", "bc"])
    written = b"".join(len(part).to_bytes(8, "little") + part for part in (b"ab", b"\xff"))
    assert digests.fingerprint(["ab", "\udcff"]) == hashlib.sha256(written).hexdigest()[:32]
