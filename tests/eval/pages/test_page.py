"""Pages: words for every picture, nothing unescaped, and in a real browser no errors, light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.eval.pages.page import figure_section, page, write_page
from nearfar.eval.pictures.figures import Cell, Figure, Group, encoded
from nearfar.ssl.errors import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CELL = Cell(encoded(Image.new("RGB", (64, 64), "teal")), "a <teal> square", "1 < 2", "right")
FIGURE = Figure(
    "k", "T & T", "text <i>", (Group((("label <b>", (CELL,) * 5),), CELL),), (("<cat>", "#00ff00"),),
    points=((1.0, 2.0), (1.0, 3.0), (2.0, 4.0)), axes=("layer", "<px>"), table=(("<head>",), ("<cell>",)),
)  # fmt: skip


def test_everything_is_escaped_and_pictures_have_words() -> None:
    text = figure_section(FIGURE)
    for word in (
        "T &amp; T",
        "text &lt;i&gt;",
        "label &lt;b&gt;",
        "&lt;cat&gt;",
        "&lt;px&gt;",
        "&lt;head&gt;",
        "&lt;cell&gt;",
    ):
        assert word in text
    assert text.count('alt="a &lt;teal&gt; square, right"') == 6 and "\u2713 1 &lt; 2" in text
    assert text.count('<circle class="dot"') == 3


def test_dots_lie_higher_the_larger_they_are() -> None:
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure_section(FIGURE))
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in places]
    assert x0 == x1 < x2 and y0 > y1 > y2


def test_a_figure_without_pictures_says_why() -> None:
    text = figure_section(Figure("k", "Attention", missing="none <here>"))
    assert "none &lt;here&gt;" in text and "<img" not in text


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        write_page(tmp_path / "nowhere" / "page.html", "")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed here")
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_a_browser_shows_it_on_a_phone_without_complaint(tmp_path: Path, scheme: int, dark: bool) -> None:
    file, shot = write_page(tmp_path / "page.html", page("title", [figure_section(FIGURE)] * 2)), tmp_path / "shot.png"
    result = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", f"--screenshot={shot}",
            "--window-size=390,900", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert shot.is_file(), result.stderr
    assert ":CONSOLE" not in result.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (pixels[2, 2].sum() < 200) == dark
    teal = (abs(pixels - [0, 128, 128]).max(2) < 12).mean()
    assert teal > 0.02  # the pictures are there
