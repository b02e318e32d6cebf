"""`nearfar adapt WEIGHTS IMAGES`: the recipe `adapt`, with the network that the weights belong to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nearfar.launch.recipes import find_recipe
from nearfar.launch.verbs.training_verb import RecipeAndSettings, TrainingVerb
from nearfar.ssl.errors import UserError


def _add_subject(parser: Any) -> None:
    parser.add_argument(
        "weights",
        help="run folder, checkpoint folder, exported .safetensors, a file of DINO, DINOv2 or timm, or timm/NAME for "
        "what timm publishes",
    )
    parser.add_argument("images", help="images to adapt to, without labels: as data.path")


def _recipe_and_settings(arguments: argparse.Namespace) -> RecipeAndSettings:
    """The recipe `adapt`, with the network that the weights belong to."""
    if not Path(arguments.weights).exists() and "=" in arguments.weights:
        raise UserError(
            f"The weights and the images come first: nearfar adapt WEIGHTS IMAGES {arguments.weights} ... (the recipe "
            "`adapt` with settings alone is `nearfar pretrain adapt`, or `nearfar launch pretrain adapt`)."
        )
    given = {setting.partition("=")[0].strip() for setting in arguments.settings}
    found = settings_for(arguments.weights, guess="backbone.name" not in given)
    if "name" not in given:
        found.append(f"name=adapt-{Path(arguments.images).resolve().stem}")
    return find_recipe("adapt"), [*found, f"data.path={arguments.images}", *arguments.settings]


ADAPT = TrainingVerb(
    "adapt",
    "continue training public weights, or those of a run, on your own images, keeping what they learned",
    _add_subject,
    _recipe_and_settings,
    description="Heads learn alone for an epoch, then the backbone follows at a low rate, held by an anchor to what it "
    "began with. It is `nearfar pretrain adapt` with the network that the weights belong to.",
)


def settings_for(weights: str, guess: bool = True) -> list[str]:
    """The settings that begin a run with these weights: their network, and how its run looked at images.

    guess: tell the network of a file that does not name it from its tensors.

    Raises:
        UserError: no such weights, or their network is not known and must be named.
    """
    from nearfar.launch.starting_weights import architecture_settings, described
    from nearfar.ssl import checkpoint
    from nearfar.ssl.given_weights import is_public, is_published

    path = Path(weights)
    if is_published(path):
        return architecture_settings(weights)
    start = [f"backbone.weights={weights}"]
    if is_public(path):
        return [*start, *(_of_public(path) if guess else [])]
    about = checkpoint.about(path)
    if not isinstance(about.get("arch"), dict):
        return architecture_settings(weights)  # which says that it is not known
    return [*start, *described(about["arch"]), *_of_run(about.get("run"))]


def _of_run(run: Any) -> list[str]:
    """Sizes and pooling of the run that a file comes from."""
    sections = {"views": ("global_crops_size", "local_crops_size"), "head": ("pooling",), "eval": ("size", "resize")}
    found = []
    for section, keys in sections.items():
        values = run.get(section) if isinstance(run, dict) else None
        for key in keys:
            if isinstance(values, dict) and values.get(key) is not None:
                found.append(f"{section}.{key}={json.dumps(values[key])}")
    return found


def _of_public(file: Path) -> list[str]:
    """A public file's network, and views of the usual sizes that its patches fit into.

    Raises:
        UserError: its tensors do not tell which network it is.
    """
    from nearfar.launch.starting_weights import described
    from nearfar.ssl.backbones.recognized import architecture_of, patch_size_of

    try:
        arch = architecture_of(file)
    except UserError as error:
        raise UserError(f"{error} Add backbone.name=, for example backbone.name=timm/regnety_016.") from None
    side = patch_size_of(arch)
    large, small = (max(1, round(size / side)) * side for size in (224, 96))  # never less than a patch
    return [*described(arch), f"views.global_crops_size={large}", f"views.local_crops_size={small}"]
