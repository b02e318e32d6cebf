"""Which evaluations two data sets allow, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nearfar.eval.features.extraction import IGNORE
from nearfar.eval.results import HEADLINES, TASKS, TITLES, DataName
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.dense import known_classes, published_names
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import listed

OF_ALL = ("knn", "linear", "logistic", "fewshot", "segment")
"""What `nearfar eval all` scores: all that reads the features which k-NN, linear probe and segmentation need anyway.
The other evaluators are asked for by name: most run the network again, and whitened k-NN is no published protocol."""
_NEED_MASKS = ("segment", "retrieval")
_NEED_LABELS = ("knn", "whitened", "linear", "logistic", "fewshot", "robustness")
_OF_OTHER_IMAGES = ("linear", "logistic", "fewshot", "segment", "retrieval", "position")
MASKS_EXPLAINED = (
    f"Masks are 8-bit PNGs of class numbers from 0, {IGNORE} = ignore, in a folder `masks` beside `images`, with the "
    "images' names."
)


class Data(NamedTuple):
    """Images, and the path by which people know them."""

    path: str
    source: Source

    @property
    def name(self) -> DataName:
        return DataName(self.path, self.source.fingerprint, len(self.source))


class Plan(NamedTuple):
    """The tasks to score, the number of mask classes where segmentation is among them, what is left out and why, and
    the digest of all masks: a source's fingerprint is that of its images."""

    tasks: tuple[str, ...]
    classes: int | None
    left_out: tuple[str, ...]
    masks: str | None = None


def plan(train: Data, val: Data, requested: Iterable[str] | None = None, classes: int | None = None) -> Plan:
    """What can be scored on these data sets; requested: None for all of `OF_ALL` that they allow.

    classes: of the masks, where the user says so. Raises UserError for unknown tasks, where nothing can be scored, for
    a wanted task that cannot, and for masks with impossible classes.
    """
    chosen = OF_ALL if requested is None else tuple(requested)
    if unknown := set(chosen) - set(TASKS):
        raise UserError(f"Unknown evaluation {', '.join(sorted(unknown))}: use {', '.join(TASKS)}.")
    reasons = {task: reason for task in chosen if (reason := _missing(task, train, val))}
    possible = tuple(task for task in TASKS if task in chosen and task not in reasons)
    if not possible or (reasons and requested is not None and not set(HEADLINES) <= set(chosen)):
        raise UserError(" ".join(dict.fromkeys(reasons.values())))
    masked = any(task in _NEED_MASKS for task in possible)
    digested: list[str] = []
    if masked:
        masks = (pair for data in (train, val) for pair in _digested(masks_of(data.source), digested))
        classes = mask_classes(masks, classes or known_classes(train.source) or _listed_classes(train))
    if any(task in _NEED_LABELS for task in possible):
        label_numbers(train.source.classes, val.source.classes)
    left_out: dict[str, list[str]] = {}
    for task, reason in reasons.items():
        left_out.setdefault(reason, []).append(TITLES[task])
    notes = tuple(f"Left out: {listed(tasks)}. {reason}" for reason, tasks in left_out.items())
    if not masked:
        return Plan(possible, None, notes)
    return Plan(possible, classes, notes, digests.fingerprint(digested)[:16])


def _digested(masks: Iterable[tuple[str, np.ndarray]], parts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The same masks, each leaving its digest in `parts`."""
    for name, mask in masks:
        parts.append(digests.fingerprint([str(mask.shape), mask.tobytes()]))
        yield name, mask


def label_numbers(train: Sequence[str] | None, val: Sequence[str] | None) -> np.ndarray | None:
    """The number among the training classes of each class of the validation images; None where the two are the same.

    Raises UserError for a validation class that no training image can have: its number would mean another class.
    """
    if train is None or val is None or list(train) == list(val):
        return None
    if unknown := [name for name in val if name not in train]:
        raise UserError(
            f"{len(unknown)} of the {len(val)} classes of the validation images are not among the training images' "
            f"({', '.join(unknown[:3])}; the training images have {', '.join(train[:3])} ...): name two folders with "
            "the same class names."
        )
    return np.asarray([list(train).index(name) for name in val], np.int64)


def mask_classes(masks: Iterable[tuple[str, np.ndarray]], classes: int | None = None) -> int:
    """How many classes the masks, (name, uint8 (H, W)) each, have: `classes` if given, else 1 + the highest.

    Raises UserError for a class beyond `classes`, for a highest class far beyond the others (a stray value, or an
    ignore value that is not 255), and where all pixels are of one class.
    """
    first: dict[int, str] = {}
    for name, mask in masks:
        for value in np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)):
            first.setdefault(int(value), name)
    found = sorted(first.keys() - {IGNORE})
    if not found:
        raise UserError(f"All pixels of all masks are {IGNORE} = ignore, so there is nothing to learn or score.")
    if classes is not None and found[-1] >= classes:
        raise UserError(
            f"The mask of {first[found[-1]]} has class {found[-1]}, but there are {classes} classes (0 to "
            f"{classes - 1}; {IGNORE} = ignore)."
        )
    if len(found) == 1:
        raise UserError(f"All pixels of all masks are of class {found[0]}, or {IGNORE} = ignore. {MASKS_EXPLAINED}")
    if classes is None and found[-1] + 1 > 2 * len(found):
        raise UserError(
            f"The mask of {first[found[-1]]} has class {found[-1]}, although the masks hold only {len(found)} "
            f"different classes ({', '.join(map(str, found[:3]))} ... {found[-1]}). {MASKS_EXPLAINED} If "
            f"{found[-1]} is meant, say so: --classes {found[-1] + 1}."
        )
    return classes or found[-1] + 1


def not_apart(task: str, train: DataName, val: DataName) -> str | None:
    """Why a task cannot be scored on the images that it learns from; None when they are others, or it is k-NN, which
    leaves each image out of its own neighbors."""
    if task not in _OF_OTHER_IMAGES or train.fingerprint != val.fingerprint:
        return None
    both = train.path if train.path == val.path else f"{train.path} and {val.path}"
    return (
        f"{both} would be learned from and scored on: an image that has been learned says nothing about new ones. Name "
        "other images with --val; k-NN alone needs none, as it leaves each image out of its own neighbors."
    )


def _missing(task: str, train: Data, val: Data) -> str | None:
    """Why a task cannot be scored on these; None when it can."""
    if task in _NEED_MASKS:
        without = [data.path for data in (train, val) if not _has_masks(data.source)]
        explained = MASKS_EXPLAINED
        what = "masks"
    elif task not in _NEED_LABELS:
        return not_apart(task, train.name, val.name)
    else:
        without = [data.path for data in (train, val) if data.source.labels is None]
        explained = "Labels are class folders, or a list with a label after a tab."
        what = "labels"
    if not without:
        return not_apart(task, train.name, val.name)
    verb = "has" if len(set(without)) == 1 else "have"
    return f"{' and '.join(dict.fromkeys(without))} {verb} no {what}. {explained}"


def _has_masks(source: Source) -> bool:
    for i in range(min(3, len(source))):
        try:
            return source.mask(i) is not None
        except BadImage:  # there is one, and it is damaged
            return True
    return False


def masks_of(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mask of every image that has one that can be read."""
    for i in range(len(source)):
        try:
            mask = source.mask(i)
        except BadImage:  # reported with the images that cannot be read
            continue
        if mask is not None:
            yield source.name(i), mask


def mask_class_names(source: Source, path: str) -> list[str] | None:
    """What the classes of the masks of a source at `path` are called: as its data set or a classes.txt says."""
    return source.classes or published_names(source) or listed_names(path)


def listed_names(path: str) -> list[str] | None:
    """The names of mask classes, by their number, in a classes.txt beside the folder `images`: a name a line, or lines
    of a number and a name; None where there is no such file, or it leaves a number out."""
    lines = _class_lines(path)
    numbered = [(int(line[0]), " ".join(line[1:])) for line in lines if line[0].isdecimal()]
    if len(numbered) < len(lines):
        return [" ".join(line) for line in lines]
    names = {number: name for number, name in numbered if number != IGNORE and name}
    return [names[number] for number in range(len(names))] if names and max(names) == len(names) - 1 else None


def _listed_classes(data: Data) -> int | None:
    """How many classes a classes.txt beside the folder `images` lists."""
    lines = [] if data.source.labels is not None else _class_lines(data.path)
    numbers = [int(line[0]) for line in lines if line[0].isdecimal()]
    if len(numbers) < len(lines):
        return len(lines)
    return 1 + max((number for number in numbers if number != IGNORE), default=-1) or None


def _class_lines(path: str) -> list[list[str]]:
    """The words of each line of a classes.txt beside the folder `images` of a path; [] where there is none."""
    parts = Path(path).expanduser().absolute().parts
    if "images" not in parts:
        return []
    file = Path(*parts[: len(parts) - 1 - parts[::-1].index("images")]) / "classes.txt"
    try:
        return [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
