"""The last resort of the command line: what an error that nobody turned into a `UserError` means, in one paragraph."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import textwrap
import traceback
from types import TracebackType

READERS = ("json", "yaml", "pydantic")  # packages that parse files, and fail on one that is nested too deeply


def explain(error: BaseException) -> str | None:
    """The paragraph for an error that comes from the machine or from a file; None for a bug in nearfar."""
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return (
            f"Out of memory ({_first_line(error) or 'no details given'}). Checkpoints saved before are intact. Lower "
            "train.batch_size, views.local_crops_number or data.workers, raise train.accumulate_steps, choose a "
            "smaller backbone, or close other programs; `nearfar pretrain RECIPE --dry-run` estimates what a run needs."
        )
    if isinstance(error, RecursionError) and _raised_in(error.__traceback__, READERS):
        return "A file that was read is nested far more deeply than anything nearfar writes: it is damaged or hostile."
    if isinstance(error, OSError):
        return _of_the_system(error)
    return None


def report_of(error: BaseException) -> str:
    """The traceback of a bug, and what to do with it."""
    return (
        "".join(traceback.format_exception(error))
        + "\nnearfar: This is a bug in nearfar, not a mistake of yours. Please report it with the lines above, your "
        "command and what `nearfar --version` says. Checkpoints saved before are intact."
    )


def print_paragraph(text: str) -> None:
    """One paragraph on standard error, wrapped if that is a terminal."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    print(paragraph(f"nearfar: {text}", width), file=sys.stderr)


def paragraph(text: str, width: int | None) -> str:
    """`text` as it may go to a terminal: control characters shown instead of obeyed, wrapped to `width` if given."""
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    if width is None:
        return shown
    return textwrap.fill(shown, max(20, width), break_long_words=False, break_on_hyphens=False)


def _of_the_system(error: OSError) -> str:
    name = _short(error.filename2 or error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {name}" if name else ""
        return (
            f"No space left on the disk{where}. Checkpoints saved before are intact: free some space and start the "
            "same command again."
        )
    reason = error.strerror or _first_line(error) or type(error).__name__
    advice = {
        errno.EROFS: "This file system can only be read: choose a place that can be written (folder= for runs)",
        errno.EACCES: "You lack the right to read or write it: change its permissions, or choose another place",
        errno.EPERM: "You lack the right to read or write it: change its permissions, or choose another place",
        errno.ENAMETOOLONG: "File systems take names of at most 255 bytes: choose a shorter one",
        errno.EMFILE: "Allow more open files (ulimit -n), or lower data.workers",
        errno.ENOTDIR: "A part of this path is a file and not a folder",
        errno.EISDIR: "This is a folder, and a file was expected",
        errno.ELOOP: "Symbolic links point at each other in a circle",
    }.get(error.errno or 0)
    problem = f"{name}: {reason}." if name else f"{reason[:1].upper()}{reason[1:]}."
    return f"{problem} {advice}." if advice else problem


def _is_torch_out_of_memory(error: BaseException) -> bool:
    """torch raises a RuntimeError of its own on GPUs, and a plain one on CPUs; it is not imported to ask."""
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return type(error).__name__ == "OutOfMemoryError" or any(
        part in message for part in ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate")
    )


def _raised_in(trace: TracebackType | None, modules: tuple[str, ...]) -> bool:
    """Was one of these packages at work when the error came?"""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in modules:
            return True
        trace = trace.tb_next
    return False


def _short(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, bytes | str | os.PathLike) else "" if name is None else str(name)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-60:]}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
