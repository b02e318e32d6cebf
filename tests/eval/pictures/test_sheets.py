"""Sheets: neighbors are marked by their class, masks are painted and named."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from nearfar.eval.pictures.sheets import (
    BACKGROUND,
    COLORS,
    mask_color,
    mask_group,
    mask_names,
    neighbor_groups,
    same_class,
    square,
)
from nearfar.ssl.data.sources.base import ArraySource


def source(labels: list[int] | None, classes: list[str] | None = None) -> ArraySource:
    count = 6 if labels is None else len(labels)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 12, 3), 20, np.uint8)
    return ArraySource(images, labels, classes=classes)


def test_neighbors_are_right_by_the_name_of_their_class() -> None:
    queries, memory = source([0, 1], ["cat", "dog"]), source([0, 1, 1], ["dog", "cat"])  # counted differently
    found = np.array([[1, 0], [1, 0]])
    groups = neighbor_groups((queries, [0, 1]), memory, {"trained": found})
    assert [[cell.mark for cell in group.strips[0][1]] for group in groups] == [["right", "wrong"], ["wrong", "right"]]
    assert groups[0].lead is not None and groups[0].lead.caption == "cat"
    assert same_class((queries, [0, 1]), memory, found) == 50.0


def test_a_class_is_shown_by_its_description_and_told_apart_by_its_name() -> None:
    queries, memory = source([0, 1], ["n1", "n2"]), source([0, 1, 1], ["n2", "n1"])
    lists = {"trained": np.array([[1, 0], [1, 0]])}
    plain = neighbor_groups((queries, [0, 1]), memory, lists)
    groups = neighbor_groups((queries, [0, 1]), memory, lists, {"n1": "crane", "n2": "crane"})
    assert {cell.caption for group in groups for cell in group.strips[0][1]} == {"crane"}
    assert [group.lead.caption for group in groups if group.lead] == ["crane", "crane"]
    marks = [[[cell.mark for cell in group.strips[0][1]] for group in each] for each in (plain, groups)]
    assert marks[0] == marks[1] == [["right", "wrong"], ["wrong", "right"]]


def test_without_labels_nothing_is_marked() -> None:
    plain = source(None)
    (group,) = neighbor_groups((plain, [0]), plain, {"trained": np.array([[1, 2]])})
    assert [cell.mark for cell in group.strips[0][1]] == ["", ""]
    assert same_class((plain, [0]), plain, np.array([[1]])) is None


def test_the_square_is_the_middle_of_the_image() -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 255
    assert (np.asarray(square(ArraySource(image[None]), 0, 16)) == 255).all()


def test_names_of_masks() -> None:
    assert mask_names(3, ["a", "b"]) == ["background", "a", "b"]
    assert mask_names(2, ["a", "b"]) == ["a", "b"]
    assert mask_names(2, None) == mask_names(2, ["x"] * 5) == ["class 0", "class 1"]
    assert mask_color(0, ["background", "a"]) == BACKGROUND and mask_color(1, ["background", "a"]) == COLORS[0]


def test_a_predicted_mask_stands_beside_the_truth_with_its_share_of_right_pixels() -> None:
    truth = np.array([[0, 1], [1, 255]], np.uint8)
    predicted = np.array([[0, 1], [0, 1]])
    group = mask_group(Image.new("RGB", (2, 2)), truth, predicted, ["background", "cat"], side=2)
    _, shown, answer = group.strips[0][1]
    assert shown.caption == "truth: cat" and answer.caption == "predicted: cat (67 % of pixels right)"
    pixels = np.asarray(Image.open(BytesIO(answer.image)))
    assert pixels[1, 1].tolist() == [255, 255, 255]  # where the truth is not known, nothing is right or wrong
    assert pixels[0, 1].tolist() == [int(COLORS[0][at : at + 2], 16) for at in (1, 3, 5)]
