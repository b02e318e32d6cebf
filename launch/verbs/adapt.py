"""`nearfar adapt WEIGHTS IMAGES`: the recipe `adapt`, with the network that the weights belong to."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.launch.recipes import find_recipe
from nearfar.launch.verbs.training_verb import RecipeAndSettings, TrainingVerb
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}  # by width
HEAD_WIDTH = 64  # of attention, in all public ViTs


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
    if weights.startswith("timm/"):
        return [f"backbone.name={weights}", "backbone.pretrained=true"]
    from nearfar.launch.starting_weights import described
    from nearfar.ssl import checkpoint
    from nearfar.ssl.backbones.weights import read_state, weights_in

    file = weights_in(Path(weights))
    start = [f"backbone.weights={weights}"]
    try:
        about = checkpoint.about(file) if file.suffix == ".safetensors" else {}
    except UserError:  # another's safetensors, or damaged, which `read_state` will say
        about = {}
    if isinstance(about.get("arch"), dict):
        return [*start, *described(about["arch"]), *_of_run(about.get("run"))]
    return [*start, *(vit_of(read_state(file), file) if guess else [])]


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


def vit_of(state: dict[str, Tensor], file: Path) -> list[str]:
    """A ViT's settings from the names and shapes of its tensors, as DINO, DINOv2 and timm write them.

    Raises:
        UserError: it is no plain ViT with learned positions.
    """
    from nearfar.ssl.backbones.weights import antialiased

    tensors = {re.sub(r"^(module\.|backbone\.|_orig_mod\.|model\.)+", "", name): t for name, t in state.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    patch, positions = shapes.get("patch_embed.proj.weight"), shapes.get("pos_embed")
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(?:\d+\.)?(\d+)\.norm1\.weight", name))}
    plain = any(name.endswith("mlp.fc1.weight") for name in shapes)
    if patch is None or positions is None or len(patch) != 4 or not blocks or not plain:
        raise UserError(
            f"The tensors of {file} are not those of a plain ViT with learned positions, so it is not known which "
            "network they belong to: add backbone.name=, for example backbone.name=timm/vit_small_patch16_dinov3 (or "
            "backbone.name=timm/resnet50)."
        )
    width, side = int(patch[0]), int(patch[-1])
    registers = shapes.get("register_tokens", shapes.get("reg_token"))
    grid = math.isqrt(int(positions[1]))  # with CLS it is one more than a square
    own = [f"backbone.name={NAMES.get(width, 'vit_base')}_patch{side}", f"backbone.pos_size={grid * side}"]
    if width not in NAMES:
        own += [f"backbone.embed_dim={width}", f"backbone.num_heads={max(1, width // HEAD_WIDTH)}"]
    own += [f"backbone.depth={len(blocks)}"] if len(blocks) != 12 else []
    own += [f"backbone.registers={int(registers[1])}"] if registers is not None else []
    own += ["backbone.pos_antialias=true"] if antialiased(tensors) else []
    own += ["backbone.layer_scale=1e-5"] if any(".ls1." in name for name in shapes) else []
    large, small = (max(1, round(size / side)) * side for size in (224, 96))  # never less than a patch
    return [*own, f"views.global_crops_size={large}", f"views.local_crops_size={small}"]
