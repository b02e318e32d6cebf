"""The settings of a backbone that starts from weights which say what they are of."""

from __future__ import annotations

import json
from pathlib import Path

from nearfar.ssl import checkpoint
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings import BackboneSettings

# Of a backbone's own description: the rest of it is of one training (drop-path), or of what an input's size is.
_NOT_OF_IT = {"drop_path", "img_size", "mask_token"}


def settings_of(weights: str) -> list[str]:
    """`backbone.key=value` for the backbone that a run, a checkpoint or an exported file describes, and its weights.

    Raises:
        UserError: nothing there, or weights that do not describe themselves.
    """
    arch = checkpoint.about(Path(weights)).get("arch")
    if not isinstance(arch, dict):
        raise UserError(f"{weights} does not say which architecture it holds. Export the backbone again.")
    known = BackboneSettings.model_fields.keys()
    described = {key: value for key, value in arch.items() if key in known and key not in _NOT_OF_IT}
    written = [f"backbone.{key}={json.dumps(value)}" for key, value in described.items() if value is not None]
    return [*written, f"backbone.weights={weights}"]
