"""The pages that nearfar writes: one file each, no script, no request; for a phone, a screen, paper, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from nearfar.eval.pages.curves import scatter
from nearfar.eval.pictures.figures import Cell, Figure, Group, kind_of
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5b6675; --rule: #e2e7ec; --accent: #0b6e99; --wash: #f4f7f9;
        --paper: #fff; --gray: #b3bdc8; --right: #1a7f4b; --wrong: #c2410c; --warn: #fdf6ef }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6ebf1; --soft: #9aa7b6; --rule: #2b3440;
        --accent: #5cb8e0; --wash: #1a212a; --paper: #11161d; --gray: #55606d; --right: #4cc38a; --wrong: #ff8f5a;
        --warn: #2a2018 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 2.2rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; font-weight: 650;
     overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; font-weight: 600 }
p { margin: .3rem 0 .9rem; max-width: 46rem; overflow-wrap: anywhere } a { color: var(--accent) }
.soft, small { color: var(--soft) } small { font-size: .8rem } .lede { font-size: 1.05rem; max-width: 50rem }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1.1rem 0 0 }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; font-variant-numeric: tabular-nums;
     overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 1rem .4rem 0; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left } thead th { color: var(--soft); font-weight: 500; font-size: .85rem }
tbody th { font-weight: 500 } tbody th small { display: block; font-weight: 400 }
td.best { font-weight: 700; color: var(--accent) } tr.difference td, tr.difference th { color: var(--soft) }
details { margin-top: 1rem } summary { cursor: pointer; color: var(--accent); padding: .3rem 0 }
details table { font-size: .85rem; margin-top: .6rem } .text td { padding-block: .15rem; text-align: left }
.text td:last-child { overflow-wrap: anywhere }
.runs th, .runs th + td, .runs td + td { white-space: nowrap }
.scroll { overflow-x: auto } .missing { background: var(--wash); padding: .7rem 1rem; border-radius: 6px;
          color: var(--soft) }
.verdict { border-left: 4px solid var(--accent); background: var(--wash); padding: .7rem 1rem; margin: 1.2rem 0;
           border-radius: 0 6px 6px 0; max-width: none }
.verdict.bad { border-color: var(--wrong); background: var(--warn) }
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 1.2rem 2rem;
        margin: 1.2rem 0 }
.bars b { font-weight: 600 } .bar { display: grid; grid-template-columns: 5.2rem 1fr 2.8rem; gap: .6rem;
        align-items: center; font-size: .85rem; font-variant-numeric: tabular-nums }
.bar i { display: block; height: .7rem; border-radius: 2px; background: var(--gray); min-width: 1px }
.bar.trained { font-weight: 650 } .bar.trained i { background: var(--accent) }
.bar span:last-child { text-align: right }
.bar .track { border-left: 1px solid var(--gray) }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1.2rem 1.6rem }
figure { margin: 0; break-inside: avoid } figcaption b { font-weight: 600 }
.curves figcaption { display: flex; justify-content: space-between; font-size: .85rem }
.curves figcaption span { color: var(--accent); font-variant-numeric: tabular-nums }
svg { width: 100%; display: block } svg text { font-size: 10px; fill: var(--soft) }
.grid { stroke: var(--rule) } .guide { stroke: var(--wrong); stroke-dasharray: 4 3 }
.line { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round }
.curves circle, .dot { fill: var(--accent) }
img { max-width: 100%; height: auto; display: block; border-radius: 3px }
.groups { display: grid; gap: 1.4rem 2rem; margin-top: .8rem }
.groups.small { grid-template-columns: repeat(auto-fill, minmax(min(29rem, 100%), 1fr)) }
.groups.medium { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
.groups.large { grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.group { display: flex; gap: .9rem; align-items: flex-start; break-inside: avoid }
.lead { flex: 0 0 24% } .strips { flex: 1; min-width: 0 }
.strip { display: grid; gap: .35rem; margin-bottom: .5rem } .strip > b { grid-column: 1 / -1; font-size: .8rem;
         font-weight: 500; color: var(--soft); line-height: 1.2 }
.cell figcaption { font-size: .75rem; line-height: 1.25; color: var(--soft); overflow-wrap: anywhere;
        margin-top: .15rem }
.cell img { width: 100% } .cell.right img, .cell.wrong img { border: 3px solid var(--right) }
.cell.wrong img { border-color: var(--wrong); border-style: dashed }
.cell.right figcaption, .cell.wrong figcaption { color: var(--right); font-size: .62rem; letter-spacing: -.01em }
.cell.wrong figcaption { color: var(--wrong) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .8rem; color: var(--soft); padding: 0;
          margin: .4rem 0; list-style: none }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .3rem;
            vertical-align: -.08rem; border: 1px solid var(--gray) }
.confusion td, .confusion th { padding: .18rem .4rem; text-align: center; border: 0; font-size: .8rem }
.confusion td { min-width: 2rem } .confusion th { font-weight: 500; color: var(--soft) }
.confusion th:first-child { text-align: right } .maps { display: grid; gap: 1.2rem; align-items: start;
        grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) } .numbers td { white-space: nowrap }
.plot { max-width: 24rem; margin: .6rem 0 1rem }
@media (max-width: 30rem) { body { padding-inline: .9rem } h1 { font-size: 1.5rem } th, td { padding-right: .7rem }
  .lead { flex-basis: 22% } .group { gap: .6rem } .numbers td { white-space: normal } }
@media print { html { font-size: 11px } body { padding: 0; max-width: none; font-size: 1rem }
  table.confusion { break-inside: avoid } .curves { grid-template-columns: repeat(3, 1fr) }
  .groups.small, .groups.medium { grid-template-columns: repeat(2, 1fr) } .groups.large { grid-template-columns:
  repeat(3, 1fr) } .bars { grid-template-columns: repeat(3, 1fr) } h2 { break-after: avoid } tr { break-inside: avoid }
  details:not([open]) { display: none } * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""
MOST_IN_A_ROW = 5  # pictures of a strip; more are put in two rows
_MARKS = {"right": "\u2713 ", "wrong": "\u2717 ", "": ""}


def page(title: str, body: Iterable[str]) -> str:
    """A whole document. title: plain text; body: HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} &middot; nearfar</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def write_page(target: Path, text: str) -> Path:
    """Replace a page in one move. Raises UserError where it cannot be written."""
    try:
        # a name from outside may hold halves of a surrogate pair, which UTF-8 has no bytes for
        files.write_bytes(target, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"The report {target} could not be written: {error.strerror or error}.") from None
    return target


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'


def soft(text: str) -> str:
    return f'<p class="soft">{html.escape(text)}</p>'


def text_table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns of text."""
    lines = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in rows)
    return f'<div class="scroll"><table class="text">{lines}</table></div>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def image(content: bytes, alt: str) -> str:
    """An <img> that holds its picture. Raises ValueError for what is neither PNG nor JPEG."""
    return f'<img alt="{html.escape(alt)}" src="{as_address(content)}">'


def as_address(content: bytes) -> str:
    """The address of a picture that is its own content. Raises ValueError for what is neither PNG nor JPEG."""
    return f"data:image/{kind_of(content)};base64,{base64.b64encode(content).decode('ascii')}"


def figure_section(figure: Figure) -> str:
    """A figure with its title, explanation and legend; where there is nothing to show, why."""
    if figure.missing:
        return section(figure.title, missing(figure.missing))
    names = "".join(f'<li><i style="background:{color}"></i>{html.escape(name)}</li>' for name, color in figure.legend)
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    groups = "".join(_group(group) for group in figure.groups)
    parts = [soft(figure.text), legend, f'<div class="groups {figure.size}">{groups}</div>' if groups else ""]
    if figure.points:
        parts.append(f'<div class="plot">{scatter(figure.points, *figure.axes)}</div>')
    if figure.table:
        heads, *rows = figure.table
        parts.append(number_table(heads, rows))
    return section(figure.title, "".join(parts))


def number_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, each line beginning with what it is of; where it is wider than the page, it scrolls alone."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _group(group: Group) -> str:
    lead = f'<div class="lead">{_cell(group.lead)}</div>' if group.lead else ""
    strips = "".join(_strip(label, cells) for label, cells in group.strips)
    return f'<div class="group">{lead}<div class="strips">{strips}</div></div>'


def _strip(label: str, cells: Sequence[Cell]) -> str:
    title = f"<b>{html.escape(label)}</b>" if label else ""
    in_a_row = len(cells) if len(cells) <= MOST_IN_A_ROW else -(-len(cells) // 2)
    columns = f"grid-template-columns:repeat({max(1, in_a_row)},minmax(0,1fr))"
    return f'<div class="strip" style="{columns}">{title}{"".join(map(_cell, cells))}</div>'


def _cell(cell: Cell) -> str:
    caption = f"<figcaption>{_MARKS[cell.mark]}{html.escape(cell.caption)}</figcaption>" if cell.caption else ""
    alt = f"{cell.alt}, {cell.mark}" if cell.mark else cell.alt
    return f'<figure class="cell {cell.mark}">{image(cell.image, alt)}{caption}</figure>'
