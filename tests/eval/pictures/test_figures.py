"""figures.json comes back as it was written, and nothing else is taken for it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nearfar.eval.pictures.figures import FORMAT, Cell, Figure, Group, encoded, kind_of, read, write
from nearfar.ssl.errors import UserError

PHOTO = encoded(Image.new("RGB", (8, 8), "green"))
CELL = Cell(PHOTO, "a query", "caf\u00e9 <b>", "right")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    figures = [
        Figure("a", "A", "text", (Group((("trained", (CELL, CELL)),), CELL),), (("cat", "#00ff00"),), "medium"),
        Figure("b", "B", missing="no attention"),
        Figure("c", "C", points=((1.0, 2.5), (2.0, 0.0)), axes=("layer", "px"), table=(("x", "y"), ("1", "2"))),
    ]
    write(tmp_path / "figures.json", figures)
    assert read(tmp_path / "figures.json") == figures
    assert read(tmp_path / "none.json") == []


def test_photographs_are_jpeg_and_what_must_be_exact_is_png() -> None:
    picture = Image.new("RGB", (8, 8))
    assert kind_of(encoded(picture)) == "jpeg"
    assert kind_of(encoded(picture, exact=True)) == kind_of(encoded(picture.convert("RGBA"))) == "png"
    with pytest.raises(ValueError, match="neither"):
        kind_of(b"<svg onload=...>")


def entry(**changed: Any) -> dict[str, Any]:
    cell = {"image": base64.b64encode(PHOTO).decode(), "alt": "", "caption": "", "mark": ""}
    cell |= {key: changed.pop(key) for key in ("image", "mark") if key in changed}
    plain: dict[str, Any] = {
        "key": "k",
        "title": "t",
        "text": "",
        "size": "small",
        "missing": "",
        "of": "",
        "legend": [],
        "points": [],
    }
    plain |= {"axes": ["", ""], "table": [], "groups": [{"lead": None, "strips": [["", [cell]]]}]}
    return plain | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"image": base64.b64encode(b"<svg/>").decode()},
        {"image": "not base 64!"},
        {"mark": '"><script>'},
        {"size": "huge"},
        {"title": 7},
        {"legend": [["x", "red;background:url(//a)"]]},
        {"points": [[1, float("nan")]]},
        {"table": [[1]]},
        {"groups": {}, "axes": ["one"]},
    ],
)
def test_what_could_harm_a_page_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"format": FORMAT, "figures": [entry()]}))
    assert len(read(file)) == 1
    file.write_text(json.dumps({"format": FORMAT, "figures": [entry(**changed)]}))
    with pytest.raises(UserError, match=r"figures\.json does not hold figures"):
        read(file)
