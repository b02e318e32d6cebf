"""The settings of a backbone that starts from weights: which network they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones.recognized import architecture_of
from nearfar.ssl.errors import UserError
from nearfar.ssl.given_weights import is_public, is_published
from nearfar.ssl.settings.run import BackboneSettings

# What a recipe says of these holds whatever the weights are: they belong to a training, a machine or a file.
NOT_OF_A_NETWORK = {"drop_path", "weights", "pretrained", "scan"}


def architecture_settings(weights: str) -> list[str]:
    """`backbone.key=value` for the backbone of a run, a checkpoint, an exported file, a public file or timm/NAME, and
    its weights.

    Raises:
        UserError: nothing there, or weights whose network nobody knows.
    """
    path = Path(weights)
    if is_published(path):
        return [*described({"name": weights}), "backbone.pretrained=true"]
    arch = architecture_of(path) if is_public(path) else checkpoint.about(path).get("arch")
    if not isinstance(arch, dict):
        raise UserError(f"{weights} does not say which architecture it holds. Export the backbone again.")
    arch.pop("img_size", None)  # a classifier's images have the size of its own views
    return [*described(arch), f"backbone.weights={weights}"]


def described(arch: dict[str, Any]) -> list[str]:
    """`backbone.key=value` of a backbone's description, and the default of what it does not mention: a recipe may set
    that for a network of another kind."""
    fields = {key: field for key, field in BackboneSettings.model_fields.items() if key not in NOT_OF_A_NETWORK}
    values = {key: arch.get(key) if arch.get(key) is not None else field.default for key, field in fields.items()}
    return [f"backbone.{key}={json.dumps(value)}" for key, value in values.items()]
