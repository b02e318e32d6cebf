"""The exceptions that every part of nearfar shares. Imports next to nothing: a wrong command is refused quickly."""

from nearfar.ssl.wording import printable

EXIT_USER = 2  # of a command that a user's mistake ended
EXIT_PEER = 3  # of a rank that ended because another one did


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
