"""Several runs side by side: their outcomes, and the settings in which they differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nearfar.eval import results
from nearfar.eval.results import TITLES, Score
from nearfar.eval.run_files import flat, read_numbers, read_settings
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.wording import listed

ONLINE = "* online, during training: fewer images, so not to be compared with the others"
_ONLINE_TASK = {"knn": "knn_top1"}
# Settings that change no result are not shown, except for the images on which a run was trained and scored.
_NOT_COMPARED = {"name", "folder"} | {s.key for s in all_settings() if s.free} - {"data.path", "data.val"}
_AMBIGUOUS = {"name", "path", "val", "size"}
_LEAST_SETTINGS = 24  # columns of a terminal in which settings can be read
_MOST_SETTINGS = 8  # of unlike runs: more would fill the terminal, and the page has room


DataPair = tuple[str, str]  # what was learned from and what was scored: `Score.data`
Scores = dict[str, dict[DataPair, Score]]  # of each task, the newest last


class Row(NamedTuple):
    """One run: its scores in percent, those measured during training, last loss, steps, settings as text, and the
    entries of results.json that the scores are from."""

    run: Path
    scores: dict[str, float]
    online: set[str]
    loss: float | None
    step: int | None
    settings: dict[str, str]
    entries: dict[str, Score]

    def score(self, task: str) -> str:
        if task not in self.scores:
            return ""
        return f"{self.scores[task]:.1f}{'*' if task in self.online else ''}"

    @property
    def outcome(self) -> list[str]:
        """Loss and steps as text."""
        return ["" if self.loss is None else f"{self.loss:.4f}", "" if self.step is None else f"{self.step:,}"]


class Comparison(NamedTuple):
    """tasks: those that any run has a score of. keys: the settings that differ, with the short name of each."""

    tasks: list[str]
    keys: dict[str, str]
    rows: list[Row]
    notes: list[str]

    def best(self, task: str) -> float | None:
        """The best of a column as it is shown; online scores count only where there are no others."""
        found = [round(row.scores[task], 1) for row in self.rows if task in row.scores and task not in row.online]
        found = found or [round(row.scores[task], 1) for row in self.rows if task in row.scores]
        return max(found, default=None)

    def is_best(self, row: Row, task: str) -> bool:
        several = len(self.rows) > 1 and comparable(self.rows, task)
        return several and task in row.scores and round(row.scores[task], 1) == self.best(task)


def comparable(rows: Iterable[Row], task: str) -> bool:
    """Are all scores of a task of the same images?"""
    return len({row.entries[task].data for row in rows if task in row.entries}) <= 1


def runs_in(folder: Path) -> list[Path]:
    """The runs directly inside a folder, in the order of their names."""
    try:
        return sorted(file.parent for file in folder.glob("*/config.yaml"))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from None


def compare(runs: Sequence[Path]) -> Comparison:
    """The outcome of each run, and the settings in which the runs differ.

    Each task's scores are those on the images that most runs were scored on, elsewhere the newest of `results.json`;
    without any the last online k-NN. What a run does not have is left out; a file that cannot be read is named in
    `notes`, and its run keeps what the other files say.
    """
    notes: list[str] = []
    settings = [_settings(run, notes) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for tree in settings for key in tree)
        if key not in _NOT_COMPARED and len({json.dumps(tree.get(key), default=str) for tree in settings}) > 1
    ]
    held = [_scores(run, notes) for run in runs]
    shared = _shared_data(held)
    rows = [
        _row(run, {key: tree[key] for key in keys if key in tree}, _chosen(scores, shared), notes)
        for run, tree, scores in zip(runs, settings, held, strict=True)
    ]
    tasks = [task for task in TITLES if any(task in row.scores for row in rows)]
    if any(row.online for row in rows):
        notes.append(ONLINE)
    if apart := [TITLES[task] for task in tasks if not comparable(rows, task)]:
        notes.append(f"Not all runs were scored on the same images: {listed(apart)} cannot be compared.")
    return Comparison(tasks, _short(keys), rows, notes)


def comparison_table(found: Comparison, console: Console) -> Group:
    """A comparison for a terminal: scores first; settings in columns of their own where these fit, else in one, and
    where the scores do not fit, in several tables below each other."""
    wide = _table(found, columns=True)
    unbounded = console.options.update(width=10_000)
    if Measurement.get(console, unbounded, wide).maximum <= console.width:
        return Group(wide)
    tables, tasks = [], list(found.tasks)
    scores_in = console.width - (_LEAST_SETTINGS if found.keys else 0)

    def fits(count: int) -> bool:
        part = _table(found._replace(tasks=tasks[:count], keys={}), columns=False)
        return Measurement.get(console, unbounded, part).minimum <= scores_in

    while tasks:
        count = next((count for count in range(len(tasks), 1, -1) if fits(count)), 1)
        if count == len(tasks):
            break  # the last go with the settings
        tables.append(_table(found._replace(tasks=tasks[:count], keys={}), columns=False, outcome=False))
        tasks = tasks[count:]
    return Group(*tables, _table(found._replace(tasks=tasks), columns=False))


def _table(found: Comparison, columns: bool, outcome: bool = True) -> Table:
    """columns: a setting each. outcome: with loss and step."""
    shown = Table()
    shown.add_column("run", overflow="fold", min_width=8)
    for task in found.tasks:
        shown.add_column(TITLES[task].replace(" ", "\n", 1), justify="right", no_wrap=True)
    if outcome:
        shown.add_column("loss", justify="right", no_wrap=True)
        shown.add_column("step", justify="right", no_wrap=True)
    if columns:
        for short in found.keys.values():
            shown.add_column(Text(short), justify="right", overflow="fold")
    elif found.keys:
        more = "" if len(found.keys) <= _MOST_SETTINGS else f", {_MOST_SETTINGS} of {len(found.keys)}: all on the page"
        shown.add_column("settings that differ" + more, overflow="fold", ratio=1)
    for row in found.rows:
        cells = [Text(_printable(row.run.name))]
        cells += [Text(row.score(task), style="bold" if found.is_best(row, task) else "") for task in found.tasks]
        cells += [Text(text) for text in row.outcome if outcome]
        if columns:
            cells += [Text(_printable(row.settings.get(key, ""))) for key in found.keys]
        elif found.keys:
            first = [(key, short) for key, short in found.keys.items() if key in row.settings][:_MOST_SETTINGS]
            cells.append(Text(_printable(" ".join(f"{short}={row.settings[key]}" for key, short in first))))
        shown.add_row(*cells)
    return shown


def _settings(run: Path, notes: list[str]) -> dict[str, object]:
    """Flat settings. Data inside the run's own folder, as the demo draws it, is named relative to that folder."""
    try:
        settings = flat(read_settings(run))
    except UserError as error:
        notes.append(str(error))
        return {}
    own = f"{settings.get('folder')}/{settings.get('name')}/"
    for key in ("data.path", "data.val"):
        if isinstance(value := settings.get(key), str) and value.startswith(own):
            settings[key] = f"RUN/{value.removeprefix(own)}"
    return settings


def _scores(run: Path, notes: list[str]) -> Scores:
    """The scores of the trained features in results.json."""
    found: Scores = {}
    try:
        tables = list(results.tables(results.read(run / "results.json")))
    except UserError as error:
        notes.append(str(error))
        return {}
    for by_subject in reversed(tables):  # `tables` has the last first
        for task, score in by_subject.get("trained", {}).items():
            found.setdefault(task, {})[score.data] = score
    return found


def _shared_data(held: Sequence[Scores]) -> dict[str, DataPair]:
    """For each task the images that most runs were scored on; of several such, the newest of the last run."""
    shared = {}
    for task in TITLES:
        counts = Counter(data for scores in reversed(held) for data in reversed(scores.get(task, {})))
        if counts:
            shared[task] = counts.most_common(1)[0][0]
    return shared


def _chosen(scores: Scores, shared: Mapping[str, DataPair]) -> dict[str, Score]:
    """One score a task."""
    return {task: by_data.get(shared[task]) or list(by_data.values())[-1] for task, by_data in scores.items()}


def _row(run: Path, settings: dict[str, object], chosen: Mapping[str, Score], notes: list[str]) -> Row:
    scores: dict[str, float] = {}
    last: dict[str, float] = {}
    try:
        metrics = read_numbers(run / "metrics.jsonl")
        for line in metrics:
            scores |= {task: line[key] for task, key in _ONLINE_TASK.items() if key in line}
        last = next((line for line in reversed(metrics) if "loss" in line), {})
    except UserError as error:
        notes.append(str(error))
    online = set(scores) - set(chosen)
    scores |= {task: score.percent for task, score in chosen.items()}
    text = {key: _text(value) for key, value in settings.items() if value is not None}
    step = int(last["step"]) if last else None
    return Row(run, scores, online, last.get("loss"), step, text, dict(chosen))


def _text(value: object) -> str:
    """A setting's value as it may be typed, a number rounded."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key where that is unambiguous: `lr` for optim.lr, but not `name` for backbone.name."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 and end not in _AMBIGUOUS else key for key in keys}


def _printable(text: str) -> str:
    """Without characters that a terminal would obey, such as an escape sequence in a folder's name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
