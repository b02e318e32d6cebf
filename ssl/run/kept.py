"""Checkpoints that outlive `train.keep_last`, and one of a run's by its step, as `best` or as the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError

BEST, NEWEST = "best", "newest"
SCORES = ("knn_top1", "val_top1")  # of the metrics: what `best` is about, in pretraining and in a supervised run


def spared(metrics: Path, step: int, every: int | None, best: bool) -> Callable[[int], bool]:
    """Is the checkpoint of a step to be kept, however many newer ones there are? A function of the run's files alone.

    Args:
        metrics: the run's metrics.jsonl.
        step: the newest checkpoint; later scores do not count yet.
        every: train.keep_every.
        best: train.keep_best.
    """
    scores = scores_by_step(metrics) if best else {}
    known = {at: score for at, score in scores.items() if at <= step}
    best_step = best_of(known)
    return lambda at: (every is not None and at % every == 0) or at == best_step


def scores_by_step(metrics: Path) -> dict[int, float]:
    """The scores of a run during training, by step."""
    return {int(line["step"]): line[key] for line in read_metrics(metrics) for key in SCORES if key in line}


def best_of(scores: dict[int, float]) -> int | None:
    """The step of the highest score, of equal ones the earliest; None without any."""
    return min(scores, key=lambda step: (-scores[step], step)) if scores else None


def is_best(metrics: Path, step: int) -> bool:
    """Has `step` just been scored higher than every step before it?"""
    return best_of({at: score for at, score in scores_by_step(metrics).items() if at <= step}) == step


def best_checkpoint(run: Path) -> Path | None:
    """Of a run's checkpoints with an online k-NN score, the one with the highest; None without any."""
    there = {checkpoint_names.step_of(path): path for path in checkpoint_names.finished(run / "checkpoints")}
    scores = scores_by_step(run / "metrics.jsonl")
    step = best_of({at: score for at, score in scores.items() if at in there})
    return None if step is None else there[step]


def checkpoint_of(run: Path, which: str = NEWEST) -> Path:
    """The folder of a run's checkpoint. which: its step, `best` (by the online k-NN score) or `newest`.

    Raises:
        UserError: naming the steps that there are.
    """
    if not run.is_dir():
        raise UserError(f"There is no run folder {run}.")
    found = checkpoint_names.finished(run / "checkpoints")
    steps = ", ".join(str(checkpoint_names.step_of(path)) for path in found)
    if not found:
        raise UserError(
            f"{run} has no checkpoints. To start from an exported backbone alone, without heads, set backbone.weights."
        )
    if which == NEWEST:
        return found[-1]
    if which == BEST:
        if (best := best_checkpoint(run)) is None:
            raise UserError(
                f"None of the checkpoints in {run} has an online k-NN score (it needs data.val with labels), so there "
                f"is no best one. There are those of steps {steps}."
            )
        return best
    chosen = next((path for path in found if which.isdecimal() and checkpoint_names.step_of(path) == int(which)), None)
    if chosen is None:
        raise UserError(
            f"{run} has no checkpoint of step {which}. There are those of steps {steps} (train.keep_every and "
            "train.keep_best keep more)."
        )
    return chosen


def named(text: str) -> Path:
    """The checkpoint's folder that is meant by RUN, RUN@STEP, RUN@best or the path of a checkpoint's folder.

    Raises:
        UserError: as `checkpoint_of`.
    """
    path, (run, sign, which) = Path(text).expanduser(), text.rpartition("@")
    if checkpoint_names.step_of(path) is not None and path.is_dir():
        return path
    if not sign or path.is_dir():  # a folder may have an @ in its name
        return checkpoint_of(path)
    return checkpoint_of(Path(run).expanduser(), which)
