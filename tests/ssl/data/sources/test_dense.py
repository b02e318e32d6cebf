"""Data sets with masks as they are published, drawn tiny: which mask belongs to which image, what its values mean."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.sources.dense import known_classes, published_names
from nearfar.ssl.errors import UserError

SIDE = 8


def save(file: Path, pixels: np.ndarray, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:  # indices into colors, as VOC has them
        image = image.convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
        assert image.mode == "P"
    image.save(file)


def photograph(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def mask_of(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (SIDE, SIDE))


def voc(root: Path) -> Path:
    for i, name in enumerate(("2007_1", "2007_2", "2007_3")):
        save(root / "JPEGImages" / f"{name}.jpg", photograph(i))
        if i < 2:
            save(root / "SegmentationClass" / f"{name}.png", mask_of(0, 20 - i, 255), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    return lists / "train.txt"


def ade(root: Path) -> Path:
    for i in range(2):
        save(root / "images" / "training" / f"ADE_train_{i}.jpg", photograph(i))
        save(root / "annotations" / "training" / f"ADE_train_{i}.png", mask_of(0, 1 + i, 150))
    return root / "images" / "training"


def coco(root: Path, images: str, masks: str) -> Path:
    for i in range(2):
        save(root / images / "train2017" / f"{i:012}.jpg", photograph(i))
        save(root / masks / "train2017" / f"{i:012}.png", mask_of(i, 181, 255))
    return root / images / "train2017"


def test_voc_is_a_list_of_names_and_indices_of_a_palette(tmp_path: Path) -> None:
    source = open_source(voc(tmp_path / "VOC2012"))
    assert [source.name(i) for i in range(len(source))] == ["2007_2.jpg", "2007_1.jpg"]
    for i, last in enumerate((19, 20)):
        assert np.array_equal(source.mask(i), mask_of(0, last, 255))
    assert known_classes(source) == 21 and source.labels is None
    assert source.read(0).size == (SIDE, SIDE)


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    source = open_source(ade(tmp_path))
    assert np.array_equal(source.mask(0), mask_of(255, 0, 149))
    assert np.array_equal(source.mask(1), mask_of(255, 1, 149))
    assert known_classes(source) == 150


@pytest.mark.parametrize("images", ["", "images"])
@pytest.mark.parametrize("masks", ["stuffthingmaps", "stuffthingmaps_trainval2017"])
def test_coco_stuff_has_its_maps_beside_the_images(tmp_path: Path, images: str, masks: str) -> None:
    source = open_source(coco(tmp_path, images, masks))
    assert np.array_equal(source.mask(1), mask_of(1, 181, 255))
    assert known_classes(source) == 182


def test_classes_have_the_names_that_their_data_set_gives_them(tmp_path: Path) -> None:
    source = open_source(voc(tmp_path / "VOC2012"))
    names = published_names(source)
    assert names and len(names) == 21 and (names[0], names[15], names[20]) == ("background", "person", "tv/monitor")
    scenes = open_source(ade(tmp_path / "ade"))
    assert published_names(scenes) is None
    listed = "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n150\t0.0001\t100\t10\tflag, banner\n"
    (tmp_path / "ade" / "objectInfo150.txt").write_text(listed)
    names = published_names(scenes)
    assert names and len(names) == 150 and (names[0], names[1], names[149]) == ("wall", "class 1", "flag")
    things = open_source(coco(tmp_path / "coco", "images", "stuffthingmaps"))
    (tmp_path / "coco" / "labels.txt").write_text("0: unlabeled\n1: person\n182: wood\n")
    names = published_names(things)
    assert names and len(names) == 182 and (names[0], names[181]) == ("person", "wood")
    (tmp_path / "coco" / "labels.txt").write_bytes(b"\xff\xfe")
    assert published_names(things) is None
    assert published_names(ArraySource(np.zeros((2, 8, 8, 3), np.uint8))) is None


def test_a_plain_folder_needs_no_layout(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.jpg", photograph(0))
    save(tmp_path / "masks" / "a.png", mask_of(0, 200))
    source = open_source(tmp_path / "images")
    assert np.array_equal(source.mask(0), mask_of(0, 200)) and known_classes(source) is None


def test_a_value_without_meaning_is_named_with_its_file(tmp_path: Path) -> None:
    folder = ade(tmp_path / "ade")
    save(tmp_path / "ade" / "annotations" / "training" / "ADE_train_1.png", mask_of(0, 151))
    with pytest.raises(UserError, match=r"ADE_train_1\.png has the value 151, which ADE20K does not know.* 1 to 150"):
        open_source(folder).mask(1)
    split = voc(tmp_path / "voc")
    save(tmp_path / "voc" / "SegmentationClass" / "2007_1.png", mask_of(0, 21), palette=True)
    with pytest.raises(UserError, match=r"2007_1\.png has the value 21, which Pascal VOC does not know.* 255 is ign"):
        open_source(split).mask(1)


def test_missing_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    split = voc(tmp_path / "voc")
    split.write_text("2007_1\n2007_3\n")
    with pytest.raises(UserError, match=r"1 of the 2 masks .*2007_3\.png"):
        open_source(split)
    split.write_text("2007_1\n2007_9\n")
    with pytest.raises(UserError, match=r"1 of the 2 images .*2007_9\.jpg"):
        open_source(split)
    split.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        open_source(split)


def test_a_whole_data_set_is_told_how_a_split_is_named(tmp_path: Path) -> None:
    voc(tmp_path / "voc")
    with pytest.raises(UserError, match=r"--train .*Segmentation/train\.txt --val .*Segmentation/val\.txt"):
        open_source(tmp_path / "voc")
    ade(tmp_path / "ade")
    with pytest.raises(UserError, match=r"--train .*images/training --val .*images/validation"):
        open_source(tmp_path / "ade")
    coco(tmp_path / "coco", "images", "stuffthingmaps")
    with pytest.raises(UserError, match=r"--train .*images/train2017 --val .*images/val2017"):
        open_source(tmp_path / "coco")
