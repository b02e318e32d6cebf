"""figures.json: the pictures of a run, as data; drawn where the network is, put on a page anywhere.

A run folder may come from anybody, so the file holds text and encoded pictures, never markup, and is checked.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from nearfar.ssl.disk import bounded_files, files
from nearfar.ssl.errors import UserError

FORMAT = "nearfar figures 2"
FILE = "figures.json"
MOST_BYTES = 64 * 2**20
SIZES = ("small", "medium", "large")
MARKS = ("", "right", "wrong")
_TEXTS = ("key", "title", "text", "size", "missing", "of")
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}


@dataclass(frozen=True)
class Cell:
    """One picture. image: PNG or JPEG. alt: for those who do not see it. mark: "right", "wrong" or neither, ""."""

    image: bytes
    alt: str
    caption: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Group:
    """What belongs to one image: labeled rows of pictures, beside the image itself where there is a `lead`."""

    strips: tuple[tuple[str, tuple[Cell, ...]], ...]
    lead: Cell | None = None


@dataclass(frozen=True)
class Figure:
    """text: what is to be seen, in a sentence or two. missing: why there is nothing to see. legend: names with CSS
    colors. size: of the pictures on the page. points: dots of a plot, whose `axes` have names. table: its first row
    holds the heads. of: the `Score.key` of the score that it shows, where it shows one."""

    key: str
    title: str
    text: str = ""
    groups: tuple[Group, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    size: str = "small"
    missing: str = ""
    points: tuple[tuple[float, float], ...] = ()
    axes: tuple[str, str] = ("", "")
    table: tuple[tuple[str, ...], ...] = ()
    of: str = ""


def kind_of(content: bytes) -> str:
    """png or jpeg. Raises ValueError for anything else."""
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    raise ValueError("a picture is neither PNG nor JPEG")


def encoded(picture: Image.Image, *, exact: bool = False) -> bytes:
    """A photograph as JPEG; as PNG where it is transparent or every pixel counts."""
    buffer = BytesIO()
    if exact or picture.mode == "RGBA":
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write(file: Path, figures: Sequence[Figure]) -> None:
    """Replace figures.json in one move. Raises OSError."""
    content = {"format": FORMAT, "figures": [_as_json(figure) for figure in figures]}
    files.write_text(file, json.dumps(content) + "\n")


def read(file: Path) -> list[Figure]:
    """The figures of a run; [] where there is no such file. Raises UserError for anything else than what `write`
    writes."""
    if not file.exists():
        return []
    try:
        content = bounded_files.read_format(file, MOST_BYTES, FORMAT)
        return [_figure(entry) for entry in content["figures"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{file} does not hold figures ({why}); remove it, and `nearfar report` draws them again."
        ) from None


def _as_json(figure: Figure) -> dict[str, Any]:
    groups = [
        {
            "lead": None if group.lead is None else _cell_as_json(group.lead),
            "strips": [[label, [_cell_as_json(cell) for cell in cells]] for label, cells in group.strips],
        }
        for group in figure.groups
    ]
    plain = {key: getattr(figure, key) for key in _TEXTS}
    numbers = {"points": figure.points, "axes": figure.axes, "table": figure.table}  # tuples become lists
    return {**plain, **numbers, "legend": figure.legend, "groups": groups}


def _cell_as_json(cell: Cell) -> dict[str, str]:
    data = base64.b64encode(cell.image).decode("ascii")
    return {"image": data, "alt": cell.alt, "caption": cell.caption, "mark": cell.mark}


def _figure(entry: dict[str, Any]) -> Figure:
    text = {key: _text(entry[key]) for key in _TEXTS}
    if text["size"] not in SIZES:
        raise ValueError("unknown size of a figure")
    legend = tuple((_text(name), _color(color)) for name, color in entry["legend"])
    points = tuple((_number(x), _number(y)) for x, y in entry["points"])
    table = tuple(tuple(_text(cell) for cell in row) for row in entry["table"])
    across, up = (_text(name) for name in entry["axes"])
    groups = tuple(_group(group) for group in entry["groups"])
    return Figure(**text, legend=legend, groups=groups, points=points, axes=(across, up), table=table)


def _group(entry: dict[str, Any]) -> Group:
    strips: Iterable[Any] = entry["strips"]
    return Group(
        tuple((_text(label), tuple(_cell(cell) for cell in cells)) for label, cells in strips),
        None if entry["lead"] is None else _cell(entry["lead"]),
    )


def _cell(entry: dict[str, Any]) -> Cell:
    image = base64.b64decode(_text(entry["image"]), validate=True)
    kind_of(image)
    if entry["mark"] not in MARKS:
        raise ValueError("unknown mark of a picture")
    return Cell(image, _text(entry["alt"]), _text(entry["caption"]), entry["mark"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text was expected")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError("a number was expected")
    return float(value)


def _color(value: Any) -> str:
    if not re.fullmatch(r"#[0-9a-f]{6}", _text(value)):
        raise ValueError("a color of a legend is none")
    return str(value)
