"""`nearfar finetune` and `nearfar predict`: their flags, and the functions that do them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nearfar.launch.recipes import bundled, find_recipe
from nearfar.launch.verbs.command_line import HelpWithSettings
from nearfar.launch.verbs.training_verb import RecipeAndSettings, TrainingVerb

if TYPE_CHECKING:
    from nearfar.ssl.settings.finetune_settings import FinetuneRun
    from nearfar.ssl.settings.run import AnyRun


class HelpWithFinetuneSettings(HelpWithSettings):
    """The help of `nearfar finetune`, and every setting of a supervised run."""

    @staticmethod
    def kind() -> type[AnyRun]:
        from nearfar.ssl.settings.finetune_settings import FinetuneRun

        return FinetuneRun


def _add_subject(parser: Any) -> None:
    parser.add_argument("recipe", help=f"a .yaml file, or the name of a bundled one: {', '.join(bundled(True))}")
    parser.add_argument(
        "--from",
        dest="weights",
        metavar="WEIGHTS",
        help="weights to start from, with their backbone: a run's folder, a checkpoint, an exported file, a public "
        "one (DINO, DINOv2, DINOv3, timm) or timm/NAME (backbone.weights= starts the recipe's own backbone from a "
        "file)",
    )


def _recipe_and_settings(arguments: argparse.Namespace) -> RecipeAndSettings:
    settings = list(arguments.settings)
    if arguments.weights:
        from nearfar.launch.starting_weights import architecture_settings

        settings = [*architecture_settings(arguments.weights), *settings]
    return find_recipe(arguments.recipe, supervised=True), settings


def _load(recipe: Path | None, settings: Sequence[str]) -> FinetuneRun:
    from nearfar.ssl.settings import finetune_settings

    return finetune_settings.load(recipe, settings)


FINETUNE = TrainingVerb(
    "finetune",
    "train a classifier on labeled images: from scratch, a run or public weights",
    _add_subject,
    _recipe_and_settings,
    _load,
    HelpWithFinetuneSettings,
)


def add_predict(verbs: Any) -> None:
    predict = verbs.add_parser("predict", help="classify images with what `nearfar finetune` trained, into a .csv")
    predict.add_argument("model", type=Path, help="run folder, checkpoint folder or classifier.safetensors")
    predict.add_argument(
        "images",
        help="a flat folder, class folders (then it prints the accuracy), a .txt list, an .npz, a .beton or a .tar",
    )
    predict.add_argument("--csv", type=Path, required=True, help="file to write: file, rank, class, probability")
    predict.add_argument("--top", type=int, default=1, help="answers for each image, likeliest first (default 1)")
    predict.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    predict.add_argument("--resize", type=int, help="shorter side before the center crop (default: eval.resize)")
    predict.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    predict.add_argument("--workers", type=int, help="threads or processes that decode images (default: by cores)")
    predict.set_defaults(verb=run_predict)


def run_predict(arguments: argparse.Namespace) -> None:
    from nearfar.launch.predict import PredictOptions, predict_images

    options = PredictOptions(arguments.top, arguments.size, arguments.resize, arguments.device, arguments.workers)
    predict_images(arguments.model, arguments.images, arguments.csv, options, Console())
