"""The classes of labeled images, and the labels of other images as numbers of the same classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import printable

_MAX_BYTES = 2**22  # of a classes.txt; that of ImageNet-21k has 0.5 MiB


def class_names(source: Source, path: str) -> list[str]:
    """The names of the classes, in the order of their numbers: those of the source, or the numbers themselves.

    Raises:
        UserError: no labels, fewer than two classes, or classes without an image.
    """
    if source.labels is None:
        raise UserError(
            f"The images of {path} have no labels, and a classifier needs them: class folders, a .txt list with a "
            "label after a tab, or an .npz or a .beton that was made with labels."
        )
    found, low = np.unique(source.labels), int(source.labels.min(initial=0))
    if low < 0:
        raise UserError(f"The labels of {path} must be class numbers from 0 on, but {low} is among them.")
    names = list(source.classes or [])
    names += [str(number) for number in range(len(names), int(found.max(initial=-1)) + 1)]
    if len(found) < 2:
        only = (
            f"all {len(source):,} images are of class {names[int(found[0])]}" if len(found) else "there are no images"
        )
        raise UserError(f"A classifier needs two classes or more, but in {path} {only}.")
    if empty := sorted(set(range(len(names))) - set(found.tolist())):
        some = ", ".join(names[number] for number in empty[:5]) + (" and others" if len(empty) > 5 else "")
        raise UserError(
            f"{len(empty)} of the {len(names)} classes of {path} have no image: {some}. Add images to them, or remove "
            "them (class folders), or number the classes without gaps."
        )
    return names


def labels_as(classes: list[str], source: Source, path: str) -> np.ndarray:
    """The labels of other images (n,) as numbers of `classes`: by name where they have names, else as they are.

    Raises:
        UserError: no labels, or classes that are not among these.
    """
    if source.labels is None:
        raise UserError(f"The images of {path} have no labels, so a classifier cannot be scored on them.")
    present = np.unique(source.labels).tolist()
    if source.classes is None:
        unknown = [str(number) for number in present if not 0 <= number < len(classes)]
        table = np.arange(len(classes))
    else:
        unknown = [source.classes[number] for number in present if source.classes[number] not in classes]
        table = np.array([classes.index(name) if name in classes else -1 for name in source.classes])
    if unknown:
        some = ", ".join(unknown[:5]) + (" and others" if len(unknown) > 5 else "")
        raise UserError(
            f"{len(unknown)} classes of {path} are not among those that the classifier was trained on: {some}. It "
            f"knows {', '.join(classes[:10])}{' and others' if len(classes) > 10 else ''}."
        )
    return np.asarray(table[source.labels])


def class_descriptions(path: str) -> dict[str, str]:
    """What people call the classes of a data set: {"n01440764": "tench"}, by the lines `CLASS DESCRIPTION` of a
    classes.txt in the folder or beside it. Empty where there is none that can be read: classes go by their own names.
    """
    data = Path(path).expanduser()
    for folder in (data, data.parent):
        try:
            lines = bounded_files.read_text(folder / "classes.txt", _MAX_BYTES).splitlines()
        except (OSError, ValueError):
            continue
        parts = [line.split(maxsplit=1) for line in lines]
        return {part[0]: printable(part[1].strip()) for part in parts if len(part) == 2}
    return {}
