from __future__ import annotations

import subprocess
import sys

import pytest


def test_a_source_is_opened_without_torch() -> None:
    """It takes seconds to import, and `nearfar data` needs none of it."""
    program = (
        "import sys; from nearfar.ssl.data import open_source; print('torch' in sys.modules, open_source.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "False open_source\n"), done.stderr


def test_what_is_not_at_the_door_is_an_error() -> None:
    import nearfar.ssl.data as door

    assert door.open_loader.__module__ == "nearfar.ssl.data.loaders.choose"
    with pytest.raises(AttributeError, match="no attribute 'open_sauce'"):
        _ = door.open_sauce
