"""A run on one page: `report.html`, a single file that needs no network and no script, and prints well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.eval import results
from nearfar.eval.pages.curves import curves
from nearfar.eval.pages.mistakes import confusion_section
from nearfar.eval.pages.page import figure_section, folded, missing, page, section, write_page
from nearfar.eval.pages.provenance import environment_section, lineage_section, settings_section, views_section
from nearfar.eval.pages.robustness_page import position_section, robustness_section
from nearfar.eval.pages.summary import scores_section, summary
from nearfar.eval.pages.verdict import verdict
from nearfar.eval.pictures import figures
from nearfar.eval.pictures.figures import Figure
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
        views_section(run / "views.png", _VIEWS),
        settings_section(settings),
        environment_section(about),
        lineage_section(settings, scores, about),
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
