"""The settings of a backbone that starts from weights which say what they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nearfar.ssl import checkpoint
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import BackboneSettings


def architecture_settings(weights: str) -> list[str]:
    """`backbone.key=value` for the backbone that a run, a checkpoint or an exported file describes, and its weights.

    Raises:
        UserError: nothing there, or weights that do not describe themselves.
    """
    arch = checkpoint.about(Path(weights)).get("arch")
    if not isinstance(arch, dict):
        raise UserError(f"{weights} does not say which architecture it holds. Export the backbone again.")
    arch.pop("img_size", None)  # a classifier's images have the size of its own views
    return [*described(arch), f"backbone.weights={weights}"]


def described(arch: dict[str, Any]) -> list[str]:
    """`backbone.key=value` of a backbone's description, but for what belongs to one training (drop-path)."""
    known = BackboneSettings.model_fields.keys() - {"drop_path", "weights", "pretrained"}
    return [f"backbone.{key}={json.dumps(value)}" for key, value in arch.items() if key in known and value is not None]
