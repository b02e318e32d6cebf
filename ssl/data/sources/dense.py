"""Data sets with a class for every pixel, as they are published: Pascal VOC, ADE20K, COCO-Stuff.

A split is named by the path that lists or holds its images, and its masks are found from there:

    VOC2012/ImageSets/Segmentation/train.txt    JPEGImages/NAME.jpg, SegmentationClass/NAME.png
    ADEChallengeData2016/images/training        annotations/training/NAME.png, where 0 = ignore
    coco/train2017 (or coco/images/train2017)   stuffthingmaps/train2017/NAME.png, at either level

(`images` beside `masks`, as CamVid often comes, needs nothing of this: `nearfar.ssl.data.sources.files`.)
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.ssl.data.missing import SUFFIXES, found_in
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.files import FolderSource, PathSource
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import printable

IGNORE = 255
_SPLIT_LIST = ("ImageSets", "Segmentation")
_COCO_SPLITS = ("train2017", "val2017")
_COCO_MASKS = ("stuffthingmaps", "stuffthingmaps_trainval2017")


@dataclass(frozen=True)
class MaskCode:
    """What the values of a data set's masks mean: 0 to classes - 1, each plus `shift`; `unlabeled` = ignore."""

    title: str
    classes: int
    shift: int
    unlabeled: tuple[int, ...]
    names: tuple[str, ...] = ()  # of the classes, where the data set does not come with a list of them
    list_name: str = ""  # the file at its root that lists them: lines of a number from 1 on and, at the end, a name

    def decode(self, mask: NDArray[np.uint8], file: str) -> NDArray[np.uint8]:
        """Classes from 0, 255 = ignore. Raises UserError, naming file and value, for a value without meaning."""
        table = np.full(256, -1, np.int16)
        table[self.shift : self.shift + self.classes] = np.arange(self.classes)
        table[list(self.unlabeled)] = IGNORE
        decoded = table[mask]
        if (decoded < 0).any():
            value = int(mask[decoded < 0].min())
            raise UserError(
                f"The mask {file} has the value {value}, which {self.title} does not know: classes are {self.shift} to "
                f"{self.shift + self.classes - 1}, and {' or '.join(map(str, self.unlabeled))} is ignored."
            )
        return decoded.astype(np.uint8)


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv/monitor",
)  # fmt: skip
VOC = MaskCode("Pascal VOC", 21, 0, (255,), VOC_NAMES)
ADE20K = MaskCode("ADE20K", 150, 1, (0,), list_name="objectInfo150.txt")
COCO_STUFF = MaskCode("COCO-Stuff", 182, 0, (255,), list_name="labels.txt")  # 171 of the numbers are in use
_LISTED = re.compile(r"\s*(?P<number>\d+)(?::|\t(?:.*\t)?)\s*(?P<name>[^\t,;]+)")  # the first of synonyms


class MaskedSource(PathSource):
    """Images and masks of one of these data sets: `PathSource` whose masks are decoded by `code`."""

    def __init__(self, root: Path, names: Sequence[str], masks: Sequence[Path], code: MaskCode) -> None:
        super().__init__(root, names, masks=[str(mask) for mask in masks])
        self.code = code
        if missing := [mask for mask in masks if not mask.is_file()]:
            raise UserError(
                f"{len(missing)} of the {len(masks)} masks of {root} are missing, the first of them {missing[0]}."
            )

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        mask = super().mask(i)
        assert self.masks is not None
        return None if mask is None else self.code.decode(mask, self.masks[i])


def known_classes(source: Source) -> int | None:
    """How many classes the masks of a source have, where its data set fixes that."""
    return source.code.classes if isinstance(source, MaskedSource) else None


def published_names(source: Source) -> list[str] | None:
    """What the classes of a source's masks are called, where its data set says so."""
    if not isinstance(source, MaskedSource):
        return None
    code = source.code
    return list(code.names) or _listed_names(Path(source.root), code)


def _listed_names(images: Path, code: MaskCode) -> list[str] | None:
    """From the list of names that comes with the data set, above the folder of the images; None without one."""
    lists = [above / code.list_name for above in images.absolute().parents[:3]]
    try:
        lines = next((file.read_text("utf-8").splitlines() for file in lists if file.is_file()), [])
    except (OSError, ValueError):
        return None
    found = {int(line["number"]) - 1: line["name"].strip() for line in map(_LISTED.match, lines) if line}
    names = [printable(found.get(number, f"class {number}")) for number in range(code.classes)]
    return names if any(number in found for number in range(code.classes)) else None


def dense_source(path: Path) -> MaskedSource | None:
    """The split at a path, where it belongs to one of these data sets; None where it does not.

    Raises UserError for a split with missing files, and for the folder of a whole data set: which split is wanted?
    """
    if path.suffix == ".txt" and path.absolute().parts[-3:-1] == _SPLIT_LIST and os.path.isfile(path):
        return _voc(path)
    if not os.path.isdir(path):
        return None
    _refuse_whole(path)
    folder = path.absolute()
    if folder.parent.name == "images" and os.path.isdir(annotations := folder.parents[1] / "annotations" / folder.name):
        return _folder(path, annotations, ADE20K)
    if folder.name in _COCO_SPLITS:
        for above in folder.parents[:2]:
            for name in _COCO_MASKS:
                if os.path.isdir(above / name / folder.name):
                    return _folder(path, above / name / folder.name, COCO_STUFF)
    return None


def _voc(file: Path) -> MaskedSource:
    root = file.absolute().parents[2]
    try:
        names = file.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a list of image names: {error}.") from None
    if not names:
        raise UserError(f"{file} is empty: one image name a line is needed.")
    images = [f"{name}.jpg" for name in names]
    if missing := [name for name in images if not (root / "JPEGImages" / name).is_file()]:
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {file} are missing, the first of them "
            f"{root / 'JPEGImages' / missing[0]}."
        )
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    return MaskedSource(root / "JPEGImages", images, masks, VOC)


def _folder(root: Path, masks: Path, code: MaskCode) -> MaskedSource:
    found = FolderSource(root)
    if found.labels is not None:
        raise UserError(f"{root} has folders in it; the images of {code.title} lie side by side: {found_in(root)}")
    source = MaskedSource(root, found.names, [(masks / name).with_suffix(".png") for name in found.names], code)
    source.passed_over = found.passed_over
    return source


def _refuse_whole(root: Path) -> None:
    """Raises UserError for the folder of a whole data set, whose sub-folders would look like classes."""
    lists = root.joinpath(*_SPLIT_LIST)
    if os.path.isdir(root / "JPEGImages") and os.path.isdir(lists):
        splits = [lists / f"{name}.txt" for name in ("train", "val")]
    elif os.path.isdir(root / "images" / "training") and os.path.isdir(root / "annotations"):
        splits = [root / "images" / name for name in ("training", "validation")]
    elif any(os.path.isdir(root / name) for name in _COCO_MASKS) and not _holds_images(root):
        splits = [(root / "images" if os.path.isdir(root / "images") else root) / name for name in _COCO_SPLITS]
    else:
        return
    raise UserError(f"{root} holds a whole data set. Name a split of it: --train {splits[0]} --val {splits[1]}.")


def _holds_images(root: Path) -> bool:
    return any(entry.suffix.lower() in SUFFIXES for entry in root.iterdir() if entry.is_file())
