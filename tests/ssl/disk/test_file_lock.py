"""Held, free, or no locks at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from nearfar.ssl.disk import file_lock
from nearfar.ssl.errors import UserError
from nearfar.ssl.run.run_folder import RunFolder


def test_holder(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert file_lock.holder(file) is None
    with file.open("w") as held:
        held.write("process 12 on node3\n")
        held.flush()
        assert file_lock.acquire(held)
        assert file_lock.holder(file) == "process 12 on node3"
        with file.open("a") as other, pytest.raises(BlockingIOError):
            file_lock.acquire(other)
    assert file_lock.holder(file) is None


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path):
        assert file_lock.holder(tmp_path / "lock") is None
    assert "has no locks (flock)" in caplog.text


def test_a_lock_that_fails_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be locked: .*Input/output error"), RunFolder(tmp_path):
        pass
