"""Scores on the console: one table of all, a table for what has more to tell than a number, and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from nearfar.eval import results
from nearfar.eval.results import CLEAN, SUBJECTS, TITLES, Score, signed


def score_table(found: Iterable[Score]) -> Table:
    """Scores of one pair of data sets in percent, a row for each kind of features; only what was scored."""
    by_subject: Mapping[str, Mapping[str, Score]] = next(results.tables(found), {})
    tasks = [task for task in TITLES if any(task in scores for scores in by_subject.values())]
    shown = Table(title="Frozen features, percent")
    shown.add_column("")
    for task in tasks:
        shown.add_column(TITLES[task], justify="right")
    for subject, scores in by_subject.items():
        cells = [f"{scores[task].percent:.1f}" if task in scores else "-" for task in tasks]
        shown.add_row(SUBJECTS[subject], *cells)
    return shown


def detail_tables(found: Iterable[Score]) -> Iterator[Table]:
    """Few-shot scores with their spread, what each perturbation costs, and positions along both sides."""
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for score in found:
        if score.detail:
            by_task.setdefault(score.task, {})[SUBJECTS[score.subject]] = score.detail
    for task, rows in (("fewshot", _few), ("robustness", _perturbed), ("position", _placed)):
        if task in by_task:
            title, cells = rows(by_task[task])
            yield _table(title, cells)


def _table(title: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """columns: {heading: {row: cell}}."""
    shown = Table(title=title)
    shown.add_column("")
    for heading in columns:
        shown.add_column(heading, justify="right")
    for row in dict.fromkeys(row for cells in columns.values() for row in cells):
        shown.add_row(row, *(cells.get(row, "-") for cells in columns.values()))
    return shown


def _few(details: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, dict[str, str]]]:
    columns: dict[str, dict[str, str]] = {}
    for subject, detail in details.items():
        named = {f"{shot} a class": found for shot, found in detail["shots"].items()}
        named |= {f"{share} % of labels": found for share, found in detail["percent_of_labels"].items()}
        columns[subject] = {
            name: f"{found['mean']:.1f}" + (f" ± {found['std']:.1f}" if found["std"] is not None else "")
            for name, found in named.items()
        }
    return "Few labels: top-1, mean and deviation over draws", columns


def _perturbed(details: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, dict[str, str]]]:
    columns: dict[str, dict[str, str]] = {}
    for subject, detail in details.items():
        columns[subject] = {
            name: f"{row['top1']:.1f}" + (f" ({signed(-row['drop'])})" if name != CLEAN else "")
            for name, row in detail["table"].items()
        }
    return "Robustness: k-NN top-1 of perturbed test images (change from clean ones)", columns


def _placed(details: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, dict[str, str]]]:
    columns = {
        subject: {side: f"{detail[side]:.3f}" for side in ("row", "column")} for subject, detail in details.items()
    }
    return "Position in patch tokens: R2 of a linear map (1 = all of it, 0 = none)", columns


def remarks(found: Iterable[Score]) -> Iterable[str]:
    """Images that are not in the scores, and masks of another size: a line for each data set."""
    notes: dict[str, None] = {}
    for score in found:
        origin = (score.detail or {}).get("features", {})
        for split, data in (("train", score.train), ("test", score.val)):
            if (bad := origin.get("unreadable", {}).get(split)) and bad["count"]:
                notes[f"{bad['count']} of {data.images} images in {data.path} are left out: {bad['first']}"] = None
            if resized := (origin.get("rescaled_masks") or {}).get(split):
                notes[
                    f"{resized['count']} masks of {data.path} are not of their image's size and were scored at their "
                    f"own, the first: {resized['first']}"
                ] = None
    return notes
