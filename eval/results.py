"""results.json: one entry for each (weights, data sets, reading, task). An entry is written when its score is there,
and nothing erases another.

    {"format": "nearfar results 2", "scores": [{"subject": "trained", "task": "knn", "percent": 64.6, ...}, ...]}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nearfar.ssl.disk import bounded_files, file_lock, files
from nearfar.ssl.errors import UserError

FORMAT = "nearfar results 2"
MOST_BYTES = 64 * 2**20
TITLES = {
    "knn": "k-NN top-1",
    "whitened": "whitened k-NN top-1",
    "linear": "linear top-1",
    "logistic": "logistic top-1",
    "fewshot": "few-shot top-1",
    "segment": "mIoU",
    "retrieval": "retrieval mIoU",
    "robustness": "patch-shuffled k-NN",
    "position": "position R2",
    "finetune": "fine-tuned top-1",
}
"""What each task's score is called, everywhere; the order is that of every table. All are percentages."""
TASKS = tuple(task for task in TITLES if task != "finetune")
"""Those that `nearfar eval` scores; a classifier's own score is written by `nearfar finetune`."""
HEADLINES = ("knn", "linear", "segment")
"""The tasks that say whether training helped, the first that there is deciding."""
CLEAN = "clean"
"""The name of images that are not perturbed, in a robustness score."""
SUBJECTS = {"trained": "trained", "start": "starting weights", "untrained": "untrained", "pixels": "raw pixels"}
"""Whose features are scored, in the order of every table."""


@dataclass(frozen=True)
class DataName:
    """Which images: where they were found, how many, and the fingerprint of their source."""

    path: str
    fingerprint: str
    images: int


@dataclass(frozen=True)
class Score:
    """One entry. weights: what made the features. reading: everything else that decides the score. step: of the
    training, where known. detail: what the evaluator says besides."""

    subject: str
    task: str
    percent: float
    weights: str
    train: DataName
    val: DataName
    reading: dict[str, Any]
    step: int | None = None
    detail: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Equal for two scores of the same thing, wherever the data was stored."""
        parts = [self.subject, self.task, self.weights, self.train.fingerprint, self.val.fingerprint, self.reading]
        return json.dumps(parts, sort_keys=True)

    @property
    def data(self) -> tuple[str, str]:
        """Equal for scores that may stand in one table."""
        return self.train.fingerprint, self.val.fingerprint


def read(file: Path) -> list[Score]:
    """The entries of a results.json in the order in which they were written; [] where there is no such file.

    Raises UserError for anything else than what `add` writes, naming what is wrong.
    """
    if not file.exists():
        return []
    try:
        content = bounded_files.read_format(file, MOST_BYTES, FORMAT)
        return [_score(entry, number) for number, entry in enumerate(content["scores"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{file} does not hold results ({why}); move it away and evaluate again.") from None


def add(file: Path, score: Score) -> list[Score]:
    """Put a score into results.json in place of an equal one (by `key`), keeping all others; all entries.

    The file is replaced atomically, under a lock, so that two evaluations at once lose nothing. Raises UserError for a
    file that is not such JSON, or where it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.parent):
            scores = [*(old for old in read(file) if old.key != score.key), score]
            content = {"format": FORMAT, "scores": [asdict(each) for each in scores]}
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            if len(text) > MOST_BYTES:
                raise UserError(f"{file} has grown too long to be read again; move it away and evaluate again.")
            files.write_text(file, text)
    except OSError as error:
        raise UserError(unwritable(file, error)) from None
    return scores


def check_results_writable(file: Path) -> None:
    """Raises UserError where `add` would fail, before hours of computing find out."""
    read(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.check_writable(file)
    except OSError as error:
        raise UserError(unwritable(file, error)) from None


def unwritable(file: Path, error: OSError) -> str:
    return (
        f"The scores cannot be written to {file}: {error.strerror or error}. Name another file with --out, in a folder "
        "that you may write to."
    )


def signed(change: float, digits: int = 1) -> str:
    """`+1.5`, `-0.3`; what rounds to zero is `+0.0`."""
    return f"{round(change, digits) + 0.0:+.{digits}f}"


def tables(scores: Iterable[Score]) -> Iterator[dict[str, dict[str, Score]]]:
    """What belongs side by side: for each pair of data sets, the last added first, {subject: {task: score}}.

    Of several scores of one subject and task, that of the most training counts, and among these the last.
    """
    by_data: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        by_data[score.data] = [*by_data.pop(score.data, []), score]  # popped: the last added moves to the end
    for group in reversed(list(by_data.values())):
        found: dict[str, dict[str, Score]] = {}
        for score in sorted(group, key=lambda each: -1 if each.step is None else each.step):
            found.setdefault(score.subject, {})[score.task] = score
        yield {
            subject: {task: found[subject][task] for task in TITLES if task in found[subject]}
            for subject in SUBJECTS
            if subject in found
        }


def _score(entry: Any, number: int) -> Score:
    """An entry of the file, checked: a file may come from anywhere."""
    try:
        names = {key: DataName(**entry[key]) for key in ("train", "val")}
        score = Score(**{**entry, **names})
    except (TypeError, KeyError) as error:
        raise ValueError(f"score {number}: {error}") from None
    percent, step = score.percent, score.step
    right = (
        score.subject in SUBJECTS
        and score.task in TITLES
        and isinstance(percent, int | float)
        and not isinstance(percent, bool)
        and math.isfinite(percent)
        and (step is None or (isinstance(step, int) and not isinstance(step, bool)))
        and isinstance(score.weights, str)
        and isinstance(score.reading, dict)
        and isinstance(score.detail, dict | None)
        and all(
            isinstance(name.path, str) and isinstance(name.fingerprint, str) and isinstance(name.images, int)
            for name in names.values()
        )
    )
    if not right:
        raise ValueError(f"score {number} is not what an evaluation writes")
    return score


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other evaluation writes into the folder meanwhile, where its file system has locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            file_lock.acquire(handle, wait=True)
        yield
    finally:
        os.close(handle)
