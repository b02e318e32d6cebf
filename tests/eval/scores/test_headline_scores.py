"""From a backbone and two sources to scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.eval.features.extraction import Features, Reading, extract
from nearfar.eval.knn import knn, leave_one_out
from nearfar.eval.linear import linear_probe
from nearfar.eval.scores.evaluation import evaluate, evaluate_pixels
from nearfar.eval.scores.headline_scores import Protocol, knn_score, native_grid, segment_score
from nearfar.eval.segmentation import ProbeTraining, segment_probe
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError

Setting = tuple[Backbone, ArraySource, ArraySource]


@pytest.fixture(scope="module")
def setting(colored: Callable[..., Any]) -> Setting:
    torch.manual_seed(0)
    model = create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=2, num_heads=2, prr=True)
    return model, colored(120, 0), colored(40, 1)


def test_scores_are_those_of_the_evaluators_on_the_features(setting: Setting) -> None:
    model, train, test = setting
    protocol = Protocol(Reading(16), linear_layers=("blocks-2",), epochs=5, steps=20)
    got = {score.task: score for score in evaluate(model, (train, test), protocol)}
    a, b = extract(model, train, Reading(16)), extract(model, test, Reading(16))
    assert got["knn"].percent == knn(a.x, a.labels, b.x, b.labels, (20,))[20]
    a, b = (extract(model, source, Reading(16, layer="blocks-2")) for source in (train, test))
    assert got["linear"].percent == linear_probe(a.x, a.labels, b.x, b.labels, epochs=5)["top1"]
    a, b = (extract(model, source, Reading(16, layer="last-block", pooling="grid")) for source in (train, test))
    expected = segment_probe((a.x, a.mask_list()), (b.x, b.mask_list()), 4, ProbeTraining(steps=20))
    assert got["segment"].percent == expected["miou"]
    assert got["knn"].detail["features"]["prr"] is True
    assert got["segment"].detail["features"]["prr"] is False
    assert got["segment"].detail["features"]["norm"] is False
    for score in got.values():
        assert json.loads(json.dumps(score.detail, allow_nan=False)) == score.detail


def test_pixels_solve_what_pixels_can(setting: Setting) -> None:
    _, train, test = setting
    protocol = Protocol(Reading(16), epochs=20, steps=400)
    got = {score.task: score.percent for score in evaluate_pixels((train, test), protocol, patch=4)}
    assert got["knn"] > 50
    assert got["segment"] > 40
    assert [score.task for score in evaluate_pixels((train, test), protocol, ("knn",), patch=4)] == ["knn"]


def test_k_capped_by_the_training_set_is_said() -> None:
    x = Features(np.eye(5, dtype=np.float32), np.arange(5), np.arange(5))
    got = knn_score(x, x)
    assert got.detail["k"] == 5
    assert list(got.detail["top1"]) == ["5"]
    assert "at most 5" in got.detail["capped"]


def test_a_class_is_the_same_whatever_its_number() -> None:
    """The validation folder lacks one class, so its class folders are counted otherwise."""
    x = np.eye(4, dtype=np.float32)
    train = Features(x, np.arange(4), np.arange(4), manifest={"classes": ["ape", "bee", "cat", "dog"]})
    test = Features(x[[0, 2, 3]], np.arange(3), np.arange(3), manifest={"classes": ["ape", "cat", "dog"]})
    assert knn_score(train, test).detail["top1"]["4"] == 100.0
    strange = Features(x[:1], np.arange(1), np.arange(1), manifest={"classes": ["eel"]})
    with pytest.raises(UserError, match=r"not among the training images' \(eel"):
        knn_score(train, strange)


def test_grid_is_the_image_in_whole_patches() -> None:
    assert native_grid(ArraySource(np.zeros((1, 360, 480, 3), np.uint8)), 16) == (352, 480)
    assert native_grid(ArraySource(np.zeros((1, 5, 40, 3), np.uint8)), 16) == (16, 32)


def test_missing_labels_and_masks_are_explained(setting: Setting) -> None:
    x = Features(np.eye(4, dtype=np.float32), np.arange(4))
    with pytest.raises(UserError, match="need labels"):
        knn_score(x, x)
    with pytest.raises(UserError, match="no masks"):
        segment_score(x, x, Protocol(Reading(16)))


def test_a_stray_class_is_refused_before_the_head_is_trained(setting: Setting) -> None:
    model, train, test = setting
    masks = test.masks.copy()
    masks[3, 0, 0] = 200
    stray = ArraySource(test.images, test.labels, masks)
    with pytest.raises(UserError, match=r"test image 3 has class 200.*--classes 201"):
        list(evaluate(model, (train, stray), Protocol(Reading(16), steps=2), ("segment",)))


def made(x: np.ndarray, labels: np.ndarray, dataset: str, classes: list[str] | None = None) -> Features:
    manifest: dict[str, Any] = {"dataset": dataset, "classes": classes, "bad": {}}
    return Features(x.astype(np.float32), np.arange(len(x)), labels, manifest=manifest)


def test_images_scored_on_themselves_are_left_out_of_their_neighbors() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.integers(0, 3, 60)  # nothing to learn: 100 % would be each finding itself
    same = made(x, y, "a")
    score = knn_score(same, same, (1, 100))
    assert score.percent < 60 and score.detail["leave_one_out"]
    assert score.detail["top1"] == {str(k): top1 for k, top1 in leave_one_out(x, y, (1, 20, 100)).items()}
    assert "59" in score.detail["capped"]
    other = knn_score(same, made(x, y, "b"), (1, 100))
    assert other.detail["top1"]["1"] == 100.0 and "leave_one_out" not in other.detail


def test_what_is_taken_for_what_is_said() -> None:
    rng = np.random.default_rng(0)
    centers = np.eye(7)
    y, truth = np.arange(140) % 7, np.arange(70) % 7
    seen = np.where(truth == 5, 2, truth)  # fives look like twos
    x, queries = centers[y] + rng.normal(size=(140, 7)) / 50, centers[seen] + rng.normal(size=(70, 7)) / 50
    names = [f"class {i}" for i in range(7)]
    detail = knn_score(made(x, y, "a", names), made(queries, truth, "b", names)).detail
    table = np.array(detail["confusion"])
    assert table.sum() == 70 and table[5, 2] == 10 and np.trace(table) == 60
    assert detail["most_confused"] == [{"class": "class 5", "taken_for": "class 2", "images": 10}]
    assert detail["per_class"] == [0.0 if i == 5 else 100.0 for i in range(7)]
    assert detail["top5"]["20"] >= detail["top1"]["20"] == pytest.approx(100 * 6 / 7)
    json.dumps(detail)


def test_many_classes_are_not_a_table() -> None:
    y = np.arange(120) % 60
    x = np.eye(60)[y]
    detail = knn_score(made(x, y, "a"), made(x, y, "b"), (1,)).detail
    assert "confusion" not in detail and len(detail["per_class"]) == 60


def test_the_layer_of_the_linear_probe_is_chosen_among_several(setting: Setting) -> None:
    model, train, test = setting
    protocol = Protocol(Reading(16), linear_layers=("final", "blocks-2"), epochs=5)
    (score,) = evaluate(model, (train, test), protocol, ("linear",))
    assert protocol.decides("linear")["layer"] == "final,blocks-2"
    assert {row["chosen"] for row in score.detail["holdout"]} == {"final", "blocks-2"}
    assert score.detail["features"]["layer"] == score.detail["chosen"]
    alone = Protocol(Reading(16), linear_layers=(score.detail["chosen"],), epochs=5)
    (again,) = evaluate(model, (train, test), alone, ("linear",))
    assert again.percent == score.percent


def test_the_pooling_of_the_linear_probe_is_chosen_among_several_of_every_layer(setting: Setting) -> None:
    model, train, test = setting
    protocol = Protocol(
        Reading(16), linear_layers=("final", "blocks-2"), linear_poolings=("cls", "mean", "cls+mean"), epochs=5
    )
    (score,) = evaluate(model, (train, test), protocol, ("linear",))
    assert protocol.decides("linear")["pooling"] == "cls,mean,cls+mean"
    assert protocol.decides("knn")["pooling"] == "cls"
    kinds = {f"{layer} {pooling}" for layer in ("final", "blocks-2") for pooling in ("cls", "mean", "cls+mean")}
    assert {row["chosen"] for row in score.detail["holdout"]} == kinds
    layer, pooling = score.detail["chosen"].split()
    assert (score.detail["features"]["layer"], score.detail["features"]["pooling"]) == (layer, pooling)
    alone = Protocol(Reading(16, layer=layer, pooling=pooling), epochs=5)
    (again,) = evaluate(model, (train, test), alone, ("linear",))
    assert again.percent == score.percent
