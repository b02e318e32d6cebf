"""A run on one page: `report.html`, a single file that needs no network and no script, and prints well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.eval import results
from nearfar.eval.pages.curves import curves
from nearfar.eval.pages.mistakes import confusion_section
from nearfar.eval.pages.page import figure_section, folded, image, missing, page, section, soft, text_table, write_page
from nearfar.eval.pages.robustness_page import position_section, robustness_section
from nearfar.eval.pages.summary import part, scores_section, summary
from nearfar.eval.pages.verdict import verdict
from nearfar.eval.pictures import figures
from nearfar.eval.pictures.figures import Figure
from nearfar.eval.results import Score
from nearfar.eval.run_files import flat, read_numbers, read_settings, require_run

_FIRST_CURVES = 3  # the others are folded: a phone would scroll past ten of them
_VIEWS = (
    "What the network was trained on: a row is one image, its two global views and its local views, after all color "
    "operations."
)
_NOT_DRAWN = "figures.json is not in the run folder: `nearfar report RUN` draws neighbors, masks, attention and tokens."


def write_report(run: Path, reason: str = "", about: Mapping[str, Any] = {}) -> Path:
    """Write `report.html` in a run folder from what is there, say on the page what is not, and return its path.

    Reads config.yaml, metrics.jsonl, results.json, figures.json and views.png.

    Args:
        reason: why the figures could not be drawn, where that is known.
        about: what the weights record about themselves (`nearfar.ssl.checkpoint.about`), where they have been read.

    Raises:
        UserError: there is no such folder, or one of the files cannot be read or the page written.
    """
    run = Path(run)
    require_run(run)
    settings = read_settings(run)
    scores = results.read(run / "results.json")
    metrics = read_numbers(run / "metrics.jsonl")
    tables = list(results.tables(scores))
    name = str(settings.get("name") or run.resolve().name)
    drawn = figures.read(run / figures.FILE)
    judged = verdict(tables[0], metrics, flat(settings)) if tables else None
    body = [
        summary(name, settings, metrics, tables, judged),
        *_pictures([figure for figure in drawn if figure.key != "layers"], reason),
        _curves(metrics),
        scores_section(tables, scores),
        confusion_section(tables[0] if tables else {}),
        robustness_section(tables[0] if tables else {}),
        position_section(tables[0] if tables else {}),
        *(figure_section(figure) for figure in drawn if figure.key == "layers"),
        _views(run / "views.png"),
        _settings(settings),
        _environment(about),
        _lineage(settings, scores, about),
    ]
    return write_page(run / "report.html", page(name, body))


# --- sections --------------------------------------------------------------------------------------------------


def _pictures(drawn: Sequence[Figure], reason: str) -> Iterator[str]:
    if not drawn:
        yield section("Pictures", missing(reason or _NOT_DRAWN))
    for figure in drawn:
        yield figure_section(figure)


def _curves(metrics: list[dict[str, float]]) -> str:
    drawn = curves(metrics)
    if not drawn:
        return section("Curves", missing("metrics.jsonl is not there or holds no steps yet."))
    first, others = drawn[:_FIRST_CURVES], drawn[_FIRST_CURVES:]
    content = f'<div class="curves">{"".join(first)}</div>'
    if others:
        content += folded(f"{len(others)} more", f'<div class="curves">{"".join(others)}</div>')
    return section("Curves", content)


def _views(file: Path) -> str:
    try:
        content = file.read_bytes()
        figures.kind_of(content)
    except FileNotFoundError:
        return section("Views", missing(f"{file.name} is not in the run folder."))
    except OSError as error:
        return section("Views", missing(f"{file.name} cannot be read: {error.strerror}."))
    except ValueError:
        return section("Views", missing(f"{file.name} is not a PNG."))
    return section("Views", soft(_VIEWS) + image(content, "the views of six training images, a row for each"))


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [(key, "default" if value is None else str(value)) for key, value in flat(settings).items()]
    if not rows:
        return section("Settings", missing("config.yaml is not in the run folder: the settings are not known."))
    return section("Settings", folded(f"All {len(rows)} settings", text_table(rows)))


def _environment(about: Mapping[str, Any]) -> str:
    rows = [(str(key), str(value)) for key, value in part(about, "versions").items()]
    rows += [(key.replace("_", " "), str(about[key])) for key in ("precision", "world_size") if key in about]
    return section("Environment", text_table(rows) if rows else missing("The weights have not been read."))


def _lineage(settings: Mapping[str, Any], scores: Sequence[Score], about: Mapping[str, Any]) -> str:
    """What came from what: weights from data and settings, scores from weights and data."""
    backbone = part(settings, "backbone")
    rows = [("started from", str(backbone.get("weights") or "random weights of the seed"))] if backbone else []
    if isinstance(start := part(settings, "train").get("start_from"), str):
        rows = [("started from", start)]
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
