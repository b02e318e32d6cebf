"""A run on one page: `report.html`, a single file that needs no network and no script, and prints well."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nearfar.eval.curves import curves, number
from nearfar.ssl.errors import UserError
from nearfar.ssl.run_folder import read_metrics

_SCORES = {"knn_top1": "k-NN top-1", "linear_top1": "Linear probe top-1", "miou": "Segmentation mIoU"}
_SUBJECTS = {
    "trained": ("Trained", ""),
    "untrained": ("Untrained", "same network, same seed, no training"),
    "pixels": ("Raw pixels", "no network"),
}
_PICTURES = (
    (
        "views.png",
        "Views",
        "What the network was trained on: a row is one image, its two global views and its local views, after all "
        "color operations.",
    ),
    (
        "attention.png",
        "Attention",
        "The image, then where the last block looks from its CLS token: the mean over heads, and single heads. Each "
        "map is stretched by itself.",
    ),
    (
        "pca.png",
        "Patch tokens",
        "The first three principal components of the patch tokens of all these images as red, green and blue: alike "
        "colors are alike tokens.",
    ),
)
_STYLE = """
:root { --ink: #1d2430; --soft: #667080; --rule: #e3e7ec; --accent: #0b6e99; --wash: #f6f8fa; }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -.01em; font-weight: 650; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--rule) }
p { margin: .3rem 0 .9rem; max-width: 46rem } .soft, small { color: var(--soft) } small { font-size: .8rem }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1.1rem 0 0 }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .45rem 1.1rem .45rem 0; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left } thead th { color: var(--soft); font-weight: 500; font-size: .85rem }
tbody th { font-weight: 500 } tbody th small { display: block; font-weight: 400 }
td.best { font-weight: 700; color: var(--accent) } tr.difference td, tr.difference th { color: var(--soft) }
details { margin-top: 1rem } summary { cursor: pointer; color: var(--soft) }
details table { font-size: .85rem; margin-top: .6rem } details td { padding-block: .15rem; text-align: left }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem 1.6rem }
figure { margin: 0; break-inside: avoid }
figcaption { display: flex; justify-content: space-between; font-size: .85rem }
figcaption b { font-weight: 600 } figcaption span { color: var(--accent); font-variant-numeric: tabular-nums }
svg { width: 100%; display: block } svg text { font-size: 10px; fill: var(--soft) }
.grid { stroke: var(--rule) } .guide { stroke: #b65c1a; stroke-dasharray: 4 3 }
.line { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round } circle { fill: var(--accent) }
img { max-width: 100%; height: auto; display: block }
.missing { background: var(--wash); padding: .7rem 1rem; border-radius: 6px; color: var(--soft) }
@media print { body { padding: 0; max-width: none; font-size: 12px } .curves { grid-template-columns: repeat(3, 1fr) }
  section { break-inside: avoid-page } h2 { break-after: avoid } details:not([open]) { display: none } }
"""


def write_report(run: Path) -> Path:
    """Write `report.html` in a run folder from what is there, say on the page what is not, and return its path.

    Reads config.yaml, metrics.jsonl, results.json, views.png, attention.png and pca.png.

    Raises:
        UserError: there is no such folder, or one of the files cannot be read or the page written.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"There is no run folder {run}, so there is nothing to report on.")
    settings = _mapping(run / "config.yaml")
    results = _mapping(run / "results.json")
    metrics = read_metrics(run / "metrics.jsonl")
    name = str(settings.get("name") or run.resolve().name)
    body = [
        _head(name, settings, metrics),
        _results(results),
        _curves(metrics),
        *(_picture(run / file, title, text) for file, title, text in _PICTURES),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} &middot; nearfar</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    target = run / "report.html"
    partial = run / "report.html.writing"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"The report {target} could not be written: {error}.") from None
    return target


def _mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; {} where there is no such file."""
    if not file.exists():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read for the report: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold a mapping of names to values and holds a {type(content).__name__}.")
    return content


# --- sections --------------------------------------------------------------------------------------------------


def _head(name: str, settings: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in _facts(settings, metrics)
    )
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _flat(settings)
    )
    table = (
        f"<details><summary>All settings</summary><table>{rows}</table></details>"
        if rows
        else _missing("config.yaml is not in the run folder: the settings are not known.")
    )
    return f'<header><div class="soft">nearfar run</div><h1>{html.escape(name)}</h1><dl>{facts}</dl>{table}</header>'


def _facts(settings: dict[str, Any], metrics: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    backbone, train, data = (_part(settings, key) for key in ("backbone", "train", "data"))
    if backbone.get("name"):
        switches = [label for key, label in (("lgp", "LGP"), ("gaug", "GAug"), ("prr", "PRR")) if backbone.get(key)]
        yield "Backbone", " + ".join([str(backbone["name"]), *switches])
    if data.get("path"):
        yield "Data", str(data["path"])
    logged = [line for line in metrics if "loss" in line]
    if logged:
        last = logged[-1]
        of = f" of {train['epochs']}" if "epochs" in train else ""
        yield "Steps", f"{last['step']:,}"
        if "epoch" in last:
            yield "Epochs", f"{last['epoch']:.4g}{of}"
        yield "Loss", f"{number(logged[0]['loss'])} \u2192 {number(last['loss'])}"
        speeds = sorted(line["img_per_s"] for line in logged if "img_per_s" in line)
        if speeds:
            yield "Images per second", f"{number(speeds[len(speeds) // 2])} (median)"
        if "batch_size" in train and (seconds := _seconds(logged, train["batch_size"])):
            yield "Time in training", f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"
    if "seed" in train:
        yield "Seed", str(train["seed"])


def _seconds(logged: list[dict[str, Any]], batch_size: int) -> float:
    """From steps and speeds, not from the clock: a run may have been stopped and continued."""
    total, before = 0.0, 0
    for line in logged:
        if line.get("img_per_s"):
            total += (line["step"] - before) * batch_size / line["img_per_s"]
        before = line["step"]
    return total


def _results(results: dict[str, Any]) -> str:
    table = {
        subject: scores
        for subject in [*_SUBJECTS, *(other for other in results if other not in _SUBJECTS)]
        if isinstance(scores := results.get(subject), Mapping) and any(key in scores for key in _SCORES)
    }
    keys = [key for key in _SCORES if any(key in scores for scores in table.values())]
    if not table:
        return _section("Frozen features", _missing("results.json is not there or holds no scores yet."))
    best = {key: max(round(scores[key], 1) for scores in table.values() if key in scores) for key in keys}

    def cells(scores: Mapping[str, float]) -> str:
        return "".join(
            "<td>&ndash;</td>" if key not in scores
            else f'<td class="best">{scores[key]:.1f}</td>' if round(scores[key], 1) == best[key]
            else f"<td>{scores[key]:.1f}</td>"
            for key in keys
        )  # fmt: skip

    rows = []
    for subject, scores in table.items():
        label, explained = _SUBJECTS.get(subject, (subject, ""))
        small = f"<small>{explained}</small>" if explained else ""
        rows.append(f'<tr><th scope="row">{html.escape(label)}{small}</th>{cells(scores)}</tr>')
    for other in ("untrained", "pixels"):
        if "trained" in table and other in table:
            differences = "".join(
                f"<td>{table['trained'][key] - table[other][key]:+.1f}</td>"
                if key in table["trained"] and key in table[other]
                else "<td>&ndash;</td>"
                for key in keys
            )
            against = _SUBJECTS[other][0].lower()
            rows.append(f'<tr class="difference"><th scope="row">Trained &minus; {against}</th>{differences}</tr>')
    heads = "".join(f'<th scope="col">{_SCORES[key]}</th>' for key in keys)
    return _section(
        "Frozen features",
        "<p class='soft'>In percent; the best of each column is bold.</p>"
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
    )


def _curves(metrics: list[dict[str, Any]]) -> str:
    figures = curves(metrics)
    if not figures:
        return _section("Curves", _missing("metrics.jsonl is not there or holds no steps yet."))
    return _section("Curves", f'<div class="curves">{"".join(figures)}</div>')


def _picture(file: Path, title: str, text: str) -> str:
    if not file.exists():
        return _section(title, _missing(f"{file.name} is not in the run folder."))
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return _section(
        title, f'<p class="soft">{text}</p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'


def _part(settings: dict[str, Any], key: str) -> dict[str, Any]:
    part = settings.get(key)
    return part if isinstance(part, dict) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `views.local_crops_size`, `24`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "default" if value is None else str(value)
