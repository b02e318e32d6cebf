"""What perturbed images cost, and what patch tokens tell of their place: two sections of a run's page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from nearfar.eval.pages.page import number_table, section, soft
from nearfar.eval.pages.verdict import chance_difference
from nearfar.eval.results import CLEAN, SUBJECTS, Score, signed

Table = Mapping[str, Mapping[str, Score]]  # of one pair of data sets: {subject: {task: score}}
_ORDER = (
    "A large drop under shuffled patches says that the features go by where things are, a small one that they go by "
    "what is there."
)


def robustness_section(table: Table) -> str:
    """Top-1 of every perturbation beside clean images; nothing where it is not scored.

    table: of `nearfar.eval.results.tables`.
    """
    columns = {
        subject: rows for subject, scores in table.items() if (rows := top1_and_change(scores.get("robustness")))
    }
    if not columns:
        return ""
    first, costs = next(iter(columns.items()))
    score = table[first]["robustness"]
    clean = costs[CLEAN][0]
    worst = min((name for name in costs if name != CLEAN), key=lambda name: costs[name][1], default=CLEAN)
    noise = chance_difference([clean, clean], [score.val.images] * 2)
    text = (
        "Top-1 of k-NN under each perturbation of the test images, with the change from clean ones in points; the "
        "neighbors are clean training images, so nothing has learned from perturbed ones. "
    )
    if costs[worst][1] < 0:
        text += (
            f"The largest loss of the {SUBJECTS[first]} features: {worst}, {signed(costs[worst][1])} points of "
            f"{clean:.1f} %. Changes up to {noise:.1f} points are within the noise of {score.val.images:,} images. "
        )
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    cells = [[name, *(_cell(rows.get(name), name) for rows in columns.values())] for name in names]
    shown = number_table(["test images", *(SUBJECTS[subject] for subject in columns)], cells)
    return section("Robustness", soft(text + _ORDER) + shown + _left_out(score))


def position_section(table: Table) -> str:
    """R2 of a linear map from a patch token to its row and column; nothing where it is not scored."""
    found = {subject: sides for subject, scores in table.items() if (sides := row_and_column(scores.get("position")))}
    if not found:
        return ""
    text = (
        "R2 of a linear map from a patch token to its row and its column, on test images: 1 = the place can be read "
        "off the token, 0 = no better than guessing the middle. Photographs have a sky and a ground, so even raw "
        "pixels tell something of their row; what training adds is the difference from the other lines."
    )
    if "trained" in found and len(found) > 1:
        mine = sum(found["trained"]) / 2
        gaps = [
            f"{signed(mine - sum(s) / 2, 2)} from {SUBJECTS[name]}" for name, s in found.items() if name != "trained"
        ]
        text += f" Here, in the mean of both: {', '.join(gaps)}."
    rows = [[SUBJECTS[name], *(f"{side:.3f}" for side in sides)] for name, sides in found.items()]
    return section("Position", soft(text) + number_table(["patch tokens", "row", "column"], rows))


def top1_and_change(score: Score | None) -> dict[str, tuple[float, float]]:
    """{perturbation: (top-1, change from clean images)} in percent and points, "clean" first; {} where there is none.

    What is no number in results.json is passed over.
    """
    table = _mapping(_mapping(score.detail if score else None).get("table"))
    rows = {
        name: (float(row["top1"]), -float(row["drop"]))
        for name, row in table.items()
        if isinstance(row, dict) and _number(row.get("top1")) and _number(row.get("drop"))
    }
    return {CLEAN: rows[CLEAN], **rows} if CLEAN in rows else {}


def row_and_column(score: Score | None) -> tuple[float, float] | None:
    """R2 of a patch token's row and of its column; None where it is not scored."""
    detail = _mapping(score.detail if score else None)
    row, column = detail.get("row"), detail.get("column")
    return (float(row), float(column)) if _number(row) and _number(column) else None


def _left_out(score: Score) -> str:
    reasons = _mapping(_mapping(score.detail).get("left_out"))
    lines = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in reasons.items())
    return (
        f'<p class="soft">Left out, since this network does not allow it:</p><ul class="soft">{lines}</ul>'
        if lines
        else ""
    )


def _cell(row: Sequence[float] | None, name: str) -> str:
    if row is None:
        return "\u2013"
    return f"{row[0]:.1f}" if name == CLEAN else f"{row[0]:.1f} ({signed(row[1])})"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
