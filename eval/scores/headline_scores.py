"""From features to scores: the protocol, and the headline tasks (k-NN, linear probe, segmentation)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearfar.eval import fewshot, retrieval
from nearfar.eval.arrays import check_labeled
from nearfar.eval.features.extraction import Features, Reading, Size
from nearfar.eval.knn import KS, accuracy, classify, confusion, per_class
from nearfar.eval.linear import WEIGHT_DECAYS, linear_probe
from nearfar.eval.scores.tasks import label_numbers, mask_classes
from nearfar.eval.segmentation import ProbeTraining, segment_probe
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.patches import whole_patches

HEADLINE_K = 20  # fixed beforehand: choosing the best k by its score would look at the test set
PIXEL_SIDE = 16
POSITION_IMAGES = 1000  # at most, of each set: a few hundred thousand tokens fix a linear map
_MOST_IN_A_TABLE = 50  # classes whose confusions are kept as a table; of more, the most frequent ones are named


@dataclass(frozen=True)
class Protocol:
    """What is read of an image, and how the heads on top are trained.

    pooled: for everything that reads one vector an image. linear_layers, linear_poolings: where the probe should read
    others, such as "blocks-4" or "mean"; of several, held-out training images decide. augment: train the probe on
    random views, as DINO does. grid_size, grid_layer: of whole images, for segmentation; the size is by default
    that of the first training image in whole patches. dense_layer: for dense retrieval and the position probe.
    epochs: of the linear probe. head, steps: of the segmentation probe; "locat" is the paper's, trained on crops.
    window, stride: sides in pixels of the windows that segmentation slides over test images of any size (0: the
    whole image at its own size). memory: patches of dense retrieval. seed: of everything.
    """

    pooled: Reading
    linear_layers: tuple[str, ...] = ()
    linear_poolings: tuple[str, ...] = ()
    augment: bool = False
    grid_size: Size | None = None
    grid_layer: str = "last-block"
    dense_layer: str = "final"
    epochs: int = 100
    head: str = "linear"
    steps: int | None = None
    window: int | None = None
    stride: int | None = None
    memory: int = retrieval.MEMORY
    seed: int = 0

    def layers(self, task: str) -> tuple[str, ...]:
        if task in ("retrieval", "position"):
            return (self.dense_layer,)
        if task == "segment":
            return (self.grid_layer,)
        return self.linear_layers or (self.pooled.layer,) if task == "linear" else (self.pooled.layer,)

    def poolings(self, task: str) -> tuple[str, ...]:
        return self.linear_poolings or (self.pooled.pooling,) if task == "linear" else (self.pooled.pooling,)

    def linear_readings(self) -> dict[str, Reading]:
        """What the linear probe may read: every layer in every pooling, by name."""
        poolings = self.poolings("linear")
        return {
            layer if len(poolings) == 1 else f"{layer} {pooling}": replace(self.pooled, layer=layer, pooling=pooling)
            for layer in self.layers("linear")
            for pooling in poolings
        }

    def decides(self, task: str) -> dict[str, Any]:
        """What the score of a task depends on, besides weights and images; JSON-able."""
        compute = "bfloat16" if self.pooled.amp else "float32"
        if task in ("segment", "retrieval", "position"):
            size = self.pooled.size if task == "position" else self.grid_size
            sides = list(size) if isinstance(size, tuple) else size
            return {"layer": self.layers(task)[0], "size": sides, "compute": compute, **self.training(task)}
        pooling = ",".join(self.poolings(task))
        pooled = {"size": self.pooled.size, "resize": self.pooled.resize, "pooling": pooling}
        return {"layer": ",".join(self.layers(task)), **pooled, "compute": compute, **self.training(task)}

    def decides_of_pixels(self, task: str, patch: int) -> dict[str, Any]:
        """As `decides`, for raw pixels."""
        if task in ("segment", "retrieval", "position"):
            return {"patch": patch, "size": self.decides(task)["size"], **self.training(task)}
        plain = replace(self, augment=False)  # thumbnails are what they are
        return {"side": PIXEL_SIDE, **plain.training(task)}

    def training(self, task: str) -> dict[str, Any]:
        """What trains the head of a task and draws its random numbers; nothing does for k-NN."""
        seed = {"seed": self.seed}
        if task == "linear":
            augment = {"augment": True} if self.augment else {}
            return {"epochs": self.epochs, "decays": list(WEIGHT_DECAYS), **seed, **augment}
        if task == "segment":
            windows = {"window": self.window, "stride": self.stride}
            given = {key: value for key, value in windows.items() if value is not None}
            return {"head": self.head, "steps": self.steps, **seed, **given}
        others: dict[str, dict[str, Any]] = {
            "knn": {},
            "whitened": {},
            "logistic": {"strength": 1.0},
            "fewshot": {"shots": list(fewshot.SHOTS), "shares": list(fewshot.SHARES), "draws": fewshot.DRAWS, **seed},
            "retrieval": {"memory": self.memory, "k": retrieval.NEIGHBORS, **seed},
            "robustness": {"k": HEADLINE_K, **seed},
            "position": {"images": POSITION_IMAGES},
        }
        return others[task]


class TaskScore(NamedTuple):
    """The headline score of a task in percent, and everything else that its evaluator returns."""

    task: str
    percent: float
    detail: dict[str, Any]


def knn_score(
    train: Features, test: Features, ks: Iterable[int] = KS, *, device: torch.device | str = "cpu"
) -> TaskScore:
    """The headline score at k = 20; every k, top-5 and confusions in the detail.

    k beyond the training set is cut to its size, and a set that is scored on itself leaves each image out of its own
    neighbors (else the nearest one is the image itself); the detail says both.
    """
    ks = sorted({*ks, HEADLINE_K})
    y, labels = labels_of(train, test)
    itself = same_images(train, test)
    n, truth = len(train.x) - itself, check_labeled(test.x, labels, "test set of the k-NN")
    ranked = classify(train.x, y, None if itself else test.x, ks, device=device)
    headline = min(HEADLINE_K, n)
    detail: dict[str, Any] = {"k": headline, "top1": {str(k): accuracy(ranked[k], truth) for k in ranked}}
    if len(np.unique(y)) > 5:
        detail["top5"] = {str(k): accuracy(ranked[k], truth, top=5) for k in ranked}
    if itself:
        detail["leave_one_out"] = True
    if ks[-1] > n:
        detail["capped"] = f"k is at most {n}, the number of training images" + (" but one" if itself else "")
    detail |= _mistakes(ranked[headline][:, 0], truth, train.manifest.get("classes"))
    return TaskScore("knn", detail["top1"][str(headline)], {**detail, "features": origin_of(train, test)})


def _mistakes(predicted: Tensor, truth: Tensor, names: list[str] | None) -> dict[str, Any]:
    """Percent right for each class, the confusions as a table where that is small, and the ten most frequent ones."""
    classes = 1 + int(torch.maximum(predicted.max(), truth.max()))
    table = confusion(predicted, truth, classes)
    wrong = table - torch.diag(table.diag())
    count, index = wrong.flatten().topk(min(10, wrong.numel()))
    known = names if names is not None and len(names) >= classes else list(map(str, range(classes)))
    most = [
        {"class": known[at // classes], "taken_for": known[at % classes], "images": images}
        for images, at in zip(count.tolist(), index.tolist(), strict=True)
        if images
    ]
    found: dict[str, Any] = {"per_class": per_class(predicted, truth, classes), "most_confused": most}
    if classes > _MOST_IN_A_TABLE:
        return found
    return found | {"confusion": table.tolist(), "classes": known[:classes]}


def same_images(train: Features, test: Features) -> bool:
    given = train.manifest.get("dataset")
    return given is not None and given == test.manifest.get("dataset") and np.array_equal(train.index, test.index)


def linear_score(
    pairs: Mapping[str, tuple[Features, Features]], protocol: Protocol, *, device: torch.device | str = "cpu"
) -> TaskScore:
    """pairs: (training, test) features of the same images, by what was read; which are taken is in the detail."""
    first = next(iter(pairs.values()))
    y, truth = labels_of(*first)
    common: dict[str, Any] = {"epochs": protocol.epochs, "decays": WEIGHT_DECAYS, "seed": protocol.seed}
    if len(pairs) == 1:
        result = linear_probe(first[0].x, y, first[1].x, truth, **common, device=device)
        return TaskScore("linear", result["top1"], {**result, "features": origin_of(*first)})
    train, test = ({name: pair[side].x for name, pair in pairs.items()} for side in (0, 1))
    result = linear_probe(train, y, test, truth, **common, device=device)
    return TaskScore("linear", result["top1"], {**result, "features": origin_of(*pairs[result["chosen"]])})


def segment_score(
    train: Features,
    test: Features,
    protocol: Protocol,
    classes: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> TaskScore:
    """classes: None counts those of the masks, and refuses what is no class number."""
    sets = (train.x, train.mask_list()), (test.x, test.mask_list())
    if classes is None:
        classes = counted_classes(train, test, sets[0][1], sets[1][1])
    training = ProbeTraining(head=protocol.head, steps=protocol.steps, seed=protocol.seed)
    result = segment_probe(*sets, classes, training, device=device)
    detail = {**result, "head": protocol.head, "classes": classes, "features": origin_of(train, test)}
    return TaskScore("segment", result["miou"], detail)


def counted_classes(
    train: Features, test: Features, train_masks: list[np.ndarray], test_masks: list[np.ndarray]
) -> int:
    """How many classes the masks of both sets have, as `mask_classes` counts them."""
    named = [f"{which} image {i}" for which, x in (("training", train), ("test", test)) for i in x.index]
    return mask_classes(zip(named, [*train_masks, *test_masks], strict=True))


def native_grid(source: Source, patch: int) -> tuple[int, int]:
    """Height and width of the first readable image, rounded to whole patches."""
    for i in range(len(source)):
        try:
            width, height = source.read(i).size
        except BadImage:
            continue
        return whole_patches(height, patch), whole_patches(width, patch)
    raise UserError(f"None of the {len(source)} images could be read.")


def labels_of(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers of both, counted alike: the test set's by the training set's names, where both have names."""
    if train.labels is None or test.labels is None:
        raise UserError(
            "k-NN, linear probe and few-shot scores need labels, and these images have none: use class folders, or a "
            "list with labels."
        )
    numbers = label_numbers(train.manifest.get("classes"), test.manifest.get("classes"))
    return train.labels, test.labels if numbers is None else numbers[test.labels]


def origin_of(train: Features, test: Features) -> dict[str, Any]:
    """Which features a score was computed from, short enough to be stored with it."""
    keys = ("checkpoint", "features", "layer", "pooling", "norm", "prr", "size", "view", "compute", "side", "patch")
    origin = {key: train.manifest[key] for key in keys if key in train.manifest}
    unreadable, rescaled = {}, {}
    for name, features in (("train", train), ("test", test)):
        bad = features.manifest.get("bad", {})
        unreadable[name] = {"count": len(bad), "first": next((f"{file}: {why}" for file, why in bad.items()), None)}
        rescaled[name] = features.manifest.get("rescaled_masks")
    return {**origin, "unreadable": unreadable} | ({"rescaled_masks": rescaled} if any(rescaled.values()) else {})
