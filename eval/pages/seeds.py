"""Runs that differ only in their seed as one group, its scores with mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from nearfar.eval.pages.compare import Comparison, Row, comparable

SEED = "train.seed"


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1) over runs; no deviation for one run. online: measured during training."""

    mean: float
    deviation: float | None
    online: bool = False

    @classmethod
    def of(cls, values: Sequence[float], online: bool = False) -> Mean:
        """Raises statistics.StatisticsError without any value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, online)

    def text(self, digits: int = 1) -> str:
        """`62.2 \u00b1 2.0`, with `*` behind what was measured online."""
        return f"{self.mean:.{digits}f}{self.spread(digits)}{'*' * self.online}"

    def spread(self, digits: int = 1) -> str:
        """` \u00b1 2.0`, or nothing for one run."""
        return "" if self.deviation is None else f" \u00b1 {self.deviation:.{digits}f}"


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
            means[task] = Mean.of(values, online=not offline)
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
