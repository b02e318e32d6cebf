"""Every task from a backbone and two sources, against its evaluator on the features it should have read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.eval import whitening
from nearfar.eval.features.extraction import Features, Reading, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.pixels import pixel_grid, pixel_map
from nearfar.eval.fewshot import few_labels, few_shot
from nearfar.eval.knn import knn, leave_one_out
from nearfar.eval.logistic import logistic_probe
from nearfar.eval.position import position_probe
from nearfar.eval.retrieval import retrieve
from nearfar.eval.robustness import flipped
from nearfar.eval.scores import evaluation
from nearfar.eval.scores.evaluation import evaluate, evaluate_pixels
from nearfar.eval.scores.further_scores import fewshot_score, whitened_score
from nearfar.eval.scores.headline_scores import Protocol
from nearfar.eval.scores.robustness_score import perturbed_features
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import UserError

Setting = tuple[Backbone, ArraySource, ArraySource]

READING = Reading(16)
PROTOCOL = Protocol(READING, epochs=4, steps=10, memory=200)


@pytest.fixture(scope="module")
def setting(colored: Callable[..., Any]) -> Setting:
    torch.manual_seed(0)
    model = create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=2, num_heads=2)
    return model, colored(60, 0), colored(24, 1)


def scored(setting: Setting, task: str, **changes: bool | int | tuple[str, str]) -> Any:
    model, train, test = setting
    protocol = Protocol(**{**vars(PROTOCOL), **changes})
    (score,) = evaluate(model, (train, test), protocol, (task,))
    assert score.task == task and json.loads(json.dumps(score.detail, allow_nan=False)) is not None
    return score


def pooled(setting: Setting) -> tuple[Features, Features]:
    model, train, test = setting
    return extract(model, train, READING), extract(model, test, READING)


def test_whitened_features_are_fitted_on_those_of_knn(setting: Setting) -> None:
    a, b = pooled(setting)
    assert a.labels is not None and b.labels is not None
    fitted = whitening.fit(a.x)
    score = scored(setting, "whitened")
    assert score.percent == knn(fitted(a.x), a.labels, fitted(b.x), b.labels, (20,))[20]
    assert score.detail["shrinkage"] == fitted.shrinkage and score.detail["k"] == 20


def test_whitened_features_of_one_set_leave_each_image_out_of_its_own_neighbors(setting: Setting) -> None:
    a, _ = pooled(setting)
    assert a.labels is not None
    score, x = whitened_score(a, a), whitening.fit(a.x)(a.x)
    assert score.detail["leave_one_out"] and score.percent == leave_one_out(x, a.labels, (20,))[20]


def test_logistic_regression_and_few_labels_read_the_features_of_knn(setting: Setting) -> None:
    a, b = pooled(setting)
    assert scored(setting, "logistic").percent == logistic_probe(a.x, a.labels, b.x, b.labels)["top1"]
    score = scored(setting, "fewshot")
    by_shot = few_shot(a.x, a.labels, b.x, b.labels)
    assert score.percent == by_shot[5]["mean"] and score.detail["shots"]["10"] == by_shot[10]
    assert score.detail["percent_of_labels"]["10"] == few_labels(a.x, a.labels, b.x, b.labels)[0.1]


def test_shots_beyond_the_smallest_class_are_left_out_and_said() -> None:
    rng = np.random.default_rng(0)
    y = np.array([0] * 12 + [1] * 3)
    train, test = (Features(rng.normal(size=(15, 4)).astype(np.float32), np.arange(15), y) for _ in range(2))
    score = fewshot_score(train, test, PROTOCOL)
    assert list(score.detail["shots"]) == ["1"] and score.detail["headline_shots"] == 1
    assert score.detail["left_out"] == "5, 10 images a class: the smallest class has 3"


def test_retrieval_and_position_read_patches_of_the_final_layer(setting: Setting) -> None:
    model, train, test = setting
    reading = Reading((16, 16), pooling="grid")
    a, b = (extract(model, source, reading) for source in (train, test))
    expected = retrieve(a.x, a.mask_list(), b.x, b.mask_list(), classes=4, memory=200)
    assert scored(setting, "retrieval").percent == expected["miou"]
    score = scored(setting, "position")
    assert score.percent == 100 * position_probe(a.x, b.x)["r2"] and score.detail["grid"] == [4, 4]


def test_the_position_probe_reads_some_images_of_many(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "POSITION_IMAGES", 10)
    assert scored(setting, "position").detail["images"] == [10, 10]


def test_tasks_that_read_the_same_read_it_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, test = setting
    calls = []
    monkeypatch.setattr(evaluation, "extract", lambda *a: calls.append(a[2]) or extract(*a))
    tasks = ("fewshot", "knn", "logistic", "linear")
    found = list(evaluate(model, (train, test), PROTOCOL, tasks))
    assert [score.task for score in found] == ["knn", "linear", "logistic", "fewshot"]
    assert calls == [READING, READING]


# Robustness -------------------------------------------------------------------------------------------------------


def test_every_perturbation_is_scored_by_neighbors_among_clean_images(setting: Setting) -> None:
    model, _, test = setting
    score = scored(setting, "robustness")
    table = score.detail["table"]
    a, b = pooled(setting)
    assert table["clean"] == {"top1": knn(a.x, a.labels, b.x, b.labels, (20,))[20], "drop": 0.0}
    assert score.percent == table["patch shuffle"]["top1"]
    mirrored = ArraySource(np.ascontiguousarray(test.images[:, :, ::-1]), labels=test.labels)
    c = extract(model, mirrored, READING)
    assert table["mirrored"]["top1"] == knn(a.x, a.labels, c.x, c.labels, (20,))[20]
    assert table["mirrored"]["drop"] == pytest.approx(table["clean"]["top1"] - table["mirrored"]["top1"])
    assert list(score.detail["left_out"]) == ["band shuffle"]  # no LGP
    assert len(table) == 11


def test_perturbed_features_do_not_depend_on_batches(setting: Setting) -> None:
    model, _, test = setting
    one, rows, _ = perturbed_features(model, test, READING, Decoding(24, 0), 0)
    two, _, _ = perturbed_features(model, test, READING, Decoding(5, 0), 0)
    assert rows.tolist() == list(range(24))
    for name, x in one.items():
        np.testing.assert_allclose(x, two[name], atol=2e-5, err_msg=name)
    images = normalize_pixels(torch.from_numpy(test.images).permute(0, 3, 1, 2))
    with torch.inference_mode():
        np.testing.assert_allclose(model(flipped(images)).cls.numpy(), one["mirrored"], atol=2e-5)
    assert not np.allclose(one["patch shuffle"], one["clean"], rtol=0, atol=1e-4)


def test_a_network_without_positions_does_not_see_a_shuffle_of_tokens_and_lgp_has_bands(setting: Setting) -> None:
    _, train, test = setting
    torch.manual_seed(0)
    model = create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=2, num_heads=2, lgp=True)
    protocol = Protocol(Reading(16, pooling="mean"))
    (score,) = evaluate(model, (train, test), protocol, ("robustness",))
    table = score.detail["table"]
    assert table["token shuffle"]["top1"] == table["clean"]["top1"]
    assert "band shuffle" in table and "left_out" not in score.detail


def test_robustness_needs_images_to_learn_from_besides_those_it_scores(setting: Setting) -> None:
    model, train, _ = setting
    with pytest.raises(UserError, match="--train and --val name the same"):
        list(evaluate(model, (train, train), PROTOCOL, ("robustness",)))


# Raw pixels -------------------------------------------------------------------------------------------------------


def test_pixels_are_scored_in_all_but_robustness(setting: Setting) -> None:
    _, train, test = setting
    found = {score.task: score for score in evaluate_pixels((train, test), PROTOCOL, patch=4)}
    assert list(found) == ["knn", "whitened", "linear", "logistic", "fewshot", "segment", "retrieval", "position"]
    assert found["retrieval"].percent > 40 and found["position"].percent < 20


def test_pixels_of_a_window_are_those_of_a_grid(setting: Setting) -> None:
    _, train, _ = setting
    images = normalize_pixels(torch.from_numpy(train.images).permute(0, 3, 1, 2))
    assert np.array_equal(pixel_map(images, 4).permute(0, 2, 3, 1).numpy(), pixel_grid(train, 16, 4).x)


# The linear probe on views ----------------------------------------------------------------------------------------


def test_the_probe_on_views_learns_what_the_views_show(setting: Setting) -> None:
    score = scored(setting, "linear", augment=True, epochs=30)
    assert score.percent > 60  # three colors
    assert score.detail["augment"] == {"scale": [0.08, 1.0], "flip": 0.5}
    assert score.detail["train"] == 54 and {row["lr"] for row in score.detail["holdout"]} >= {0.001, 1.0}
    again = scored(setting, "linear", augment=True, epochs=30)
    assert again.detail == score.detail
    with pytest.raises(UserError, match="--augment trains on one kind of feature"):
        scored(setting, "linear", augment=True, linear_layers=("final", "blocks-2"))


def test_protocols_that_differ_have_keys_that_differ() -> None:
    plain, views = Protocol(READING), Protocol(READING, augment=True)
    assert plain.decides("linear") != views.decides("linear") and "augment" not in plain.decides("linear")
    assert plain.decides_of_pixels("linear", 4) == views.decides_of_pixels("linear", 4)
    windows = Protocol(READING, window=8)
    assert "window" not in plain.decides("segment") and windows.decides("segment")["window"] == 8
