"""`nearfar data` from its command line."""

import numpy as np
import pytest
from PIL import Image

from nearfar.launch.cli import main
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.sources.beton import BetonSource

pytestmark = pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        place = tmp_path / "in" / f"class{i % 2}" / f"{i:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60 + i, 90, 3), np.uint8)).save(place)
    return tmp_path / "in"


def test_write_look_and_check(folder, tmp_path, capsys):
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


def test_settings_of_the_writer(folder, tmp_path, capsys):
    out = tmp_path / "out.beton"
    assert main(["data", "beton", str(folder), str(out), "--max-side", "45", "--raw-side", "0"]) == 0
    assert BetonSource(out).size.max() == 45
    assert main(["data", "beton", str(folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "beton", str(folder), str(out), "--force", "--max-side", "0"]) == 0
    assert BetonSource(out).size.max() == 90


def test_bad_images_are_listed(folder, tmp_path, capsys):
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


def test_what_is_no_beton_is_told(tmp_path, capsys):
    (tmp_path / "a.beton").write_bytes(b"x" * 5000)
    assert main(["data", "info", str(tmp_path / "a.beton")]) == 2
    assert "not a .beton of version 2" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path / "b.beton")]) == 2
    assert "cannot be read" in capsys.readouterr().err
