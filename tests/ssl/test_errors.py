import pickle

from nearfar.ssl.errors import BadImage, UserError


def test_errors_print_and_travel_between_processes() -> None:
    for error in (UserError("\x1b[2J\udcff"), BadImage("\x1b[2J", "\udcff")):
        assert "\x1b" not in str(error)
        assert str(error).encode("utf-8")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
