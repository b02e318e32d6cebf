"""results.json holds scores of one set of weights and images, and features on disk are scored without the network."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.eval.knn import knn
from nearfar.eval.store import FeatureStore
from nearfar.launch import cli
from nearfar.launch import score as scores
from nearfar.launch.score import Subject, score
from nearfar.ssl import config
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource


def scenes(count: int, seed: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), 4:12, 4:12, labels] = 255
    masks = np.zeros((count, 16, 16), np.uint8)
    masks[:, 4:12, 4:12] = labels[:, None, None] + 1
    return ArraySource(images, labels=labels, masks=masks)


def network(seed: int) -> Backbone:
    torch.manual_seed(seed)
    return create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=1, num_heads=2)


TRAIN, VAL = scenes(60, 0), scenes(20, 1)


@pytest.fixture
def said() -> StringIO:
    return StringIO()


def subject(folder: Path, seed: int = 0, *settings: str) -> Subject:
    run = config.load(
        None, ["name=r", f"folder={folder}", "views.global_crops_size=16", "views.local_crops_size=16", *settings]
    )
    return Subject(network(seed), run, folder)


def test_what_is_known_is_not_computed_again_and_other_tasks_join_it(
    tmp_path: Path, said: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[str, ...]] = []
    evaluate = scores.evaluate
    monkeypatch.setattr(
        scores, "evaluate", lambda *a, tasks, **k: computed.append(tasks) or evaluate(*a, tasks=tasks, **k)
    )
    console = Console(file=said, width=200)
    first = score(subject(tmp_path), TRAIN, VAL, tasks=["knn"], console=console)
    both = score(subject(tmp_path), TRAIN, VAL, tasks=["knn", "segment"], console=console, steps=3)
    again = score(subject(tmp_path), TRAIN, VAL, tasks=["knn", "segment"], console=console, steps=3)
    score(subject(tmp_path), TRAIN, VAL, tasks=["knn", "segment"], console=console, steps=4)  # k-NN knows no steps
    assert computed == [["knn"], ["segment"], ["segment"]]
    assert both["trained"]["knn_top1"] == first["trained"]["knn_top1"] and again == both
    assert "leave it" not in said.getvalue()


def test_features_are_pooled_as_the_head_read_them_unless_told(
    tmp_path: Path, said: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        scores, "evaluate", lambda *a, pooling, **k: read.append(pooling) or {"knn_top1": 50.0, "knn": {}}
    )
    console = Console(file=said, width=200)
    for settings, told in (([], {}), (["head.pooling=mean"], {}), (["head.pooling=mean"], {"pooling": "cls"})):
        score(subject(tmp_path / str(len(read)), 0, *settings), TRAIN, VAL, tasks=["knn"], console=console, **told)
    assert read == ["cls", "mean", "cls"]


@pytest.mark.parametrize("other", ["weights", "images"])
def test_scores_of_other_weights_or_images_do_not_stand_beside_new_ones(
    tmp_path: Path, said: StringIO, other: str
) -> None:
    console = Console(file=said, width=200)
    score(subject(tmp_path), TRAIN, VAL, tasks=["knn", "segment"], console=console, steps=3)
    seed, val = (1, VAL) if other == "weights" else (0, scenes(20, 2))
    after = score(subject(tmp_path, seed), TRAIN, val, tasks=["knn"], console=console)
    assert "knn_top1" in after["trained"] and "miou" not in after["trained"]
    assert after == json.loads((tmp_path / "results.json").read_text())
    assert said.getvalue().count("of other weights or images, and leave it") == 1


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    for pooling in ("cls", "grid"):
        for name, source in (("train", TRAIN), ("val", VAL)):
            FeatureStore.write(tmp_path / f"{pooling}-{name}", network(0), source, size=16, pooling=pooling)
    FeatureStore.write(tmp_path / "other-val", network(1), VAL, size=16)
    return tmp_path


def test_features_on_disk_are_scored_without_the_network(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = stores / "scores.json"
    command = ["eval", "knn", str(stores / "cls-train"), "--val", str(stores / "cls-val"), "--out", str(out)]
    assert cli.main(command) == 0
    train, val = np.load(stores / "cls-train/features.npy"), np.load(stores / "cls-val/features.npy")
    expected = knn(train, TRAIN.labels, val, VAL.labels, (20,))[20]
    assert json.loads(out.read_text())["trained"]["knn_top1"] == expected
    assert f"{expected:.1f}" in capsys.readouterr().out
    assert cli.main(["eval", "all", str(stores / "grid-train"), "--val", str(stores / "grid-val")]) == 0


@pytest.mark.parametrize(
    ("what", "train", "val", "words"),
    [
        ("knn", "cls-train", "other-val", "was made with checkpoint"),
        ("segment", "cls-train", "cls-val", "which segment cannot read; knn and linear can"),
        ("linear", "grid-train", "grid-val", "which linear cannot read; segment can"),
        ("knn", "cls-train", None, "name those to score with --val"),
        ("knn", "cls-train", "nowhere", "not a readable feature store"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    stores: Path, capsys: pytest.CaptureFixture[str], what: str, train: str, val: str | None, words: str
) -> None:
    command = ["eval", what, str(stores / train), *(["--val", str(stores / val)] if val else [])]
    assert cli.main(command) == 2
    assert words in " ".join(capsys.readouterr().err.split())
