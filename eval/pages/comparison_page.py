"""The comparison of runs as a page: what came out, seeds together, with links to the pages of the runs."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from nearfar.eval.pages.compare import Comparison, Row, compare
from nearfar.eval.pages.page import number_table, page, section, soft, write_page
from nearfar.eval.pages.seed_tables import SeedTable, detail_tables, score_table
from nearfar.eval.pages.seeds import by_seed, repeated_seeds
from nearfar.eval.results import TITLES
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import counted


def write_comparison(runs: Sequence[Path], target: Path) -> Path:
    """`compare` of some runs as a page; its path.

    Raises:
        UserError: there are no runs, or the page cannot be written.
    """
    if not runs:
        raise UserError(
            f"{target.parent} is neither a run nor a folder of runs (no config.yaml in it or one level below)."
        )
    found = compare(runs)
    groups = by_seed(found)
    same = len(groups) == len(found.rows)
    merged = "" if same else f", {len(groups)} when runs that differ only in their seed count as one"
    title = target.parent.resolve().name if target.name == "report.html" else target.stem
    body = [
        f'<header><div class="soft">nearfar comparison</div><h1>{html.escape(title)}</h1>'
        f'<p class="lede">{counted(len(found.rows), "run")}{merged}.</p></header>'
    ]
    if len(groups) < len(found.rows):
        table = score_table(found)
        body.append(section(table.title, soft(table.note) + _means(table)))
    body.append(section("Every run", _every_run(found, target.parent)))
    body += [
        section(table.title, soft(table.note) + number_table(table.heads, table.rows))
        for table in detail_tables(groups)
    ]
    body += [soft(note) for note in [*found.notes, *repeated_seeds(groups)]]
    body.append(soft("For a paper: nearfar report RUN RUN ... --format markdown (or latex)."))
    return write_page(target, page(title, body))


def _means(table: SeedTable) -> str:
    rows = []
    for at, (name, *cells) in enumerate(table.rows):
        marks = [' class="best"' if (at, column) in table.best else "" for column in range(1, len(table.heads))]
        marked = "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, cells, strict=True))
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{marked}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in table.heads[1:])
    top_row = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="runs">{top_row}<tbody>{"".join(rows)}</tbody></table></div>'


def _every_run(found: Comparison, folder: Path) -> str:
    heads = ["run", *(TITLES[task] for task in found.tasks), "loss", "step", *found.keys]
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for row in found.rows:
        cells = [f"<td>{_name(row, folder)}</td>"]
        for task in found.tasks:
            mark = ' class="best"' if found.is_best(row, task) else ""
            cells.append(f"<td{mark}>{html.escape(row.score(task))}</td>")
        cells += [f"<td>{html.escape(text)}</td>" for text in row.outcome]
        cells += [f"<td>{html.escape(row.settings.get(key, ''))}</td>" for key in found.keys]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table class="runs">{"".join(lines)}</table></div>'


def _name(row: Row, folder: Path) -> str:
    """With a link to the run's own page, where there is one."""
    name = html.escape(row.run.name)
    if not (row.run / "report.html").is_file():
        return name
    # "./" and quoting: a name with a colon would be read as a scheme, such as javascript:
    parts = Path(os.path.relpath(row.run, folder)).parts
    where = "/".join(quote(part, safe="", errors="surrogateescape") for part in parts)
    return f'<a href="./{html.escape(where, quote=True)}/report.html">{name}</a>'
