"""A verb that trains: `nearfar VERB ...` begins its run on this machine, `nearfar launch VERB ...` as a job."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nearfar.launch.recipes import bundled
from nearfar.launch.verbs.command_line import HelpWithSettings, add_settings
from nearfar.launch.verbs.forking import add_from, recipe_and_settings
from nearfar.launch.verbs.paths import require_settings_paths

if TYPE_CHECKING:
    from nearfar.ssl.settings.finetune_settings import FinetuneRun
    from nearfar.ssl.settings.run import Run

RecipeAndSettings = tuple[Path | None, list[str]]  # a recipe, and settings that win over it


def load_pretraining(recipe: Path | None, settings: Sequence[str]) -> Run:
    from nearfar.ssl import config

    return config.load(recipe, list(settings))


@dataclass(frozen=True)
class TrainingVerb:
    """What a verb is given before the settings, and which run that is."""

    name: str
    help: str
    add_subject: Callable[[Any], None]  # its arguments, to a parser
    recipe_and_settings: Callable[[argparse.Namespace], RecipeAndSettings]  # Raises UserError for what is not there
    load: Callable[[Path | None, Sequence[str]], Run | FinetuneRun] = load_pretraining
    settings_help: type[HelpWithSettings] = HelpWithSettings
    description: str | None = None

    def add_to(self, verbs: Any) -> None:
        """Put it among the verbs of the `nearfar` command."""
        parser = verbs.add_parser(self.name, help=self.help, description=self.description, add_help=False)
        parser.add_argument("-h", "--help", action=self.settings_help, nargs=0, help="show this and every setting")
        self.add_subject(parser)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="train nothing: show every setting with its reason, sizes, and an estimate of time, memory and disk",
        )
        add_settings(parser)
        parser.set_defaults(verb=self.run_here)

    def run_here(self, arguments: argparse.Namespace) -> None:
        """Train the run that is asked for on this machine, or only tell what it would cost."""
        from nearfar.ssl import config

        run = self.load(*self.recipe_and_settings(arguments))
        config.require_images(run)  # here too: before torch is loaded
        require_settings_paths(run)
        if arguments.dry_run:
            from nearfar.launch.verbs.dry_run import dry_run

            dry_run(run, Console())
        else:
            from nearfar.launch.local.any_run import train

            train(run, Console())


def _add_recipe(parser: Any) -> None:
    parser.add_argument("recipe", help=f"a .yaml file, or the name of a bundled one: {', '.join(bundled())}")
    add_from(parser)


PRETRAIN = TrainingVerb(
    "pretrain",
    "train a backbone on images without labels; the same command continues it",
    _add_recipe,
    recipe_and_settings,
)
