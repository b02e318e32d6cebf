import pytest

from nearfar.ssl.wording import byte_size, counted, duration, printable


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


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(0.2, "0 seconds"), (1, "1 second"), (99.4, "99 seconds"), (99.6, "1.7 minutes"), (594, "9.9 minutes"),
     (596, "10 minutes"), (5400, "90 minutes"), (6000, "1.7 hours"), (170_000, "47.2 hours"), (216_000, "2.5 days")],
)  # fmt: skip
def test_a_duration_has_its_unit_and_about_two_figures(seconds: float, message: str) -> None:
    assert duration(seconds) == message


@pytest.mark.parametrize(
    ("count", "message"),
    [(400, "0.4 KB"), (999_999, "1000.0 KB"), (1e6, "1.0 MB"), (1.5e9, "1.5 GB")],
)
def test_bytes_are_counted_in_thousands(count: float, message: str) -> None:
    assert byte_size(count) == message
