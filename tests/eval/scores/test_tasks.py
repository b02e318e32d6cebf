"""What can be scored is known, and what cannot is said, before anything is computed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.eval.scores.tasks import Data, listed_names, mask_classes, plan
from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError

IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
MASKS = np.tile(np.array([0, 1, 2, 255], np.uint8), (4, 8, 2))
LABELED = Data("labeled", ArraySource(IMAGES, labels=[0, 1, 0, 1]))
MASKED = Data("masked", ArraySource(IMAGES, masks=MASKS))
BOTH = Data("both", ArraySource(IMAGES, labels=[0, 1, 0, 1], masks=MASKS))
OTHERS = Data("others", ArraySource(IMAGES + 1, labels=[0, 1, 0, 1], masks=MASKS))
BARE = Data("bare", ArraySource(IMAGES))


def test_all_means_what_the_images_allow() -> None:
    assert plan(BOTH, OTHERS)[:3] == (("knn", "linear", "logistic", "fewshot", "segment"), 3, ())
    labels = plan(LABELED, BOTH)
    assert labels.tasks == ("knn", "linear", "logistic", "fewshot") and labels.classes is None
    assert [line[:38] for line in labels.left_out] == ["Left out: mIoU. labeled has no masks. "]
    masks = plan(MASKED, OTHERS)
    assert masks.tasks == ("segment",) and masks.classes == 3
    assert masks.left_out[0].startswith(
        "Left out: k-NN top-1, linear top-1, logistic top-1 and few-shot top-1. masked has no labels. "
    )


def test_what_was_asked_for_and_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"labeled has no masks\. Masks are 8-bit PNGs.*255 = ignore"):
        plan(LABELED, LABELED, ["segment"])
    with pytest.raises(UserError, match="masked and bare have no labels"):
        plan(MASKED, BARE, ["knn"])
    with pytest.raises(UserError, match=r"no labels.*no masks"):
        plan(BARE, BARE)
    with pytest.raises(UserError, match="Unknown evaluation detect"):
        plan(BOTH, BOTH, ["detect"])


def test_what_has_been_learned_is_not_scored() -> None:
    """The linear probe of the very images that it learned from was scored, without a word."""
    planned = plan(BOTH, BOTH)
    assert planned.tasks == ("knn",)
    assert planned.left_out[0].startswith(
        "Left out: linear top-1, logistic top-1, few-shot top-1 and mIoU. both would be learned from and scored on"
    )
    again = Data("again", BOTH.source)
    for task in ("linear", "segment", "retrieval", "position"):
        with pytest.raises(UserError, match=r"both and again would be learned from and scored on.*--val"):
            plan(BOTH, again, [task])
    assert plan(BOTH, again, ["robustness"]).tasks == ("robustness",)


def test_class_folders_must_be_the_same() -> None:
    other = Data("other", ArraySource(IMAGES, labels=[0, 1, 0, 1], classes=["ape", "eel"]))
    known = Data("known", ArraySource(IMAGES, labels=[0, 1, 0, 1], classes=["ape", "bee"]))
    with pytest.raises(UserError, match="eel"):
        plan(known, other)


def masks(*values: int) -> list[tuple[str, np.ndarray]]:
    return [("first.png", np.zeros((2, 2), np.uint8)), ("second.png", np.array([values], np.uint8))]


def test_classes_are_counted_unless_they_are_told() -> None:
    assert mask_classes(masks(1, 2, 255)) == 3
    assert mask_classes(masks(1, 2, 255), classes=11) == 11
    assert mask_classes(masks(200), classes=201) == 201


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ((1, 2, 200), None, r"second\.png has class 200.*--classes 201"),
        ((1, 11), 11, r"second\.png has class 11, but there are 11 classes \(0 to 10; 255 = ignore\)"),
        ((0, 255), None, r"of class 0, or 255 = ignore"),
    ],
)
def test_impossible_classes_name_the_mask(values: tuple[int, ...], classes: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mask_classes(masks(*values), classes)


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("0 sky\n1 paved road\n255 ignore\n", ["sky", "paved road"]),
        ("sky\npaved road\n", ["sky", "paved road"]),
        ("1 road\n0 sky\n", ["sky", "road"]),
        ("0 sky\n2 road\n", None),
        ("0\n1\n", None),
        ("\n", None),
    ],
)
def test_names_of_mask_classes_come_from_the_list_beside_the_images(
    tmp_path: Path, listed: str, names: list[str] | None
) -> None:
    (tmp_path / "classes.txt").write_text(listed)
    assert listed_names(str(tmp_path / "images" / "train")) == names
    assert listed_names(str(tmp_path / "train")) is None


@pytest.mark.parametrize("listed", ["0 sky\n1 road\n255 ignore\n", "sky\nroad\n"])
def test_a_list_of_classes_beside_the_images_is_believed(tmp_path: Path, listed: str) -> None:
    (tmp_path / "classes.txt").write_text(listed)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(2):
        Image.fromarray(IMAGES[0]).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.array([[0, 1, i, 255]], np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    data = Data(str(tmp_path / "images"), open_source(tmp_path / "images"))
    others = Data("others", ArraySource(IMAGES + 1, masks=MASKS % 2))
    assert plan(data, others).classes == 2
    (tmp_path / "classes.txt").write_text("\n")  # says nothing: the masks do
    assert plan(data, others).classes == 2
    (tmp_path / "classes.txt").write_text(listed)
    Image.fromarray(np.array([[0, 2]], np.uint8)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(UserError, match=r"1\.png has class 2, but there are 2 classes"):
        plan(data, others)
