"""Scores of a run's features: trained, untrained and raw pixels in one table, and what they mean."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.features.extraction import Reading, digest
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.store import is_store
from nearfar.eval.pages.verdict import Verdict, verdict
from nearfar.eval.results import SUBJECTS, TITLES, Score
from nearfar.eval.run_files import flat, read_numbers, read_settings
from nearfar.eval.scores.evaluation import check_grid_size, evaluate, evaluate_pixels
from nearfar.eval.scores.headline_scores import Protocol, TaskScore
from nearfar.eval.scores.tasks import TASKS, Data, Plan, plan
from nearfar.launch.scoring.score_tables import detail_tables, remarks, score_table
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data import open_source
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import UserError
from nearfar.ssl.given_weights import folder_of, load_given
from nearfar.ssl.learning.dino import untrained_backbone
from nearfar.ssl.parallel import gpus
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.run.run_folder import START
from nearfar.ssl.settings.finetune_settings import FinetuneRun, recorded
from nearfar.ssl.settings.run import BackboneSettings, Run
from nearfar.ssl.wording import listed


class Subject(NamedTuple):
    """Weights to be scored, the run and the step they come from, and where their results belong.

    given: the path by which the weights were named, where they were read from one.
    """

    backbone: Backbone
    run: Run
    folder: Path
    step: int | None = None
    amp: bool = False  # bfloat16 autocast where features are read
    given: Path | None = None

    def on(self, compute: Compute) -> Subject:
        """These weights on a device, with the precision that features are read in there.

        Raises UserError where others have filled it.
        """
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.backbone.parameters())
        gpus.require_room(compute.device, size, "the weights")
        return self._replace(backbone=self.backbone.to(compute.device), amp=compute.bf16)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def image_size(self) -> int:
        return self.run.eval.size or self.run.views.global_crops_size

    @property
    def is_run(self) -> bool:
        """Is `folder` a run's, and not that of a checkpoint or an exported file?"""
        return (self.folder / "config.yaml").is_file()

    @staticmethod
    def of(model: Path) -> Subject:
        """From a run folder, a checkpoint folder, an exported file, a public file of weights or timm/NAME.

        Raises:
            UserError: nothing there, or weights of a network that nobody knows.
        """
        backbone, about = load_given(model)
        step, run = about.get("step"), about.get("run")
        settings = _as_pretraining(run) if isinstance(run, dict) else _as_public(backbone)
        return Subject(backbone, settings, folder_of(model), step if isinstance(step, int) else None, given=model)


def _as_pretraining(settings: dict[str, Any]) -> Run:
    """The settings under which a backbone was trained; of a supervised run what frozen features need of them."""
    run = recorded(settings)
    return run.as_pretraining() if isinstance(run, FinetuneRun) else run


def _as_public(backbone: Backbone) -> Run:
    """The settings that public weights are scored with: their own network, at the size that is usual for them."""
    known = {key: value for key, value in backbone.arch.items() if key in BackboneSettings.model_fields}
    size = max(1, round(224 / backbone.patch_size)) * backbone.patch_size
    return config.validate(
        {"name": "public", "backbone": known, "views": {"global_crops_size": size, "local_crops_size": size}}
        | {"eval": {"size": size, "resize": round(size * 256 / 224)}}
    )


def sources(run: Run, train: str | None, val: str | None) -> tuple[Data, Data]:
    """The two labeled (or masked) sources: as given, else those of the run.

    Raises UserError where there are no images.
    """
    train, val = train or run.data.path, val or run.data.val
    if not val:
        raise UserError("Nothing to score on: the run has no data.val, so name labeled images with --val.")
    if not train:
        raise UserError("Nothing to learn from: the run has no data.path, so name labeled images with --train.")
    for path in (train, val):
        if is_store(Path(path)):
            raise UserError(
                f"{path} holds features, and a network is scored on images. Features are scored without it: nearfar "
                "eval all TRAIN_FEATURES --val VAL_FEATURES."
            )
    return Data(train, open_source(train)), Data(val, open_source(val))


def protocol_of(subject: Subject, **given: Any) -> Protocol:
    """How the run's settings say that its features are read; what is given (and not None) wins.

    given: fields of `Reading` and `Protocol`.
    """
    given = {key: value for key, value in given.items() if value is not None}
    size = given.pop("size", subject.image_size)
    resize = subject.run.eval.resize
    if resize is not None and size != subject.image_size:  # the same share of an image at every size
        resize = round(resize * size / subject.image_size)
    pooled = Reading(
        size,
        given.pop("resize", resize),
        given.pop("layer", "final"),
        given.pop("pooling", subject.run.head.pooling),
        given.pop("amp", subject.amp),
    )
    return Protocol(pooled, **given)


@dataclass(frozen=True)
class SubjectScores:
    """Everything a process needs to score the features of one subject."""

    name: str
    weights: str
    subject: Subject
    train: Data
    val: Data
    tasks: tuple[str, ...]
    protocol: Protocol
    classes: int | None
    masks: str | None
    decoding: Decoding
    file: Path

    def entry(self, task: str, percent: float = 0.0, detail: dict[str, Any] | None = None) -> Score:
        patch = self.subject.backbone.patch_size
        reading = self.protocol.decides_of_pixels(task, patch) if self.name == "pixels" else self.protocol.decides(task)
        if task in ("segment", "retrieval"):
            reading |= {"classes": self.classes, "masks": self.masks}
        step = self.subject.step if self.name == "trained" else None
        return Score(
            self.name, task, percent, self.weights, self.train.name, self.val.name, reading, step, detail
        )  # fmt: skip

    def __call__(self) -> dict[str, str]:
        """Score the tasks, each written as soon as it is there; what kept a task from its score, in words."""
        failures: dict[str, str] = {}
        left = [task for task in TASKS if task in self.tasks]
        while left:
            try:
                for found in self._scores(left):
                    results.add(self.file, self.entry(found.task, found.percent, found.detail))
                    left.remove(found.task)
            except UserError as error:
                failures[left.pop(0)] = str(error)
        return failures

    def _scores(self, tasks: list[str]) -> Iterable[TaskScore]:
        data = self.train.source, self.val.source
        if self.name == "pixels":
            patch, device = self.subject.backbone.patch_size, self.subject.device
            return evaluate_pixels(data, self.protocol, tuple(tasks), self.classes, patch, device)
        backbone = self.subject.backbone
        if self.name != "trained":
            backbone = starting(self.subject) if self.name == "start" else untrained(self.subject)
        return evaluate(backbone, data, self.protocol, tuple(tasks), self.classes, self.decoding)


@dataclass(frozen=True)
class ScoreOptions:
    """What to score besides the trained features, where to write the scores, and how to read the images.

    classes: of the masks; None = as the masks (and a classes.txt beside them) say.
    """

    baselines: bool = False
    results: Path | None = None
    protocol: Protocol | None = None
    classes: int | None = None
    decoding: Decoding = field(default_factory=Decoding)


def score(
    subject: Subject,
    train: Data,
    val: Data,
    *,
    tasks: Iterable[str] | None = None,
    options: ScoreOptions = ScoreOptions(),
    console: Console,
) -> list[Score]:
    """Evaluate the trained backbone (and the baselines), print the table and what it means; the scores asked for.

    tasks: None for all that the data allow; what is left out is said first. The untrained network has the architecture
    and the weights of the same seed at step 0. Every score is in results.json as soon as it is there; those that are
    there for the same weights, images and reading are not computed again, and none is removed.

    Raises:
        UserError: nothing can be scored, results.json cannot be written, or a task failed (after the others).
    """
    file = options.results or subject.folder / "results.json"
    results.check_results_writable(file)
    planned = plan(train, val, tasks, options.classes)
    for line in planned.left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    protocol = options.protocol or protocol_of(subject)
    check_grid_size(protocol, planned.tasks, subject.backbone.patch_size)
    names = tuple(SUBJECTS) if options.baselines else ("trained",)
    if not (subject.folder / START).is_file():
        names = tuple(name for name in names if name != "start")
    work = [
        SubjectScores(
            name, _weights(name, subject), subject, train, val, _tasks_of(name, planned), protocol, planned.classes,
            planned.masks, options.decoding, file,
        )
        for name in names
    ]  # fmt: skip
    keys = [each.entry(task).key for each in work for task in each.tasks]
    failures = _compute(work, {entry.key for entry in results.read(file)}, console)
    held = {entry.key: entry for entry in results.read(file)}
    found = [held[key] for key in keys if key in held]
    if found:
        console.print(score_table(found))
        for table in detail_tables(found):
            console.print(table)
        _say_meaning(subject, found, console, _data_flags(subject.run, train, val))
    if failures:
        raise UserError(" ".join(dict.fromkeys(failures)) + (" The other scores are kept." if found else ""))
    return found


def _compute(work: list[SubjectScores], known: set[str], console: Console) -> list[str]:
    """Score what is not known yet; failures in words."""
    due = []
    for each in work:
        if missing := tuple(task for task in each.tasks if each.entry(task).key not in known):
            due.append(SubjectScores(**{**vars(each), "tasks": missing}))
    if not due:
        console.print("These scores are in results.json already: nothing to compute.", highlight=False)
        return []
    doing = "; ".join(f"{SUBJECTS[each.name]}: {', '.join(TITLES[task] for task in each.tasks)}" for each in due)
    if not console.is_terminal:
        console.print(f"Scoring {doing} ...", highlight=False, soft_wrap=True)
    alone = all(each.subject.device.type == "cpu" and not each.decoding.shared for each in due)
    processes = min(len(due), torch.get_num_threads()) if alone else 1
    with console.status(f"Scoring {doing} ..."):
        if processes < 2:
            found = [each() for each in due]
        else:  # small operators: processes of fewer threads side by side beat one after the other on all threads
            threads = torch.get_num_threads() // processes
            with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
                found = [future.result() for future in [pool.submit(each) for each in due]]
    failures: dict[tuple[str, str], list[str]] = {}
    for each, failed in zip(due, found, strict=True):
        for task, why in failed.items():
            failures.setdefault((task, why), []).append(SUBJECTS[each.name])
    return [f"{listed(subjects)}, {TITLES[task]}: {why}" for (task, why), subjects in failures.items()]


def _say_meaning(subject: Subject, found: list[Score], console: Console, flags: str) -> None:
    """What the scores mean, what was left out of them, and what to do next: to the console and the run's log.

    flags: of `nearfar eval`, that score the same images again.
    """
    lines = list(remarks(found))
    judged = judge(found, subject.folder) if subject.is_run else None
    if judged:
        lines.append(judged.text)
    lines.append(_next(subject, judged, flags))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if subject.is_run:
        try:
            with (subject.folder / "run.log").open("a", encoding="utf-8") as log:
                log.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in lines)
        except OSError:  # a colleague's run, scored with --out: the console has it
            pass


def judge(found: Iterable[Score], run: Path) -> Verdict | None:
    """`nearfar.eval.pages.verdict.verdict` of the scores of a run folder."""
    first = next(results.tables(found), {})
    return verdict(first, read_numbers(run / "metrics.jsonl"), flat(read_settings(run)))


def _data_flags(run: Run, train: Data, val: Data) -> str:
    """--train and --val for images that are not the run's own."""
    pairs = (("--train", train.path, run.data.path), ("--val", val.path, run.data.val))
    return "".join(f" {flag} {shlex.quote(path)}" for flag, path, own in pairs if path != own)


def _next(subject: Subject, judged: Verdict | None, flags: str) -> str:
    where = subject.folder
    if not subject.is_run:
        return f"Next: nearfar features {subject.given or where} IMAGES OUT writes features of your own images."
    if judged and not judged.good:
        return (
            f"Next: train with one of these under another name=, then compare the runs: nearfar report {where.parent}"
        )
    if judged and judged.advice:
        return (
            f"Next: nearfar eval all {where}{flags} --baselines; the page with curves and pictures: nearfar report "
            f"{where}"
        )
    return (
        f"Next: nearfar report {where} (curves and pictures); nearfar features {where} IMAGES OUT; nearfar export "
        f"{where} NAME.safetensors"
    )


def _tasks_of(name: str, planned: Plan) -> tuple[str, ...]:
    """The planned tasks that make sense of these features: a shuffle of patches tests a network, not pixels."""
    return tuple(task for task in planned.tasks if name != "pixels" or task != "robustness")


def baselines(subject: Subject) -> list[Backbone]:
    """The networks that are scored beside the trained one, in the order of `SUBJECTS`."""
    has_start = (subject.folder / START).is_file()
    return [*([starting(subject)] if has_start else []), untrained(subject)]


def starting(subject: Subject) -> Backbone:
    """The weights that a run began with, where the trained ones are."""
    return checkpoint.load(subject.folder / START).to(subject.device)


def untrained(subject: Subject) -> Backbone:
    """The same network with the random weights of the run's seed, where the trained one is."""
    return untrained_backbone(subject.run).to(subject.device)


def _weights(name: str, subject: Subject) -> str:
    """The identity of the weights: what `Score.weights` holds."""
    if name == "trained":
        return digest(subject.backbone)
    if name == "pixels":
        return "pixels"
    if name == "start":
        return digest(checkpoint.load(subject.folder / START))
    run = subject.run  # everything that decides the random weights
    parts = [
        run.backbone.model_dump_json(exclude={"weights", "pretrained"}),
        run.head.model_dump_json(),
        run.views.global_crops_size,
        run.train.seed,
    ]
    return "untrained " + digests.of_bytes([repr(parts).encode()])[:32]
