"""Labels of other images are those of the same classes, or refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar.ssl.data.labels import class_descriptions, labels_as
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError


def test_labels_of_other_images_are_matched_by_name() -> None:
    classes = ["red", "green", "blue"]
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    other = ArraySource(pixels, [0, 1, 0], classes=["blue", "red"])
    assert labels_as(classes, other, "val").tolist() == [2, 0, 2]
    assert labels_as(classes, ArraySource(pixels, [2, 1, 0]), "val").tolist() == [2, 1, 0]
    with pytest.raises(UserError, match=r"1 classes of val are not among .*: pink. It knows red, green, blue"):
        labels_as(classes, ArraySource(pixels, [0, 1, 1], classes=["red", "pink"]), "val")
    with pytest.raises(UserError, match="trained on: 3"):
        labels_as(classes, ArraySource(pixels, [0, 3, 1]), "val")


def test_classes_are_described_by_a_list_in_the_folder_or_beside_it(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "classes.txt").write_text("n01440764 tench\nn02102040\tEnglish springer\n\nplain\n")
    expected = {"n01440764": "tench", "n02102040": "English springer"}
    for path in (tmp_path, tmp_path / "val", tmp_path / "images.beton"):
        assert class_descriptions(str(path)) == expected
    (tmp_path / "val" / "classes.txt").write_text("n01440764 a fish\n")
    assert class_descriptions(str(tmp_path / "val")) == {"n01440764": "a fish"}


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"airplane\nbird\n"])
def test_without_a_list_that_can_be_read_classes_have_their_own_names(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    assert class_descriptions(str(tmp_path)) == {}
