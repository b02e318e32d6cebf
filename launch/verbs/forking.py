"""What a run begins with: `--from RUN[@STEP]`, a checkpoint and the settings of another one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nearfar.launch.recipes import find_recipe
from nearfar.ssl.errors import UserError


def add_from(parser: Any) -> None:
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="RUN[@STEP]",
        help="a new run that begins with a checkpoint of another one: its newest, that of a step, or RUN@best (by the "
        "online k-NN score). Without RECIPE, settings that are not given are those of that run",
    )


def recipe_and_settings(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The recipe and the settings of a command line. With --from the recipe may be left out.

    Raises:
        UserError: no such recipe, or no such run.
    """
    recipe, settings, start = arguments.recipe, list(arguments.settings), arguments.start_from
    if start is None:
        return find_recipe(recipe), settings
    settings.append(f"train.start_from={start}")
    if "=" not in recipe or Path(recipe).is_file():
        return find_recipe(recipe), settings
    return _settings_of(start, [recipe, *settings])


def _settings_of(start: str, settings: list[str]) -> tuple[Path, list[str]]:
    """The config.yaml of a run, and what of it does not hold for a fork."""
    from nearfar.ssl.run import kept

    run = kept.named(start).parent.parent  # before torch is loaded
    from nearfar.ssl import config
    from nearfar.ssl.disk import bounded_files
    from nearfar.ssl.run import fork
    from nearfar.ssl.settings.defaults import as_begun

    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} has no config.yaml to take settings from: name a recipe before --from.")
    fork.check_pretraining(bounded_files.read_yaml(file, "recipe"), run)
    source, given = as_begun(config.load(file)), {_key(setting) for setting in settings}
    before = source.optim.schedule
    own = [f"name={source.name}-fork", "train.restart_schedule=false", "backbone.weights=", "backbone.pretrained=false"]
    schedule = ([each.partition("=")[2].strip() for each in settings if _key(each) == "optim.schedule"] or [before])[-1]
    if schedule == before == "cosine":
        own.append(f"optim.teacher_momentum_end={source.optim.teacher_momentum_end}")
    else:  # the ends of another schedule do not hold, and constants follow what the fork begins with
        own += ["optim.teacher_momentum_end=null", "optim.weight_decay_end=null"]
    if schedule != before:
        own.append("optim.cooldown_epochs=null")
    if "views.global_crops_size" in given:  # the size of the scores follows it, unless it was another one
        own += ["eval.resize=null"] + ["eval.size=null"] * (source.eval.size == source.views.global_crops_size)
    return file, [each for each in own if _key(each) not in given] + settings


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()
