"""The recipes that come with nearfar, and those of the user."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from nearfar.ssl.errors import UserError
from nearfar.ssl.setting_errors import nearest


def find_recipe(name: str, supervised: bool = False) -> Path:
    """A recipe by path, or by the name of one that comes with nearfar for this kind of run."""
    path = Path(name)
    known = bundled(supervised)
    if name in known:
        return _folder() / f"{name}.yaml"
    if not path.is_file() and "=" in name:
        raise UserError(
            f"{name} is a setting, and the recipe comes before the settings: a .yaml file of yours (an empty one has "
            f"every default) or one of: {', '.join(known)}."
        )
    if not path.is_file():
        near = nearest(path.stem, known)
        hint = f" Did you mean {near}?" if near else ""
        raise UserError(f"There is no recipe {name}.{hint} Give a .yaml file or one of: {', '.join(known)}.")
    return path


SUPERVISED = "finetune_"  # what the names of recipes for `nearfar finetune` begin with


def bundled(supervised: bool = False) -> list[str]:
    """Names of the recipes that come with nearfar: for pretraining, or for `nearfar finetune`."""
    return sorted(file.stem for file in _folder().glob("*.yaml") if file.stem.startswith(SUPERVISED) == supervised)


def _folder() -> Path:
    spec = importlib.util.find_spec("nearfar.recipes")
    places = (spec.submodule_search_locations if spec else None) or []
    return next(Path(place) for place in places if Path(place).is_dir())  # an editable install lists a marker as well
