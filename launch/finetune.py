"""One supervised run from the command line: the loop of `nearfar.ssl.train` with signals, scores and a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.classification import Predictions, accuracies, detail, predictions_of
from nearfar.eval.features.extraction import digest
from nearfar.eval.features.images import Decoding
from nearfar.eval.pages.classification_report import write_classification_report
from nearfar.eval.results import DataName, Score
from nearfar.launch.local.stop_signals import ScoringStoppedError, StopFlag
from nearfar.launch.pretrain import save_views
from nearfar.ssl import checkpoint, config, train
from nearfar.ssl.data import open_source
from nearfar.ssl.data.labels import class_names, labels_as
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.files import FolderSource
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import Classifier
from nearfar.ssl.parallel import device
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.settings.defaults import as_resolved
from nearfar.ssl.settings.finetune_settings import FinetuneRun, ResolvedFinetune
from nearfar.ssl.train import Outcome, finetune
from nearfar.ssl.wording import printable


def finetune_rank(run: FinetuneRun, console: Console, world: Ranks) -> Outcome:
    """What each process of `run` does: train it, or continue it; the first one scores its classifier on data.val and
    writes its report. Signals are as in `nearfar.launch.pretrain.run_pretraining`.

    Raises:
        UserError: as `nearfar.ssl.train.finetune`; data.val does not fit the classes.
    """
    config.require_images(run)
    with StopFlag() as stop:
        source, probe = labeled_images(run, stop)  # on every rank: a mistake in them is one of the whole run
        observers = train.Observers(save_views, probe if world.first else None)
        outcome = finetune(run, source, observers, stop, console, world)
    if world.first and outcome.finished:
        if probe is not None and not record_score(outcome, source, probe):
            return replace(outcome, unscored=True)
        page = write_classification_report(outcome.folder, checkpoint.about(outcome.folder))
        console.print(str(page), highlight=False, markup=False, soft_wrap=True)
    return outcome


def labeled_images(run: FinetuneRun, should_stop: Callable[[], bool] = lambda: False) -> tuple[Source, Scoring | None]:
    """The images that a run learns from, and what scores its classifier; None without data.val.

    Raises:
        UserError: no labels, fewer than two classes or some without an image, or others in data.val.
    """
    source = open_source(run.data.path)
    refuse_empty_folders(source, run.data.path)
    classes = class_names(source, run.data.path)
    if not run.data.val:
        return source, None
    val = open_source(run.data.val)
    if val.fingerprint == source.fingerprint:
        raise UserError(
            f"data.val={run.data.val} holds the very images that the classifier learns from: its score would say "
            "nothing about others. Name other images, or leave data.val out."
        )
    return source, Scoring(val, run.data.val, labels_as(classes, val, run.data.val), should_stop)


def refuse_empty_folders(source: Source, path: str) -> None:
    """Raises UserError for a class folder without an image, which a source of files passes over."""
    root = Path(path).expanduser()
    if not isinstance(source, FolderSource) or not source.classes:
        return
    folders = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    if empty := [name for name in folders if printable(name) not in source.classes]:
        some = ", ".join(empty[:5]) + (" and others" if len(empty) > 5 else "")
        raise UserError(
            f"{len(empty)} of the {len(folders)} class folders of {path} hold no image: {some}. Add images to them, or "
            "remove them."
        )


@dataclass
class Scoring:
    """Top-1 and top-5 of the classifier on the validation images; None where a signal asks to stop first."""

    val: Source
    path: str  # of the images, as the run names them
    labels: np.ndarray  # of its images, as numbers of the classifier's classes
    should_stop: Callable[[], bool] = lambda: False
    last: Predictions | None = field(default=None, init=False)

    def __call__(self, classifier: Classifier, run: ResolvedFinetune) -> dict[str, float] | None:
        def go_on() -> None:
            if self.should_stop():
                raise ScoringStoppedError

        self.last = None
        compute = device.choose(run.train.device, run.train.precision, classifier.backbone.embed_dim)
        decoding = Decoding(workers=run.data.workers)
        try:
            self.last = predictions_of(
                classifier, self.val, run.eval.size, run.eval.resize, decoding, bf16=compute.bf16, go_on=go_on
            )
        except ScoringStoppedError:
            return None
        scores = accuracies(self.last.probabilities, self.labels[self.last.rows])
        return {f"val_{name}": score for name, score in scores.items()}


def record_score(outcome: Outcome, source: Source, scoring: Scoring) -> bool:
    """Put the score of a finished run into its results.json, with the accuracy of each class and the confusion; False
    where a signal asks to stop first (the same command scores it then).
    """
    classifier = checkpoint.load_classifier(outcome.folder)
    run = as_resolved(ResolvedFinetune, FinetuneRun.model_validate(checkpoint.about(outcome.folder)["run"]))
    if scoring.last is None:  # the run was finished before: its score may be there already
        if any(score.task == "finetune" and score.step == outcome.step for score in _scores(outcome.folder)):
            return True
        compute = device.choose(run.train.device, run.train.precision, classifier.backbone.embed_dim)
        scoring(classifier.to(compute.device), run)
    if scoring.last is None:
        return False
    measured = detail(scoring.last.probabilities, scoring.labels[scoring.last.rows], classifier.classes)
    score = Score(
        subject="trained",
        task="finetune",
        percent=measured["top1"],
        weights=digest(classifier),
        train=DataName(run.data.path, source.fingerprint, len(source)),
        val=DataName(scoring.path, scoring.val.fingerprint, len(scoring.val)),
        reading={"size": run.eval.size, "resize": run.eval.resize},
        step=outcome.step,
        detail=measured | {"bad": scoring.last.bad},
    )
    results.add(outcome.folder / "results.json", score)
    return True


def _scores(folder: Path) -> list[Score]:
    return results.read(folder / "results.json")
