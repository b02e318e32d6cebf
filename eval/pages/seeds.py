"""Runs that differ only in their seed, as one row with mean and spread; and that table for a paper."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from nearfar.eval.pages.compare import Comparison, Row, comparable
from nearfar.eval.results import TITLES

SEED = "train.seed"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1) over runs; no deviation for one run. online: measured during training."""

    mean: float
    deviation: float | None
    online: bool = False

    def text(self, plus_minus: str = "\u00b1") -> str:
        spread = "" if self.deviation is None else f" {plus_minus} {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}{'*' * self.online}"


class SeedGroup(NamedTuple):
    """Runs of equal settings but for the seed. scores: by task, of the runs that have it, if all have it alike."""

    name: str
    rows: list[Row]
    scores: dict[str, Mean]


def by_seed(found: Comparison) -> list[SeedGroup]:
    """The runs of a comparison, those that differ only in `train.seed` together, in the order of their first.

    A score measured online, during training, is left out where a run of the group has another.
    """
    keys = [key for key in found.keys if key != SEED]
    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for row in found.rows:
        groups.setdefault(tuple(row.settings.get(key) for key in keys), []).append(row)
    return [SeedGroup(_name(rows), rows, _means(rows, found.tasks)) for rows in groups.values()]


def repeated_seeds(groups: Sequence[SeedGroup]) -> list[str]:
    """A note for each group of which several runs have one seed: these are no independent runs."""
    return [
        f"Runs of {group.name} share a seed: their spread says less than that of different seeds."
        for group in groups
        if len({row.settings.get(SEED) for row in group.rows}) < len(group.rows)
    ]


def _means(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, Mean]:
    means = {}
    for task in tasks:
        offline = [row.scores[task] for row in rows if task in row.scores and task not in row.online]
        values = offline or [row.scores[task] for row in rows if task in row.scores]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            means[task] = Mean(statistics.fmean(values), deviation, online=not offline)
    return means


def _name(rows: Sequence[Row]) -> str:
    names = [row.run.resolve().name for row in rows]
    if len(names) == 1:
        return names[0]
    length = next(
        (at for at, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), min(map(len, names))
    )
    common = names[0][:length].rstrip("-_. 0123456789").removesuffix("seed").rstrip("-_. ")
    return common or names[0]


def is_best_group(group: SeedGroup, groups: Sequence[SeedGroup], task: str) -> bool:
    """Has a group the best mean of a column, as it is shown? Online scores count only where there are no others."""
    if not comparable((row for each in groups for row in each.rows), task):
        return False
    means = [each.scores[task] for each in groups if task in each.scores]
    counted = [mean for mean in means if not mean.online] or means
    own = group.scores.get(task)
    return own in counted and len(means) > 1 and round(own.mean, 1) == max(round(mean.mean, 1) for mean in counted)


def _cells(group: SeedGroup, tasks: Sequence[str], plus_minus: str, missing: str) -> list[str]:
    return [group.scores[task].text(plus_minus) if task in group.scores else missing for task in tasks]


def markdown(found: Comparison) -> str:
    """The comparison as a Markdown table, best means bold, with what it is made of below."""
    groups, tasks = by_seed(found), found.tasks
    lines = ["| | " + " | ".join([*(TITLES[task] for task in tasks), "runs"]) + " |", "|---" * (len(tasks) + 2) + "|"]
    for group in groups:
        cells = [
            f"**{cell}**" if is_best_group(group, groups, task) else cell
            for task, cell in zip(tasks, _cells(group, tasks, "\u00b1", "\u2013"), strict=True)
        ]
        name = group.name.replace("|", "\\|")
        lines.append("| " + " | ".join([name, *cells, str(len(group.rows))]) + " |")
    return "\n".join([*lines, "", _caption(found)])


def latex(found: Comparison) -> str:
    """The comparison as a LaTeX tabular (package booktabs), best means bold."""
    groups, tasks = by_seed(found), found.tasks
    heads = " & ".join(["", *(_escaped(TITLES[task]) for task in tasks), "runs"])
    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'c' * len(tasks)}r}}", r"\toprule", rf"{heads} \\"]
    lines.append(r"\midrule")
    for group in groups:
        cells = []
        for task, cell in zip(tasks, _cells(group, tasks, r"$\pm$", "--"), strict=True):
            cells.append(rf"\textbf{{{cell}}}" if is_best_group(group, groups, task) else cell)
        lines.append(" & ".join([_escaped(group.name), *cells, str(len(group.rows))]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {_caption(found)}"])


def _caption(found: Comparison) -> str:
    notes = " ".join(" ".join(note.split()) for note in [*found.notes, *repeated_seeds(by_seed(found))])
    said = "Percent; mean and standard deviation over runs that differ only in their seed."
    return f"{said} {notes}".strip()


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
