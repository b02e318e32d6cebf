import pickle

import pytest

from nearfar.ssl.errors import BadImage, UserError, counted, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b/ü猫.jpg", "a b/ü猫.jpg"),
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        (b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("one\ntwo\r", "one\ntwo\\r"),
        ("\x00\U000e0001", r"\x00\U000e0001"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_errors_print_and_travel_between_processes() -> None:
    for error in (UserError("\x1b[2J\udcff"), BadImage("\x1b[2J", "\udcff")):
        assert "\x1b" not in str(error)
        assert str(error).encode("utf-8")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
