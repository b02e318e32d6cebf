"""What runs have scored, those that differ only in their seed together: tables of text, for a page or a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nearfar.eval.pages.compare import Comparison
from nearfar.eval.pages.robustness_page import row_and_column, top1_and_change
from nearfar.eval.pages.seeds import Mean, SeedGroup, by_seed, is_best_group
from nearfar.eval.results import CLEAN, TITLES, signed

_MISSING = "\u2013"
_OVER_SEEDS = "mean and standard deviation over runs that differ only in their seed."


class SeedTable(NamedTuple):
    """heads: one for each column. rows: what each is of, then its cells. best: (row, column) of the best cells."""

    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


class _Column(NamedTuple):
    """One group of seeds. runs: those that are scored. cells: by the heading of their row."""

    name: str
    runs: int
    cells: dict[str, str]


def score_table(found: Comparison) -> SeedTable:
    """A row for each group of seeds, a column for each task, and how many runs there are."""
    groups = by_seed(found)
    rows, best = [], set()
    for at, group in enumerate(groups):
        cells = [group.scores[task].text() if task in group.scores else _MISSING for task in found.tasks]
        rows.append([group.name, *cells, str(len(group.rows))])
        best |= {(at, 1 + column) for column, task in enumerate(found.tasks) if is_best_group(group, groups, task)}
    heads = ["", *(TITLES[task] for task in found.tasks), "runs"]
    return SeedTable("Over seeds", f"Percent; {_OVER_SEEDS}", heads, rows, frozenset(best))


def detail_tables(groups: Sequence[SeedGroup]) -> list[SeedTable]:
    """Robustness under each perturbation, and R2 of position by row and column: a column for each group of seeds that
    is scored so; no table where none is."""
    robustness = _table(
        "Robustness",
        "Top-1 of k-NN under each perturbation of the test images in percent, and the change from clean ones in "
        f"points, taken run by run; {_OVER_SEEDS}",
        "test images",
        [_robustness(group) for group in groups],
    )
    position = _table(
        "Position",
        f"R2 of a linear map from a patch token to its row and to its column, on test images; {_OVER_SEEDS}",
        "patch tokens",
        [_position(group) for group in groups],
    )
    return [*robustness, *position]


def _robustness(group: SeedGroup) -> _Column:
    runs = [found for row in group.rows if (found := top1_and_change(row.entries.get("robustness")))]
    cells = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        top1, change = (Mean.of(values) for values in zip(*(run[name] for run in runs if name in run), strict=True))
        cells[name] = top1.text() + ("" if name == CLEAN else f" ({signed(change.mean)}{change.spread()})")
    return _Column(group.name, len(runs), cells)


def _position(group: SeedGroup) -> _Column:
    runs = [found for row in group.rows if (found := row_and_column(row.entries.get("position")))]
    sides = zip(("row", "column"), zip(*runs, strict=True), strict=False)  # no values where no run is scored
    return _Column(group.name, len(runs), {side: Mean.of(values).text(3) for side, values in sides})


def _table(title: str, note: str, first_head: str, columns: Sequence[_Column]) -> list[SeedTable]:
    """One table of the columns that hold anything; [] where none does."""
    scored = [column for column in columns if column.runs]
    if not scored:
        return []
    rows = [
        [name, *(column.cells.get(name, _MISSING) for column in scored)]
        for name in dict.fromkeys(name for column in scored for name in column.cells)
    ]
    rows.append(["runs", *(str(column.runs) for column in scored)])
    return [SeedTable(title, note, [first_head, *(column.name for column in scored)], rows)]
