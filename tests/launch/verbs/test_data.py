"""`nearfar data` from its command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.launch.cli import main
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.sources.beton import BetonSource

pytestmark = pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(12):
        target = tmp_path / "in" / f"class{i % 2}" / f"{i:02}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60 + i, 90, 3), np.uint8)).save(target)
    return tmp_path / "in"


def test_write_look_and_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.beton"
    assert main(["data", "beton", str(folder), str(out)]) == 0
    text = capsys.readouterr().out
    assert "12 images (12 JPEGs as they were, 0 encoded, 0 as pixels)" in text and "12 of 12" in text
    assert main(["data", "info", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("12 images", "image (image), name (JSON), label (integer)", "width 90 to 90, height 60 to 71",
                 "2 classes, named class0, class1", "class0/00.jpg", "max_side 512"):  # fmt: skip
        assert part in text
    assert main(["data", "check", str(out)]) == 0
    assert main(["data", "check", str(folder)]) == 0
    assert "all 12 images can be read" in capsys.readouterr().out


def test_settings_of_the_writer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.beton"
    assert main(["data", "beton", str(folder), str(out), "--max-side", "45", "--raw-side", "0"]) == 0
    assert BetonSource(out).size.max() == 45
    assert main(["data", "beton", str(folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "beton", str(folder), str(out), "--force", "--max-side", "0"]) == 0
    assert BetonSource(out).size.max() == 90


def test_bad_images_are_listed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "class0" / "02.jpg").write_bytes(b"no image")
    out = tmp_path / "out.beton"
    assert main(["data", "check", str(folder)]) == 2
    shown = capsys.readouterr()
    assert "bad  class0/02.jpg: not an image" in shown.out and "1 of the 12 images" in shown.err
    assert main(["data", "beton", str(folder), str(out), "--on-bad", "stop"]) == 2
    assert "02.jpg: not an image" in capsys.readouterr().err and not out.exists()
    assert main(["data", "beton", str(folder), str(out)]) == 0
    text = capsys.readouterr().out
    assert "bad  class0/02.jpg" in text and "11 images" in text and "1 left out as bad" in text
    data = bytearray(out.read_bytes())
    begin, size = BetonSource(out)._extent[4]
    data[begin + size // 2 : begin + size] = bytes(size - size // 2)
    out.write_bytes(data)
    assert main(["data", "check", str(out)]) == 2
    assert "class0/10.jpg" in capsys.readouterr().out


def test_what_is_no_beton_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.beton").write_bytes(b"x" * 5000)
    assert main(["data", "info", str(tmp_path / "a.beton")]) == 2
    assert "is not a .beton" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path / "b.beton")]) == 2
    assert "There is nothing at" in capsys.readouterr().err


def test_a_recipe_given_to_info_is_told_from_a_beton_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("train: {epochs: 3}\n", "train: {epochs: 3}\n" * 9):
        (tmp_path / "my.yaml").write_text(text)
        assert main(["data", "info", str(tmp_path / "my.yaml")]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "my.yaml is not a .beton" in message
        assert "SRC my.yaml" not in message and "rite it again" not in message


def test_sizes_are_judged_as_pretraining_judges_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("dot", (1, 1)), ("ribbon", (3000, 5)), ("strip", (3000, 40))):
        Image.new("RGB", size).save(folder / "class0" / f"{name}.jpg")
    assert main(["data", "check", str(folder)]) == 2
    shown = capsys.readouterr()
    assert "2 of the 15 images" in shown.err
    for line in ("class0/dot.jpg: 1 x 1 pixels, below data.min_side = 8", "class0/ribbon.jpg: 3000 x 5 pixels, below"):
        assert f"bad  {line}" in shown.out
    out = tmp_path / "out.beton"
    assert main(["data", "beton", str(folder), str(out)]) == 0
    assert "2 left out as bad" in capsys.readouterr().out
    assert BetonSource(out).size.min() == 8  # the strip: 512 x 7 would be bad, and it is not
    assert main(["data", "check", str(out)]) == 0
    assert main(["data", "check", str(folder), "--min-side", "1"]) == 0
    assert main(["data", "check", str(out), "--min-side", "61"]) == 2


def test_files_passed_over_for_their_type_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.avif", "b.jp2", "c.avif", "noending", "\x1b[2J"):
        (folder / "class1" / name).write_bytes(b"x")
    for command in (["check", str(folder)], ["beton", str(folder), str(tmp_path / "out.beton")]):
        assert main(["data", *command]) == 0
        output = capsys.readouterr().out
        assert "skipped because of their type  2 .avif (class1/a.avif), 2 without an ending (class1/" in output
        assert "1 .jp2 (class1/b.jp2)" in output and "\x1b" not in output


def test_names_reach_the_terminal_escaped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = b"\x1b[2J\xff.jpg".decode("utf-8", "surrogateescape")
    (folder / "class0" / hostile).write_bytes(b"no image")
    (folder / "class0" / "00.jpg").rename(folder / "class0" / ("[bold]" + hostile))
    out = tmp_path / "[red]out.beton"
    assert main(["data", "check", str(folder)]) == 2
    assert r"bad  class0/\x1b[2J\xff.jpg: not an image" in capsys.readouterr().out
    assert main(["data", "beton", str(folder), str(out)]) == 0
    assert main(["data", "info", str(out)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_places_that_cannot_be_written_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "beton", str(folder), "/proc/self/n.beton"]) == 2
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
    assert main(["data", "beton", str(folder), str(tmp_path / ("n" * 300 + ".beton"))]) == 2
    assert "File name too long" in " ".join(capsys.readouterr().err.split())
