"""The recipes that come with nearfar, and those of the user."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from nearfar.ssl.errors import UserError
from nearfar.ssl.setting_errors import nearest


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of one that comes with nearfar."""
    path = Path(name)
    if name in bundled():
        return _folder() / f"{name}.yaml"
    if not path.is_file():
        near = nearest(path.stem, bundled())
        hint = f" Did you mean {near}?" if near else ""
        raise UserError(f"There is no recipe {name}.{hint} Give a .yaml file or one of: {', '.join(bundled())}.")
    return path


def bundled() -> list[str]:
    """Names of the recipes that come with nearfar."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def _folder() -> Path:
    spec = importlib.util.find_spec("nearfar.recipes")
    places = (spec.submodule_search_locations if spec else None) or []
    return next(Path(place) for place in places if Path(place).is_dir())  # an editable install lists a marker as well
