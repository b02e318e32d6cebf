"""The report of a run with its pictures: neighbors, masks, attention and tokens, drawn where they are due."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.eval import results
from nearfar.eval.pages.classification_report import write_classification_report
from nearfar.eval.pages.report import write_report
from nearfar.eval.pictures import figures
from nearfar.ssl import checkpoint
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from nearfar.launch.scoring.score import Subject


def report_run(run: Path, subject: Subject | None = None, say: Callable[[str], object] = print) -> Path:
    """Draw the figures that are not there or older than the weights, write report.html, and return its path.

    subject: the run's weights, where they are loaded already. say: is told that pictures are drawn, which takes up to a
    minute. What cannot be drawn is named on the page, and why.

    Raises:
        UserError: as `write_report`.
    """
    if not run.is_dir():
        return write_report(run)
    reason, about = "", dict[str, Any]()
    if (classifier := run / checkpoint.CLASSIFIER).is_file():
        with suppress(UserError):  # damaged: the page says that its weights have not been read
            about = checkpoint.about(classifier)
        return write_classification_report(run, about)
    try:
        weights = checkpoint.weights_file(run)
        about = checkpoint.about(weights)
        if _due(run, weights):
            from nearfar.launch.scoring.figures import draw_figures

            say(f"Drawing the pictures of {run / 'report.html'} ...")
            (run / figures.FILE).unlink(missing_ok=True)  # of older weights
            figures.write(run / figures.FILE, draw_figures(run, subject))
    except (UserError, OSError) as error:
        reason = str(error)
    return write_report(run, reason, about)


def _due(run: Path, weights: Path) -> bool:
    """Are figures missing, unreadable or older than the weights, or do they not show the last segmentation score?"""
    file = run / figures.FILE
    if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
        return True
    try:
        shown = {figure.of for figure in figures.read(file)}
    except UserError:  # drawn by another version, or damaged
        return True
    kept = results.read(run / "results.json")
    scored = [score for score in kept if score.subject == "trained" and score.task == "segment"]
    return bool(scored) and scored[-1].key not in shown
