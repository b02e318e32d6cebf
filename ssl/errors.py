"""The exceptions that every part of nearfar shares, and how messages are made printable. Imports nothing, so that a
wrong command is refused quickly."""

EXIT_USER = 2  # of a command that a user's mistake ended
EXIT_PEER = 3  # of a rank that ended because another one did


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


class UserError(ValueError):
    """A user's mistake, told in one paragraph that names what is wrong and how to put it right.

    The command line prints the paragraph and exits with code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PeerError(RuntimeError):
    """Another rank of the run ended, so this one cannot go on; says which and why as far as that is known."""


class BadImage(Exception):  # noqa: N818  the name already says what it is
    """An image that cannot be used: `name` says which, `why` says what is wrong with it."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = printable(name), printable(why)
        super().__init__(self.name, self.why)

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"
