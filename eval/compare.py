"""Several runs beside each other: the settings in which they differ and what came out, as a table and as a page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from nearfar.ssl.errors import UserError
from nearfar.ssl.run_folder import read_metrics

SCORES = {"knn_top1": "k-NN top-1", "linear_top1": "linear top-1", "miou": "mIoU"}
_LABELS = {"name", "folder"}  # differ in every sweep and mean nothing
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2.5rem auto;max-width:66rem;padding:0 1.5rem;color:#1d2430}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.45rem 1.1rem .45rem 0;text-align:right;border-bottom:1px solid #e3e7ec}"
    "th:first-child,td:first-child{text-align:left}td.best{font-weight:700;color:#0b6e99}"
)


def runs_in(folder: Path) -> list[Path]:
    """The runs directly inside a folder, in the order of their names."""
    return sorted(file.parent for file in folder.glob("*/config.yaml"))


def compare(runs: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Titles and a row for each run: its name, the settings that differ, steps, last loss, scores in percent.

    Scores are those of `results.json`; without it the last online k-NN. What a run does not have is empty.

    Raises:
        UserError: a file of a run cannot be read.
    """
    settings = [_flat(_read(run / "config.yaml")) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for tree in settings for key in tree)
        if key not in _LABELS and len({json.dumps(tree.get(key)) for tree in settings}) > 1
    ]
    results = [_results(run) for run in runs]
    scores = [key for key in SCORES if any(key in found for found in results)]
    rows = []
    for run, tree, found in zip(runs, settings, results, strict=True):
        logged = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        last = logged[-1] if logged else {}
        rows.append(
            [
                run.name,
                *("" if tree.get(key) is None else str(tree[key]) for key in keys),
                f"{last['step']:,}" if last else "",
                f"{last['loss']:.4f}" if last else "",
                *(f"{found[key]:.1f}" if key in found else "" for key in scores),
            ]
        )
    return ["run", *keys, "step", "loss", *(SCORES[key] for key in scores)], rows


def table(runs: Sequence[Path]) -> Table:
    """`compare` for a terminal."""
    titles, rows = compare(runs)
    shown = Table()
    for title in titles:
        shown.add_column(title, justify="left" if title == "run" else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def write_comparison(folder: Path) -> Path:
    """`compare` of the runs in a folder as report.html, with links to the reports of the runs; its path.

    Raises:
        UserError: there are no runs, or the page cannot be written.
    """
    if not (runs := runs_in(folder)):
        raise UserError(f"{folder} is neither a run nor a folder of runs (no config.yaml in it or one level below).")
    titles, rows = compare(runs)
    best = {
        column: max((float(row[column]) for row in rows if row[column]), default=None)
        for column, title in enumerate(titles)
        if title in SCORES.values()
    }
    lines = ["<tr>" + "".join(f"<th>{html.escape(title)}</th>" for title in titles) + "</tr>"]
    for run, row in zip(runs, rows, strict=True):
        name = html.escape(row[0])
        if (run / "report.html").exists():
            name = f'<a href="{html.escape(run.name, quote=True)}/report.html">{name}</a>'
        cells = [f"<td>{name}</td>"]
        for column, value in enumerate(row[1:], 1):
            mark = ' class="best"' if value and column in best and float(value) == best[column] else ""
            cells.append(f"<td{mark}>{html.escape(value)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    title = html.escape(folder.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><table>{''.join(lines)}</table></html>\n"
    )
    target = folder / "report.html"
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The report {target} could not be written: {error}.") from None
    return target


def _results(run: Path) -> dict[str, float]:
    if (run / "results.json").exists():
        return {
            key: value for key, value in (_read(run / "results.json").get("trained") or {}).items() if key in SCORES
        }
    online = [line["knn_top1"] for line in read_metrics(run / "metrics.jsonl") if "knn_top1" in line]
    return {"knn_top1": online[-1]} if online else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold what a run writes there.")
    return content


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
