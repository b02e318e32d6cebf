"""What a run's features are worth: trained, untrained and raw pixels in one table, with pictures for the report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from nearfar.eval.features import digest
from nearfar.eval.pictures import attention_maps, tile, token_pca
from nearfar.eval.scoring import (
    TASKS,
    evaluate,
    evaluate_pixels,
    knn_scores,
    linear_scores,
    merge_results,
    segment_scores,
)
from nearfar.eval.store import FeatureStore
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.config import Run
from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.eval_view import eval_view
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.defaults import ResolvedRun
from nearfar.ssl.errors import UserError
from nearfar.ssl.learner import build_learner

COLUMNS = {"knn_top1": "k-NN top-1", "linear_top1": "linear top-1", "miou": "mIoU"}
CROP = ("size", "resize", "pooling", "amp")
DEPENDS = {  # of each task's score, besides weights and images
    "knn": (*CROP, "layer"),
    "linear": (*CROP, "layer", "linear_layer", "epochs", "seed"),
    "segment": ("amp", "grid_size", "grid_layer", "head", "steps", "seed"),
}
PICTURED = 6  # images in the attention and PCA pictures


class Subject(NamedTuple):
    """Weights to be scored, the run they come from, and where their results belong."""

    backbone: Backbone
    run: Run
    folder: Path

    @property
    def image_size(self) -> int:
        return self.run.eval.size or self.run.views.global_crops_size

    @staticmethod
    def of(model: Path) -> Subject:
        """From a run folder, a checkpoint folder or an exported file.

        Raises:
            UserError: nothing there, or weights that were not exported from a run.
        """
        file = checkpoint.weights_file(model)
        state = checkpoint.about(file)
        if "run" not in state:
            raise UserError(f"{file} does not say which run it comes from.")
        return Subject(checkpoint.load(file), config.validate(state["run"]), file.parent)


def score(
    subject: Subject,
    train: Source,
    val: Source,
    *,
    tasks: Iterable[str] = TASKS,
    baselines: bool = False,
    results: Path | None = None,
    console: Console,
    **reading: Any,
) -> dict[str, Any]:
    """Evaluate the trained backbone (and the baselines), merge the scores into results.json, print the table.

    The untrained network has the same architecture and the weights of the same seed at step 0. `reading` goes to
    `nearfar.eval.scoring.evaluate`; size, resize and pooling follow the run's settings unless given. Scores that
    results.json already holds for the same weights, images and reading are not computed again; those of other weights
    or images leave it.
    """
    run = subject.run
    file = results or subject.folder / "results.json"
    reading = {
        "size": subject.image_size,
        "resize": run.eval.resize,
        "pooling": run.head.pooling,
        **{k: v for k, v in reading.items() if v is not None},
    }
    tasks = tuple(tasks)
    keys, due = {}, {}
    for name in ("trained", "untrained", "pixels") if baselines else ("trained",):
        held = merge_results(file, name, {})[name]
        of = _hash(name, *_weights(name, subject), train.fingerprint, val.fingerprint)
        if held and held.get("of") != of:
            console.print(f"The scores of {name} in {file} are of other weights or images, and leave it.")
            held = merge_results(file, name, {}, keep=False)[name]
        now = {task: _hash(of, task, *((key, reading.get(key)) for key in DEPENDS[task])) for task in tasks}
        known = held.get("keys", {})
        keys[name] = {"of": of, "keys": {**known, **now}}
        if missing := [task for task, key in now.items() if known.get(task) != key]:
            due[name] = missing

    def keep(name: str, scores: dict[str, Any]) -> None:
        merge_results(file, name, {**scores, **keys[name]})

    processes = min(len(due), torch.get_num_threads())
    doing = f"Scoring {' and '.join(due)}: {', '.join(tasks)} ..."
    if due and not console.is_terminal:
        console.print(doing)
    with console.status(doing) if due else nullcontext():
        if processes < 2:
            for name, missing in due.items():
                keep(name, _scores(name, subject, train, val, missing, reading))
        else:  # small operators: a process of fewer threads each beats one after the other on all
            threads = torch.get_num_threads() // processes
            with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
                found = {name: pool.submit(_scores, name, subject, train, val, due[name], reading) for name in due}
                for name, scores in found.items():
                    keep(name, scores.result())
    results_now = merge_results(file, "trained", {})
    console.print(table(results_now))
    return results_now


def score_features(
    train: Path, val: Path, *, tasks: Iterable[str] | None, head: str, results: Path | None, console: Console
) -> dict[str, Any]:
    """Score two folders that `nearfar features` wrote, without running the network again, and print the table.

    tasks: None for all that fit: k-NN and linear probe of pooled features, segmentation of grids. The scores also go to
    `results`, if given.

    Raises:
        UserError: folders that do not belong together, or tasks that do not fit them.
    """
    known = FeatureStore.open(train)
    reading: dict[str, Any] = {
        key: known.manifest[key] for key in ("checkpoint", "layer", "pooling") if key in known.manifest
    }
    pair = known, FeatureStore.open(val, reading)
    fitting = ("segment",) if known.x.ndim == 4 else ("knn", "linear")
    chosen = fitting if tasks is None else tuple(tasks)
    if wrong := set(chosen) - set(fitting):
        held = "grids of patches" if known.x.ndim == 4 else "one vector an image"
        raise UserError(
            f"{train} holds {held} (--pooling {known.manifest.get('pooling')}), which {', '.join(sorted(wrong))} "
            f"cannot read; {' and '.join(fitting)} can."
        )
    scores: dict[str, Any] = {}
    if "knn" in chosen:
        scores |= knn_scores(*pair)
    if "linear" in chosen:
        scores |= linear_scores(*pair)
    if "segment" in chosen:
        scores |= segment_scores(*pair, head=head)
    if results:
        merge_results(results, "trained", scores, keep=False)
    console.print(table({"trained": scores}))
    return scores


def _scores(
    name: str, subject: Subject, train: Source, val: Source, tasks: Iterable[str], reading: dict[str, Any]
) -> dict[str, Any]:
    if name == "pixels":
        shared = {k: v for k, v in reading.items() if k in ("grid_size", "head", "steps", "epochs", "seed")}
        return evaluate_pixels(train, val, tasks=tasks, patch=subject.backbone.patch_size, **shared)
    backbone = subject.backbone if name == "trained" else untrained(subject.run)
    return evaluate(backbone, train, val, tasks=tasks, **reading)


def untrained(run: Run) -> Backbone:
    """The backbone as it was at step 0 of the run."""
    return build_learner(ResolvedRun.of(run)).teacher.backbone.eval().requires_grad_(False)


def table(results: dict[str, Any]) -> Table:
    """The headline scores in percent, a row for each kind of features."""
    shown = Table(title="Frozen features, percent")
    shown.add_column("")
    for title in COLUMNS.values():
        shown.add_column(title, justify="right")
    for name in ("trained", "untrained", "pixels"):
        if scores := results.get(name):
            cells = [f"{scores[key]:.1f}" if key in scores else "-" for key in COLUMNS]
            shown.add_row("raw pixels" if name == "pixels" else name, *cells)
    return shown


def draw_tokens(subject: Subject, val: Source, folder: Path) -> None:
    """attention.png (for networks that have attention maps) and pca.png of a few validation images."""
    size = subject.image_size
    chosen = torch.linspace(0, len(val) - 1, min(PICTURED, len(val))).long().tolist()
    views = torch.stack([eval_view(val.read(i), size, size) for i in chosen])
    images = normalize_pixels(views)
    tile(token_pca(subject.backbone, images)).save(folder / "pca.png")
    try:
        tile(attention_maps(subject.backbone, images), columns=1).save(folder / "attention.png")
    except UserError:  # a convolutional network, say: the report leaves the picture out and says so
        (folder / "attention.png").unlink(missing_ok=True)


def sources(run: Run, train: str | None, val: str | None) -> tuple[Source, Source]:
    """The two labeled sources: as given, else those of the run."""
    train, val = train or run.data.path, val or run.data.val
    if not val:
        raise UserError("Nothing to score on: the run has no data.val, so name labeled images with --val.")
    return open_source(train), open_source(val)


def _weights(name: str, subject: Subject) -> tuple[str, ...]:
    """What says which features these are."""
    if name == "pixels":
        return (str(subject.backbone.patch_size),)
    return (digest(subject.backbone),) if name == "trained" else (subject.run.model_dump_json(),)


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
