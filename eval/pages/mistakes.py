"""What the nearest neighbors take for what: a confusion matrix and the most frequent mistakes, for the report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from nearfar.eval.pages.page import folded, missing, section, soft
from nearfar.eval.results import Score

_OF_MASKS = {"segment", "retrieval"}
_MOST_CLASSES = 25  # a larger table cannot be read


def confusion_section(table: Mapping[str, Mapping[str, Score]]) -> str:
    """Of the k-NN of the trained features; says so where there is none. Nothing where masks alone were scored, whose
    images may have no labels."""
    scored = table.get("trained", {})
    score = scored.get("knn")
    if scored and set(scored) <= _OF_MASKS:
        return ""
    detail = (score.detail or {}) if score else {}
    counts, worst = _counts(detail.get("confusion")), _worst(detail.get("most_confused"))
    parts = []
    if counts and len(counts) <= _MOST_CLASSES:
        names = detail.get("classes")
        known = isinstance(names, list) and len(names) >= len(counts)
        parts.append(
            soft("k-NN of the trained features: rows are true classes, columns answers, in percent of the row.")
        )
        parts.append(
            _matrix(counts, [str(name) for name in names or []] if known else [str(i) for i in range(len(counts))])
        )
    if worst:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in worst)
        parts.append(f"<ol>{lines}</ol>" if not counts else folded("The most frequent mistakes", f"<ol>{lines}</ol>"))
    return section("Confusion", "".join(parts) or missing("The k-NN of the trained features is not scored yet."))


def confusion_matrix(value: Any, names: Sequence[Any]) -> str:
    """The table of a results.json as HTML, if it is one and can be read by people; else nothing."""
    counts = _counts(value)
    if not counts or len(counts) > _MOST_CLASSES or len(names) < len(counts):
        return ""
    return _matrix(counts, [str(name) for name in names])


def _matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    rows = []
    for name, row in zip(names, counts, strict=False):
        total = max(1, sum(row))
        cells = "".join(_cell(100 * n / total, name == other) for n, other in zip(row, names, strict=False))
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names[: len(counts)])
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(percent: float, right: bool) -> str:
    color = "var(--right)" if right else "var(--wrong)"
    shade = f"color-mix(in srgb,{color} {min(75, round(percent)):d}%,transparent)"
    text = f"{percent:.0f}" if percent >= 0.5 else ""
    return f'<td style="background:{shade}">{text}</td>'


def _counts(value: Any) -> list[list[int]] | None:
    """The table of a results.json, if it is one: square, of whole numbers."""
    if not isinstance(value, list) or not value:
        return None
    square = all(
        isinstance(row, list) and len(row) == len(value) and all(isinstance(n, int) and n >= 0 for n in row)
        for row in value
    )
    return value if square else None


def _worst(value: Any) -> list[str]:
    if not isinstance(value, list):
        return []
    return [
        f"{each.get('class')} taken for {each.get('taken_for')}: {each.get('images')} images"
        for each in value
        if isinstance(each, dict)
    ]
