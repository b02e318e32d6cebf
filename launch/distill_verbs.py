"""`nearfar distill TEACHER`: `nearfar pretrain` with a frozen teacher, which is one setting of a run."""

from __future__ import annotations

import argparse
from typing import Any

from nearfar.launch.command_line import HelpWithSettings, add_settings
from nearfar.launch.forking import start
from nearfar.launch.recipes import bundled, find_recipe
from nearfar.ssl.errors import UserError


def add_distill(verbs: Any) -> None:
    distill = verbs.add_parser(
        "distill",
        help="train a backbone on images without labels to see what a frozen teacher sees; continues like pretrain",
        add_help=False,
    )
    distill.add_argument("-h", "--help", action=HelpWithSettings, nargs=0, help="show this and every setting")
    distill.add_argument(
        "teacher",
        help="a run's folder, a checkpoint, an exported .safetensors or timm/NAME; with distill.teacher_weights=FILE "
        "also the name of a network of ours",
    )
    distill.add_argument("--recipe", help=f"settings: a .yaml file, or one of {', '.join(bundled())} (default: none)")
    distill.add_argument(
        "--dry-run", action="store_true", help="train nothing: show settings, sizes, and an estimate of the time"
    )
    add_settings(distill)
    distill.set_defaults(verb=run_distill)


def run_distill(arguments: argparse.Namespace) -> None:
    from nearfar.ssl import config

    if "=" in arguments.teacher:
        raise UserError(f"The teacher comes first: nearfar distill TEACHER {arguments.teacher} ...")
    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    name = [] if recipe else ["name=distilled"]
    run = config.load(recipe, [*name, f"distill.teacher={arguments.teacher}", *arguments.settings])
    start(run, arguments.dry_run)
