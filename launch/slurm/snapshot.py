"""The code of a run, copied at submission, so that a requeue weeks later runs what was submitted."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from nearfar.ssl.errors import UserError

PACKAGES = ("ssl", "eval", "launch", "recipes")


def copy_code(target: Path) -> None:
    """Copy nearfar as this process imports it to `target`/nearfar, so that `target` on the import path is nearfar.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name in PACKAGES:
            if source := _folder(name):
                shutil.copytree(source, target / "nearfar" / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    except OSError as error:
        raise UserError(f"The code could not be copied to {target}: {error}.") from None


def _folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(f"nearfar.{name}")
    places = (spec.submodule_search_locations if spec else None) or []
    return next((Path(folder) for folder in places if Path(folder).is_dir()), None)
