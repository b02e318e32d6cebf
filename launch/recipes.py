"""The recipes that come with nearfar, and those of the user."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.messages import nearest


def find_recipe(name: str, supervised: bool = False) -> Path:
    """A recipe by path, or by the name of one that comes with nearfar for this kind of run.

    Raises:
        UserError: there is none, or it is for the other kind of run.
    """
    path = Path(name)
    known = bundled(supervised)
    if name in known:
        return _folder() / f"{name}.yaml"
    if not path.exists() and name in bundled(not supervised):
        raise UserError(f"{name} is {_for_other_kind(name, supervised)}")
    if not path.is_file() and "=" in name:
        raise UserError(
            f"{name} is a setting, and the recipe comes before the settings: a .yaml file of yours (an empty one has "
            f"every default) or one of: {', '.join(known)}."
        )
    if not path.is_file():
        raise UserError(f"{_not_there(path, known)} Give a .yaml file or one of: {', '.join(known)}.")
    _refuse_other_kind(path, supervised)
    return path


def _not_there(path: Path, known: list[str]) -> str:
    """Why there is no recipe at a path, and which one was probably meant."""
    if path.is_dir():
        return f"{path} is a folder, and a recipe is a file of settings."
    others = [path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
    near = next((str(other) for other in others if other.is_file()), None) or nearest(path.stem, known)
    return f"There is no recipe {path}." + (f" Did you mean {near}?" if near else "")


def _refuse_other_kind(path: Path, supervised: bool) -> None:
    """Raises UserError for a recipe with sections that only the other kind of run has."""
    from nearfar.ssl.disk import bounded_files
    from nearfar.ssl.settings.finetune_settings import FinetuneRun
    from nearfar.ssl.settings.run import Run

    own, other = (Run.model_fields.keys(), FinetuneRun.model_fields.keys())[:: -1 if supervised else 1]
    written = bounded_files.read_yaml(path, "recipe").keys()
    if (wrong := sorted(written & (other - own))) and not written & (own - other):
        raise UserError(f"{path} has the section {wrong[0]}: it is {_for_other_kind(path, supervised)}")


def _for_other_kind(recipe: str | Path, supervised: bool) -> str:
    verb = "pretrain" if supervised else "finetune"
    return (
        f"a recipe of `nearfar {verb}`. Write nearfar {verb} {recipe} ..., or on a cluster nearfar launch {verb} "
        f"{recipe} ..."
    )


SUPERVISED = "finetune_"  # what the names of recipes for `nearfar finetune` begin with


def bundled(supervised: bool = False) -> list[str]:
    """Names of the recipes that come with nearfar: for pretraining, or for `nearfar finetune`."""
    return sorted(file.stem for file in _folder().glob("*.yaml") if file.stem.startswith(SUPERVISED) == supervised)


def _folder() -> Path:
    spec = importlib.util.find_spec("nearfar.recipes")
    places = (spec.submodule_search_locations if spec else None) or []
    return next(Path(place) for place in places if Path(place).is_dir())  # an editable install lists a marker as well
