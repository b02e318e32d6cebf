"""Numbers and names in messages: counts, sizes, durations, and text as any terminal can take it. Imports nothing."""

from collections.abc import Sequence


def printable(text: str) -> str:
    """The text as any terminal and any UTF-8 file can take it: what is not printable becomes its backslash escape.

    The names of files are whatever their owner likes: bytes that are not UTF-8, sequences that move the cursor or set
    colors, characters that change the direction of writing. Line feeds stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return ascii(character)[1:-1]


def counted(number: int, noun: str) -> str:
    """`1 step`, `1,200 steps`: a number with its noun, for messages."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def listed(words: Sequence[str]) -> str:
    """`one`, `one and two`, `one, two and three`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def byte_size(count: float) -> str:
    """`1.5 GB`, `703.2 MB`, `12.0 KB`: a number of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} KB"


def duration(seconds: float) -> str:
    """`45 seconds`, `27 minutes`, `3.2 hours`, `2.5 days`."""
    if seconds < 99.5:
        return counted(round(seconds), "second")
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.{int(seconds < 595)}f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
