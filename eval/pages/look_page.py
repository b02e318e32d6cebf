"""The page of a look at a data set: map, clusters, near duplicates, outliers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfar.eval.data_look import DataLook, purity, thinned_grid
from nearfar.eval.pages.page import as_address, figure_section, folded, missing, page, section, soft, text_table
from nearfar.eval.pictures.figures import Cell, Figure, Group, encoded
from nearfar.eval.pictures.sheets import COLORS, sample, square
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import BadImage
from nearfar.ssl.wording import counted

_SHOWN_CLUSTERS, _SAMPLES, _SHOWN_PAIRS, _LISTED = 20, 7, 12, 200
_CELLS, _CELL_SIDE = 16, 48  # of the map of pictures


@dataclass(frozen=True)
class LookInputs:
    """The images that were looked at. path: of the data set. source, index: the rows of the source with features.
    total: images of the data set, of which these are a sample where they are fewer. network: whose features they are.
    bad: images that cannot be read, by name. descriptions: what to write instead of a class's name."""

    path: str
    source: Source
    index: NDArray[np.int64]
    total: int
    network: str
    bad: Mapping[str, str]
    descriptions: Mapping[str, str]

    def name(self, at: int) -> str:
        return self.source.name(int(self.index[at]))

    def cell(self, at: int, what: str, note: str = "") -> Cell | None:
        return sample(self.source, int(self.index[at]), what, note=note, descriptions=self.descriptions)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return None if self.source.labels is None else self.source.labels[self.index]

    def class_name(self, number: int) -> str:
        names = self.source.classes
        name = names[number] if names is not None and 0 <= number < len(names) else str(number)
        return self.descriptions.get(name, name)


def look_page(looked: LookInputs, look: DataLook, duplicate: float) -> str:
    """The whole document. duplicate: the cosine from which two images count as near duplicates."""
    n = len(looked.index)
    sampled = (
        f"{n:,} of {looked.total:,} images, evenly spread," if n < looked.total - len(looked.bad) else f"{n:,} images"
    )
    lede = (
        f"{sampled} of {looked.path}, as the features of {looked.network} see them: {len(look.center)} clusters, "
        f"{counted(look.duplicates, 'pair')} of near duplicates, {len(looked.bad):,} unreadable images."
    )
    if n < looked.total - len(looked.bad):
        lede += " Duplicates and outliers of images outside the sample are not found."
    body = [
        f'<header><div class="soft">nearfar data look</div><h1>{html.escape(looked.path)}</h1>'
        f'<p class="lede">{html.escape(lede)}</p></header>',
        _map(looked, look),
        figure_section(_clusters(looked, look)),
        figure_section(_duplicates(looked, look, duplicate)),
        _pair_list(looked, look),
        figure_section(_outliers(looked, look)),
        _bad(looked.bad),
    ]
    return page(f"{looked.path}, a look", body)


def _map(looked: LookInputs, look: DataLook) -> str:
    labels = looked.labels
    by_class = labels is not None and len(np.unique(labels)) <= len(COLORS)
    numbers = labels if by_class and labels is not None else look.cluster
    present = np.unique(numbers)
    color = {int(number): COLORS[at % len(COLORS)] for at, number in enumerate(present)}

    def name(number: int) -> str:
        return looked.class_name(number) if by_class else f"cluster {number + 1}"

    dots = "".join(
        f'<circle cx="{8 + 584 * x:.1f}" cy="{8 + 584 * y:.1f}" r="{_radius(len(numbers))}" '
        f'fill="{color[int(number)]}"><title>{html.escape(name(int(number)))}</title></circle>'
        for (x, y), number in zip(look.position.tolist(), numbers.tolist(), strict=True)
    )
    legend = "".join(
        f'<li><i style="background:{color[int(number)]}"></i>{html.escape(name(int(number)))}</li>'
        for number in present
    )
    what = "class" if by_class else "cluster"
    text = (
        f"t-SNE of the features: near images look alike to the network, distances between islands mean little. A dot "
        f"is an image, its color its {what}. Beside or below it the same map in pictures: one image for each place."
    )
    return section(
        "Map",
        f'{soft(text)}<ul class="legend">{legend}</ul><div class="maps"><svg viewBox="0 0 600 600" role="img" '
        f'aria-label="map of the data set, a dot an image, colored by {what}">{dots}</svg>'
        f"{_picture_map(looked, look)}</div>",
    )


def _radius(count: int) -> float:
    return 5 if count < 300 else 3.5 if count < 1500 else 2.4


def _picture_map(looked: LookInputs, look: DataLook) -> str:
    side, pictures = _CELLS * _CELL_SIDE, []
    for at in thinned_grid(look.position, _CELLS).tolist():
        x, y = np.minimum((look.position[at] * _CELLS).astype(int), _CELLS - 1) * _CELL_SIDE
        try:
            content = encoded(square(looked.source, int(looked.index[at]), _CELL_SIDE - 2))
        except BadImage:
            continue
        pictures.append(f'<image x="{x + 1}" y="{y + 1}" width="{_CELL_SIDE - 2}" href="{as_address(content)}"/>')
    return (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="the same map in pictures">{"".join(pictures)}</svg>'
    )


def _clusters(looked: LookInputs, look: DataLook) -> Figure:
    labels, strips = looked.labels, []
    for number, center in enumerate(look.center.tolist()[:_SHOWN_CLUSTERS]):
        inside = np.flatnonzero(look.cluster == number)
        apart = np.linalg.norm(look.position[inside] - look.position[center], axis=1)
        chosen = [center, *(at for at in inside[np.argsort(apart, kind="stable")].tolist() if at != center)]
        spread = [chosen[at] for at in np.linspace(0, len(chosen) - 1, min(_SAMPLES, len(chosen))).astype(int)]
        cells = [cell for at in spread if (cell := looked.cell(at, f"image of cluster {number + 1}"))]
        title = f"cluster {number + 1}: {counted(len(inside), 'image')}"
        if labels is not None:
            count = np.bincount(labels[inside])
            title += f", {100 * count.max() / len(inside):.0f} % {looked.class_name(int(count.argmax()))}"
        strips.append(Group(((title, tuple(cells)),)))
    text = (
        "k-means of the features. In each row the image nearest to the mean, then others from near to far on the map."
    )
    if labels is not None:
        text += f" {purity(look.cluster, labels):.0f} % of the images are of their cluster's most frequent class."
    return Figure("clusters", "Clusters", text, tuple(strips))


def _duplicates(looked: LookInputs, look: DataLook, duplicate: float) -> Figure:
    if not len(look.pairs):
        return Figure(
            "duplicates", "Near duplicates", missing=f"No two images have features of cosine {duplicate:g} or more."
        )
    groups = []
    for (one, other), alike in zip(look.pairs.tolist()[:_SHOWN_PAIRS], look.alike.tolist(), strict=False):
        cells = [cell for at in (one, other) if (cell := looked.cell(at, "one of a pair", looked.name(at)))]
        groups.append(Group(((f"cosine {alike:.4f}", tuple(cells)),)))
    text = (
        f"{counted(look.duplicates, 'pair')} of images whose features have a cosine of {duplicate:g} or more, the most "
        f"alike first: copies, frames of one scene, or what the network cannot tell apart. {look.doubt}"
    ).rstrip()
    return Figure("duplicates", "Near duplicates", text, tuple(groups), size="medium")


def _pair_list(looked: LookInputs, look: DataLook) -> str:
    rows = [
        (f"{alike:.4f}", f"{looked.name(one)}  |  {looked.name(other)}")
        for (one, other), alike in zip(look.pairs.tolist()[:_LISTED], look.alike.tolist(), strict=False)
    ]
    return folded(f"The {len(rows)} most alike pairs by name", text_table(rows)) if rows else ""


def _outliers(looked: LookInputs, look: DataLook) -> Figure:
    cells = [
        cell
        for at, alike in zip(look.outliers.tolist(), look.lonely.tolist(), strict=True)
        if (cell := looked.cell(at, "outlier", f"{alike:.2f}, {looked.name(at)}"))
    ]
    text = (
        "The images least like their ten nearest neighbors, with the mean cosine: rare subjects, wrong files, or what "
        "the network has not learned."
    )
    rows: Sequence[tuple[Cell, ...]] = [tuple(cells[at : at + 4]) for at in range(0, len(cells), 4)]
    return Figure("outliers", "Outliers", text, tuple(Group((("", row),)) for row in rows))


def _bad(bad: Mapping[str, str]) -> str:
    if not bad:
        return ""
    rows = list(bad.items())[:_LISTED]
    more = soft(f"The first {len(rows)} of {len(bad):,}.") if len(bad) > len(rows) else ""
    return section("Unreadable images", more + text_table(rows) if rows else missing("None."))
