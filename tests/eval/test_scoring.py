"""From a backbone and two sources to results.json."""

import json

import numpy as np
import pytest
import torch

from nearfar.eval.features import Features, extract
from nearfar.eval.knn import knn
from nearfar.eval.linear import linear_probe
from nearfar.eval.scoring import evaluate, evaluate_pixels, knn_scores, merge_results, native_grid
from nearfar.eval.segmentation import segment_probe
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError


def colored(n, seed):
    """Squares on noise: the color of the square is the class, its pixels the mask."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (n, 16, 16, 3), dtype=np.uint8)
    masks = np.zeros((n, 16, 16), np.uint8)
    labels = rng.integers(0, 3, n)
    for i, label in enumerate(labels):
        r, c = rng.integers(0, 8, 2)
        images[i, r : r + 8, c : c + 8] = np.eye(3)[label] * 255
        masks[i, r : r + 8, c : c + 8] = label + 1
    return ArraySource(images, labels=labels, masks=masks, classes=["red", "green", "blue"])


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=2, num_heads=2, prr=True)
    return model, colored(120, 0), colored(40, 1)


def test_scores_are_those_of_the_evaluators_on_the_features(setting):
    model, train, test = setting
    got = evaluate(model, train, test, size=16, epochs=5, steps=20)
    a, b = extract(model, train, size=16), extract(model, test, size=16)
    assert got["knn_top1"] == knn(a.x, a.labels, b.x, b.labels, (20,))[20]
    assert got["linear_top1"] == linear_probe(a.x, a.labels, b.x, b.labels, epochs=5)["top1"]
    a, b = (extract(model, s, size=16, layer="last-block", pooling="grid") for s in (train, test))
    want = segment_probe(a.x, a.mask_list(), b.x, b.mask_list(), classes=4, steps=20)
    assert got["miou"] == want["miou"]
    assert got["knn"]["features"]["prr"] is True
    assert got["segment"]["features"]["prr"] is False
    assert got["segment"]["features"]["norm"] is False
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_store_gives_the_same_and_is_used_again(setting, tmp_path, monkeypatch):
    model, train, test = setting
    settings = {"size": 16, "epochs": 2, "steps": 2, "linear_layer": "blocks-2"}
    memory = evaluate(model, train, test, **settings)
    assert evaluate(model, train, test, store=tmp_path / "features", **settings) == memory
    names = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert names == sorted(
        f"{s}-{r}" for s in ("train", "test") for r in ("final-cls", "blocks-2-cls", "last-block-grid")
    )
    monkeypatch.setattr("nearfar.eval.store.stream", None)  # nothing may be read through the model again
    assert evaluate(model, train, test, store=tmp_path / "features", **settings) == memory


def test_pixels_solve_what_pixels_can(setting):
    _, train, test = setting
    got = evaluate_pixels(train, test, patch=4, epochs=20, steps=400)
    assert got["knn_top1"] > 50
    assert got["miou"] > 40
    assert set(evaluate_pixels(train, test, patch=4, tasks="knn")) == {"knn_top1", "knn"}


def test_k_capped_by_the_training_set_is_said():
    x = Features(np.eye(5, dtype=np.float32), np.arange(5), np.arange(5))
    got = knn_scores(x, x)
    assert got["knn"]["k"] == 5
    assert list(got["knn"]["top1"]) == ["5"]
    assert "at most 5" in got["knn"]["capped"]


def test_grid_is_the_image_in_whole_patches():
    assert native_grid(ArraySource(np.zeros((1, 360, 480, 3), np.uint8)), 16) == (352, 480)
    assert native_grid(ArraySource(np.zeros((1, 5, 40, 3), np.uint8)), 16) == (16, 32)


def test_missing_labels_masks_and_unknown_tasks_are_explained(setting):
    model, train, test = setting
    bare = ArraySource(train.images)
    with pytest.raises(UserError, match="need labels"):
        evaluate(model, bare, test, size=16, tasks=("knn",))
    with pytest.raises(UserError, match="no masks"):
        evaluate(model, bare, test, size=16, tasks=("segment",))
    with pytest.raises(UserError, match="Unknown evaluation detect"):
        evaluate(model, train, test, size=16, tasks=("knn", "detect"))


def test_results_are_merged(tmp_path):
    file = tmp_path / "runs" / "results.json"
    merge_results(file, "trained", {"knn_top1": 50.0, "miou": 20.0})
    merge_results(file, "untrained", {"knn_top1": 30.0})
    merge_results(file, "trained", {"knn_top1": 51.0})
    assert json.loads(file.read_text()) == {
        "trained": {"knn_top1": 51.0, "miou": 20.0},
        "untrained": {"knn_top1": 30.0},
    }
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"trained": 3}'])
def test_other_files_are_not_overwritten(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match="move it away"):
        merge_results(file, "trained", {"knn_top1": 1.0})
    assert file.read_text() == text
