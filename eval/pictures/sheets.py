"""Sheets of pictures: a query with its neighbors, masks beside the truth, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.eval.features.extraction import IGNORE
from nearfar.eval.pictures.figures import Cell, Group, encoded
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import BadImage

SIDE = 160  # pixels of a small picture: sharp at twice the density of a screen
COLORS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#eeca3b", "#72b7b2", "#ff9da6", "#9d755d", "#5f6fd8",
    "#a0cbe8", "#ffbe7d", "#8cd17d", "#f28e8c", "#d4a6c8", "#c7a900", "#1f8a84", "#d37295", "#d7b5a6", "#2f4b7c",
)  # fmt: skip
BACKGROUND = "#39424e"


def square(source: Source, i: int, side: int = SIDE) -> Image.Image:
    """The central square of image i. Raises BadImage."""
    picture = source.read(i)
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    filtering = Image.Resampling.BICUBIC if edge < side else Image.Resampling.LANCZOS
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), filtering)


def label(source: Source, i: int) -> str:
    """The name of the class of image i, its number where classes have no names, "" where there are no labels."""
    if source.labels is None:
        return ""
    number = int(source.labels[i])
    named = source.classes is not None and 0 <= number < len(source.classes)
    return str(source.classes[number]) if named and source.classes else str(number)


def sample(
    source: Source,
    i: int,
    what: str = "image",
    mark: str = "",
    note: str = "",
    descriptions: Mapping[str, str] | None = None,
) -> Cell | None:
    """Image i with its class; None where it cannot be read. descriptions: what to write instead of a class's name."""
    try:
        picture = square(source, i)
    except BadImage:
        return None
    name = label(source, i)
    name = (descriptions or {}).get(name, name)
    caption = ", ".join(part for part in (name, note) if part)
    return Cell(encoded(picture), f"{what} of class {name}" if name else what, caption, mark)


def neighbor_groups(
    queries: tuple[Source, Sequence[int]],
    memory: Source,
    lists: Mapping[str, NDArray[np.int64]],
    descriptions: Mapping[str, str] | None = None,
) -> tuple[Group, ...]:
    """A query a group, with its nearest images by each kind of features; right is what has the query's class name.

    queries: a source, and the rows of it that are shown. lists: by the name of the features, rows of `memory` (q, k),
    nearest first. descriptions: of classes, as for `sample`.
    """
    source, rows = queries
    groups = []
    for number, i in enumerate(rows):
        if (lead := sample(source, i, "query", descriptions=descriptions)) is None:
            continue
        strips = []
        for kind, found in lists.items():
            cells = []
            for rank, j in enumerate(found[number].tolist(), 1):
                truth, name = label(source, i), label(memory, j)
                mark = "" if not truth or not name else "right" if truth == name else "wrong"
                cell = sample(memory, j, f"neighbor {rank} by {kind}", mark, descriptions=descriptions)
                cells += [cell] if cell else []
            strips.append((kind, tuple(cells)))
        groups.append(Group(tuple(strips), lead))
    return tuple(groups)


def same_class(queries: tuple[Source, Sequence[int]], memory: Source, found: NDArray[np.int64]) -> float | None:
    """Percent of neighbors (q, k) that are of their query's class; None without labels."""
    source, rows = queries
    if source.labels is None or memory.labels is None:
        return None
    names = {j: label(memory, j) for j in np.unique(found).tolist()}
    hits = [names[j] == label(source, i) for i, near in zip(rows, found.tolist(), strict=True) for j in near]
    return 100.0 * sum(hits) / len(hits)


# --- masks -----------------------------------------------------------------------------------------------------


def mask_names(classes: int, names: Sequence[str] | None) -> list[str]:
    """What the classes of masks are called. Names of one class fewer are those of objects, and 0 is the background."""
    if names is not None and len(names) == classes:
        return list(names)
    if names is not None and len(names) == classes - 1:
        return ["background", *names]
    return [f"class {number}" for number in range(classes)]


def mask_color(number: int, names: Sequence[str]) -> str:
    return BACKGROUND if names[number] == "background" else COLORS[(number - (names[0] == "background")) % len(COLORS)]


def painted_mask(mask: NDArray[np.integer], names: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """Class numbers (H, W) as colors, at `size` (width, height); white where the truth is not known (255)."""
    table = np.full((256, 3), 255, np.uint8)
    for number in range(len(names)):
        color = mask_color(number, names)
        table[number] = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return Image.fromarray(table[mask.astype(np.uint8)]).resize(size, Image.Resampling.NEAREST)


def mask_group(
    picture: Image.Image,
    truth: NDArray[np.uint8],
    predicted: NDArray[np.integer],
    names: Sequence[str],
    side: int = 240,
) -> Group:
    """A picture, its mask, and the predicted mask with the share of pixels that are right."""
    scale = side / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    known = truth != IGNORE
    right = 100.0 * float((predicted[known] == truth[known]).mean()) if known.any() else 0.0
    shown = encoded(picture.resize(size, Image.Resampling.BICUBIC))

    def cell(mask: NDArray[np.integer], what: str, more: str = "") -> Cell:
        held = _held(mask, names)
        image = encoded(painted_mask(mask, names, size), exact=True)
        return Cell(image, f"{what}: {held}", f"{what}: {held}{more}")

    where = cell(np.where(known, predicted, IGNORE), "predicted", f" ({right:.0f} % of pixels right)")
    return Group((("", (Cell(shown, "test image", "test image"), cell(truth, "truth"), where)),))


def _held(mask: NDArray[np.integer], names: Sequence[str]) -> str:
    """The classes of a mask by size, without the background where there are others: at most three."""
    count = np.bincount(mask[mask != IGNORE].reshape(-1), minlength=len(names))
    order = [number for number in np.argsort(-count, kind="stable").tolist() if count[number] >= 0.01 * mask.size]
    objects = [number for number in order if names[number] != "background"] or order
    more = ", ..." if len(objects) > 3 else ""
    return ", ".join(names[number] for number in objects[:3]) + more
