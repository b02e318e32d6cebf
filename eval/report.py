"""A run on one page: `report.html`, a single file that needs no network and no script, and prints well."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.eval import results
from nearfar.eval.curves import curves, number
from nearfar.eval.results import SUBJECTS, TITLES, Score
from nearfar.eval.run_files import flat, read_numbers, read_settings
from nearfar.eval.verdict import Verdict, verdict
from nearfar.ssl import files
from nearfar.ssl.errors import UserError

_EXPLAINED = {"untrained": "same network, same seed, no training", "pixels": "no network"}
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
.verdict { border-left: 4px solid var(--accent); background: var(--wash); padding: .7rem 1rem; margin-top: 1.4rem;
           border-radius: 0 6px 6px 0; max-width: none } .verdict.bad { border-color: #b65c1a; background: #fdf6ef }
h3 { font-size: .95rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; font-weight: 500 }
.scroll { overflow-x: auto } dd { overflow-wrap: anywhere }
.missing { background: var(--wash); padding: .7rem 1rem; border-radius: 6px; color: var(--soft) }
@media print { body { padding: 0; max-width: none; font-size: 12px } .curves { grid-template-columns: repeat(3, 1fr) }
  section { break-inside: avoid-page } h2 { break-after: avoid } details:not([open]) { display: none } }
"""


def write_report(run: Path, reasons: Mapping[str, str] = {}) -> Path:
    """Write `report.html` in a run folder from what is there, say on the page what is not, and return its path.

    Reads config.yaml, metrics.jsonl, results.json, views.png, attention.png and pca.png. reasons: why a picture is
    missing, by the name of its file, where that is known.

    Raises:
        UserError: there is no such folder, or one of the files cannot be read or the page written.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"There is no run folder {run}, so there is nothing to report on.")
    settings = read_settings(run)
    scores = results.read(run / "results.json")
    metrics = read_numbers(run / "metrics.jsonl")
    tables = list(results.tables(scores))
    name = str(settings.get("name") or run.resolve().name)
    judged = verdict(tables[0], metrics, flat(settings)) if tables else None
    body = [
        _head(name, settings, metrics, judged),
        _results(tables, scores),
        _curves(metrics),
        *(_picture(run / file, title, text, reasons.get(file)) for file, title, text in _PICTURES),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} &middot; nearfar</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    return write_page(run / "report.html", page)


def write_page(target: Path, page: str) -> Path:
    """Replace a page in one move. Raises UserError where it cannot be written."""
    try:
        # a name from outside may hold halves of a surrogate pair, which UTF-8 has no bytes for
        files.write_bytes(target, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"The report {target} could not be written: {error.strerror or error}.") from None
    return target


# --- sections --------------------------------------------------------------------------------------------------


def _head(
    name: str, settings: dict[str, Any], metrics: list[dict[str, float]], judged: Verdict | None
) -> str:  # fmt: skip
    facts = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in _facts(settings, metrics)
    )
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape('default' if value is None else str(value))}</td></tr>"
        for key, value in flat(settings).items()
    )
    table = (
        f"<details><summary>All settings</summary><table>{rows}</table></details>"
        if rows
        else _missing("config.yaml is not in the run folder: the settings are not known.")
    )
    sentence = ""
    if judged:
        kind = "verdict" if judged.good else "verdict bad"
        sentence = f'<p class="{kind}"><b>{html.escape(judged.finding)}</b> {html.escape(judged.advice)}</p>'
    return (
        f'<header><div class="soft">nearfar run</div><h1>{html.escape(name)}</h1>{sentence}<dl>{facts}</dl>{table}'
        "</header>"
    )


def _facts(settings: dict[str, Any], metrics: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
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
        yield "Steps", f"{last['step']:,.0f}"
        if "epoch" in last:
            yield "Epochs", f"{last['epoch']:.4g}{of}"
        yield "Loss", f"{number(logged[0]['loss'])} \u2192 {number(last['loss'])}"
        speeds = sorted(line["img_per_s"] for line in logged if "img_per_s" in line)
        if speeds:
            yield "Images per second", f"{number(speeds[len(speeds) // 2])} (median)"
        if isinstance(train.get("batch_size"), int) and (seconds := _seconds(logged, train["batch_size"])):
            yield "Time in training", f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"
    if "seed" in train:
        yield "Seed", str(train["seed"])


def _seconds(logged: list[dict[str, float]], batch_size: int) -> float:
    """From steps and speeds, not from the clock: a run may have been stopped and continued."""
    total, before = 0.0, 0.0
    for line in logged:
        if line.get("img_per_s"):
            total += (line["step"] - before) * batch_size / line["img_per_s"]
        before = line["step"]
    return total


def _results(tables: Sequence[Mapping[str, Mapping[str, Score]]], scores: Sequence[Score]) -> str:
    if not tables:
        return _section(
            "Frozen features",
            _missing("There are no scores yet: `nearfar eval all RUN --baselines` writes results.json."),
        )
    intro = "<p class='soft'>In percent; the best of each column is bold.</p>"
    return _section("Frozen features", intro + "".join(_table(table) for table in tables) + _every_score(scores))


def _table(table: Mapping[str, Mapping[str, Score]]) -> str:
    """The scores on one pair of data sets, and how far training is above the other rows."""
    tasks = [task for task in TITLES if any(task in scores for scores in table.values())]
    percent = {subject: {task: each.percent for task, each in scores.items()} for subject, scores in table.items()}
    best = {task: max(round(scores[task], 1) for scores in percent.values() if task in scores) for task in tasks}

    def cell(value: float | None, task: str) -> str:
        mark = ' class="best"' if value is not None and round(value, 1) == best[task] else ""
        return "<td>&ndash;</td>" if value is None else f"<td{mark}>{value:.1f}</td>"

    rows = []
    for subject, scores in percent.items():
        small = f"<small>{_EXPLAINED[subject]}</small>" if subject in _EXPLAINED else ""
        cells = "".join(cell(scores.get(task), task) for task in tasks)
        rows.append(f'<tr><th scope="row">{SUBJECTS[subject].capitalize()}{small}</th>{cells}</tr>')
    for other in ("untrained", "pixels"):
        if "trained" in percent and other in percent:
            differences = "".join(
                f"<td>{percent['trained'][task] - percent[other][task]:+.1f}</td>"
                if task in percent["trained"] and task in percent[other]
                else "<td>&ndash;</td>"
                for task in tasks
            )
            against = f"Trained &minus; {SUBJECTS[other]}"
            rows.append(f'<tr class="difference"><th scope="row">{against}</th>{differences}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(TITLES[task])}</th>' for task in tasks)
    one = next(iter(next(iter(table.values())).values()))
    data = (
        f"<h3>learned from {html.escape(one.train.path)} ({one.train.images:,} images), scored on "
        f"{html.escape(one.val.path)} ({one.val.images:,})</h3>"
    )
    return f"{data}<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _every_score(scores: Sequence[Score]) -> str:
    """All entries of results.json with what they read: those of earlier weights and of other readings too."""
    rows = []
    for each in scores:
        reading = ", ".join(f"{key} {value}" for key, value in each.reading.items() if value is not None)
        step = "" if each.step is None else f"{each.step:,}"
        cells = (SUBJECTS[each.subject], step, TITLES[each.task], f"{each.percent:.1f}", each.val.path, reading)
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{title}</th>" for title in ("features", "step", "score", "%", "scored on", "read as"))
    return (
        f'<details><summary>All {len(scores)} scores</summary><div class="scroll"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _curves(metrics: list[dict[str, float]]) -> str:
    figures = curves(metrics)
    if not figures:
        return _section("Curves", _missing("metrics.jsonl is not there or holds no steps yet."))
    return _section("Curves", f'<div class="curves">{"".join(figures)}</div>')


def _picture(file: Path, title: str, text: str, reason: str | None) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return _section(title, _missing(reason or f"{file.name} is not in the run folder."))
    except OSError as error:
        return _section(title, _missing(f"{file.name} cannot be read: {error.strerror}."))
    if not content.startswith(b"\x89PNG"):
        return _section(title, _missing(f"{file.name} is not a PNG."))
    data = base64.b64encode(content).decode("ascii")
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
