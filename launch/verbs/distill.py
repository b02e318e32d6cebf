"""`nearfar distill TEACHER`: `nearfar pretrain` with a frozen teacher, which is one setting of a run."""

from __future__ import annotations

import argparse
from typing import Any

from nearfar.launch.recipes import bundled, find_recipe
from nearfar.launch.verbs.training_verb import RecipeAndSettings, TrainingVerb
from nearfar.ssl.errors import UserError


def _add_subject(parser: Any) -> None:
    parser.add_argument(
        "teacher",
        help="a run's folder, a checkpoint, an exported .safetensors or timm/NAME; with distill.teacher_weights=FILE "
        "also the name of a network of ours",
    )
    parser.add_argument("--recipe", help=f"settings: a .yaml file, or one of {', '.join(bundled())} (default: none)")


def _recipe_and_settings(arguments: argparse.Namespace) -> RecipeAndSettings:
    if "=" in arguments.teacher:
        raise UserError(f"The teacher comes first: nearfar distill TEACHER {arguments.teacher} ...")
    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    name = [] if recipe else ["name=distilled"]
    return recipe, [*name, f"distill.teacher={arguments.teacher}", *arguments.settings]


DISTILL = TrainingVerb(
    "distill",
    "distill a frozen teacher into a backbone, on images without labels; continues like pretrain",
    _add_subject,
    _recipe_and_settings,
)
