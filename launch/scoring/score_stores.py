"""Scores of features on disk, as `nearfar features` writes them: no network is run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.features.extraction import Features, Reading
from nearfar.eval.features.store import FeatureStore
from nearfar.eval.results import DataName, Score
from nearfar.eval.scores.further_scores import (
    fewshot_score,
    logistic_score,
    position_score,
    retrieval_score,
    whitened_score,
)
from nearfar.eval.scores.headline_scores import Protocol, TaskScore, knn_score, linear_score, segment_score
from nearfar.eval.scores.tasks import OF_ALL, not_apart
from nearfar.launch.scoring.score_tables import detail_tables, remarks, score_table
from nearfar.ssl.errors import UserError

_OF_VECTORS = ("knn", "whitened", "linear", "logistic", "fewshot")
_OF_GRIDS = ("segment", "retrieval", "position")


def score_features(
    train: Path,
    val: Path,
    *,
    tasks: Iterable[str] | None,
    file: Path | None,
    console: Console,
    device: torch.device | str = "cpu",
    classes: int | None = None,
    **given: Any,
) -> list[Score]:
    """Score two folders that `nearfar features` wrote, without running the network again, and print the table.

    tasks: None for those of `OF_ALL` that fit pooled features, or grids. classes: of the masks; None counts them.
    given: head, steps, memory and epochs of `Protocol`. The scores also go to `file`, if given.

    Raises:
        UserError: folders that do not belong together, tasks that do not fit them, or a task that failed (after the
            others).
    """
    if file:
        results.check_results_writable(file)
    known = FeatureStore.open(train)
    manifest = known.manifest
    pair = known, FeatureStore.open(val, {key: manifest[key] for key in ("checkpoint", "layer", "pooling", "size")})
    fitting = _OF_GRIDS if known.x.ndim == 4 else _OF_VECTORS
    chosen = [task for task in fitting if task in OF_ALL] if tasks is None else tuple(tasks)
    if wrong := set(chosen) - set(fitting):
        raise UserError(
            f"{train} holds {_held(known)} (--pooling {manifest.get('pooling')}), which {', '.join(sorted(wrong))} "
            f"cannot read; {', '.join(fitting[:-1])} and {fitting[-1]} can."
        )
    protocol = Protocol(Reading(224), **given)
    train_name, val_name = names = tuple(
        DataName(str(folder), str(each.manifest.get("dataset")), len(each.x))
        for folder, each in zip((train, val), pair, strict=True)
    )
    keys = ("layer", "pooling", "size", "resize", "compute")
    found, failures = [], []
    for task in chosen:
        try:
            one = _score(task, pair, names, protocol, classes, device)
        except UserError as error:
            failures.append(str(error))
            continue
        reading = {key: manifest.get(key) for key in keys} | protocol.training(task)
        weights = str(manifest["checkpoint"])
        entry = Score("trained", task, one.percent, weights, train_name, val_name, reading, None, one.detail)
        found.append(entry)
        if file:
            results.add(file, entry)
    if found:
        console.print(score_table(found))
        for table in detail_tables(found):
            console.print(table)
    for line in remarks(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if failures:
        raise UserError(" ".join(dict.fromkeys(failures)))
    return found


def _held(features: Features) -> str:
    return "grids of patches" if features.x.ndim == 4 else "one vector an image"


def _score(
    task: str,
    pair: tuple[Features, Features],
    names: tuple[DataName, ...],
    protocol: Protocol,
    classes: int | None,
    device: torch.device | str,
) -> TaskScore:
    train, val = pair
    if same := not_apart(task, *names):
        raise UserError(same)
    match task:
        case "knn":
            return knn_score(train, val, device=device)
        case "whitened":
            return whitened_score(train, val, device=device)
        case "linear":
            return linear_score({str(train.manifest["layer"]): (train, val)}, protocol, device=device)
        case "logistic":
            return logistic_score(train, val, device=device)
        case "fewshot":
            return fewshot_score(train, val, protocol, device=device)
        case "segment":
            return segment_score(train, val, protocol, classes, device=device)
        case "retrieval":
            return retrieval_score(train, val, protocol, classes, device=device)
        case "position":
            return position_score(train, val)
    raise AssertionError(f"nothing scores {task}")
