"""The last resort: a paragraph with the path for what the machine or a file did, and a traceback for our own bugs."""

from __future__ import annotations

import errno
import json
import os

import pytest

from nearfar.launch.failures import explain, paragraph, report_of


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "No space left on the disk at /some/file. Checkpoints saved before are intact"),
        (errno.EROFS, "/some/file: Read-only file system. This file system can only be read"),
        (errno.EACCES, "/some/file: Permission denied. You lack the right"),
        (errno.ENAMETOOLONG, "/some/file: File name too long. File systems take names of at most 255 bytes"),
        (errno.EMFILE, "/some/file: Too many open files. Allow more open files (ulimit -n)"),
        (errno.EIO, "/some/file: Input/output error."),
    ],
)
def test_an_error_of_the_system_is_told_with_its_path_and_what_to_do(number: int, expected: str) -> None:
    message = explain(OSError(number, os.strerror(number), "/some/file"))
    assert message is not None and message.startswith(expected) and "\n" not in message


def test_a_path_of_any_length_or_kind_is_shown_short() -> None:
    message = explain(OSError(errno.ENAMETOOLONG, "File name too long", b"n" * 5_000 + b"\xff"))
    assert message is not None and len(message) < 400
    assert explain(OSError("the pipe is gone")) == "The pipe is gone."


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_memory_that_ran_out_says_what_to_lower(error: Exception) -> None:
    message = explain(error)
    assert message is not None and message.startswith("Out of memory (") and "train.batch_size" in message


def test_a_nested_file_is_the_files_fault_and_our_own_recursion_is_a_bug() -> None:
    def forever() -> None:
        forever()

    with pytest.raises(RecursionError) as nested:
        json.loads("[" * 100_000)
    with pytest.raises(RecursionError) as ours:
        forever()
    assert "nested far more deeply" in (explain(nested.value) or "")
    assert explain(ours.value) is None
    assert explain(KeyError("x")) is None and explain(RuntimeError("x")) is None


def test_a_bug_is_told_with_its_traceback() -> None:
    try:
        raise KeyError("weights")
    except KeyError as error:
        report = report_of(error)
    assert "Traceback" in report and "test_failures.py" in report and "KeyError: 'weights'" in report
    assert "This is a bug in nearfar, not a mistake of yours" in report


def test_a_paragraph_shows_control_characters_and_wraps_between_words() -> None:
    assert paragraph("a\x1b[31mred\x07\nb ü", None) == "a\\x1b[31mred\\x07\\nb ü"
    lines = paragraph("word " * 40 + "x" * 100, 80).splitlines()
    assert all(len(line) <= 80 for line in lines[:-1]) and lines[-1] == "x" * 100
