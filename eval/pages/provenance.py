"""Where a run's weights come from, as sections of its page: views, settings, environment, lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.eval.pages.page import folded, image, missing, section, soft, text_table
from nearfar.eval.pages.summary import part
from nearfar.eval.pictures import figures
from nearfar.eval.results import Score
from nearfar.eval.run_files import flat


def views_section(file: Path, caption: str) -> str:
    """The picture of the first batch. caption: what is on it."""
    try:
        content = file.read_bytes()
        figures.kind_of(content)
    except FileNotFoundError:
        return section("Views", missing(f"{file.name} is not in the run folder."))
    except OSError as error:
        return section("Views", missing(f"{file.name} cannot be read: {error.strerror}."))
    except ValueError:
        return section("Views", missing(f"{file.name} is not a PNG."))
    return section("Views", soft(caption) + image(content, "the views of training images"))


def settings_section(settings: Mapping[str, Any]) -> str:
    """All settings of a config.yaml."""
    rows = [(key, "default" if value is None else str(value)) for key, value in flat(settings).items()]
    if not rows:
        return section("Settings", missing("config.yaml is not in the run folder: the settings are not known."))
    return section("Settings", folded(f"All {len(rows)} settings", text_table(rows)))


def environment_section(about: Mapping[str, Any]) -> str:
    """Versions and precision, as the weights record them (`nearfar.ssl.checkpoint.about`)."""
    rows = [(str(key), str(value)) for key, value in part(about, "versions").items()]
    rows += [(key.replace("_", " "), str(about[key])) for key in ("precision", "world_size") if key in about]
    return section("Environment", text_table(rows) if rows else missing("The weights have not been read."))


def lineage_section(settings: Mapping[str, Any], scores: Sequence[Score], about: Mapping[str, Any]) -> str:
    """What came from what: weights from data and settings, scores from weights and data."""
    backbone = part(settings, "backbone")
    published = f"timm's weights of {backbone.get('name')}" if backbone.get("pretrained") else ""
    start = str(backbone.get("weights") or published or "random weights of the seed")
    rows = [("started from", start)] if backbone else []
    if isinstance(forked := part(settings, "train").get("start_from"), str):
        rows = [("started from", forked)]
    for origin in about.get("lineage") or []:  # from anyone's file
        if isinstance(origin, dict):
            step = "" if origin.get("step") is None else f", step {origin['step']}"
            rows.append((f"{origin.get('from')}{step}", f"SHA-256 {origin.get('sha256')}"))
    if "data" in about:
        rows.append(("trained on images with fingerprint", str(about["data"])))
    if "step" in about:
        rows.append(("weights of step", str(about["step"])))
    for weights in dict.fromkeys(score.weights for score in scores if score.subject == "trained"):
        rows.append(("scored weights (SHA-256)", weights))
    for name in dict.fromkeys(name for score in scores for name in (score.train, score.val)):
        rows.append((f"{name.path}, {name.images:,} images", name.fingerprint))
    return section("Lineage", text_table(rows) if rows else missing("Nothing is known: no settings, no scores."))
