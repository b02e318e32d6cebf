"""Several layers from one pass equal each alone, also after a kill; tables hold the same numbers and the names."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nearfar.eval.features import feature_files, store
from nearfar.eval.features.extraction import Features, Reading
from nearfar.eval.features.feature_files import check_table, write_layers, write_table
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.store import FeatureStore
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.errors import UserError

LAYERS = ["final", "blocks-2", "last-block"]
READING = Reading(16, 16, pooling="cls+mean")
DECODING = Decoding(batch_size=2, workers=0)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Seven images in two classes, one of them damaged, one with a name that CSV has to quote."""
    for i, name in enumerate(["cat/a.png", 'cat/b,"c".png', "cat/d.png", "dog/e.png", "dog/f.png", "dog/g.png"]):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)).save(file)
    (tmp_path / "images" / "cat" / "bad.png").write_bytes(b"no image")
    return open_source(str(tmp_path / "images"))


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return create("vit_tiny_patch4", img_size=16, embed_dim=24, depth=3, num_heads=2, prr=True).eval()


def test_several_layers_equal_each_alone(tmp_path: Path, source: Source, backbone: Backbone) -> None:
    found = write_layers(tmp_path / "out", backbone, source, READING, LAYERS, DECODING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    for layer in LAYERS:
        FeatureStore.write(tmp_path / "alone", backbone, source, replace(READING, layer=layer), DECODING)
        for file in ("features.npy", "index.npy", "labels.npy", "names.txt"):
            assert (tmp_path / "out" / layer / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
        assert found[layer].manifest == FeatureStore.open(tmp_path / "alone").manifest


def test_images_are_read_once_and_a_killed_pass_is_continued(
    tmp_path: Path, source: Source, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_KEPT_EVERY", 2)
    whole = write_layers(tmp_path / "whole", backbone, source, READING, LAYERS, DECODING)
    read = store.stream
    batches: list[int] = []

    def killed_after(most: int) -> Callable[..., Any]:
        def stream(*given: Any, **options: int) -> Iterator[tuple[Any, NDArray[Any]]]:
            for number, batch in enumerate(read(*given, **options)):
                if number == most:
                    raise KeyboardInterrupt
                batches.append(len(batch[0].index) + len(batch[0].bad))
                yield batch

        return stream

    monkeypatch.setattr(store, "stream", killed_after(2))
    with pytest.raises(KeyboardInterrupt):
        write_layers(tmp_path / "out", backbone, source, READING, LAYERS, DECODING)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(store, "stream", killed_after(99))
    found = write_layers(tmp_path / "out", backbone, source, READING, LAYERS, DECODING)
    assert sum(batches) == len(source) == 7
    assert all(np.array_equal(found[layer].x, whole[layer].x) for layer in LAYERS)
    write_layers(tmp_path / "out", backbone, source, READING, LAYERS, DECODING)
    assert sum(batches) == 7  # what is there is reused


def test_what_is_no_set_of_layers_is_left_alone(tmp_path: Path, source: Source, backbone: Backbone) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than the features of several layers"):
        write_layers(tmp_path / "out", backbone, source, READING, LAYERS, DECODING)
    for layers, pooling, message in [
        (["final", "final"], "cls", "name each once"),
        (["final", "last"], "cls", 'Unknown layer "last"'),
        (["final", "blocks-2"], "grid", "write grids one by one"),
    ]:
        with pytest.raises(UserError, match=message):
            write_layers(tmp_path / "new", backbone, source, replace(READING, pooling=pooling), layers, DECODING)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def made(tmp_path: Path, source: Source, backbone: Backbone) -> Features:
    return FeatureStore.write(tmp_path / "store", backbone, source, READING, DECODING)


def test_csv_holds_names_labels_and_the_same_float32(
    tmp_path: Path, source: Source, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "_ROWS", 4)  # more than one part
    features = made(tmp_path, source, backbone)
    with write_table(tmp_path / "store", features, source, "csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:4] == ["name", "label", "class", "f0"] and len(header) == 3 + 48
    names = [row[0] for row in rows]
    assert len(rows) == 6 and any(name.endswith('b,"c".png') for name in names)
    assert names == (tmp_path / "store" / "names.txt").read_text().splitlines()
    assert [row[2] for row in rows] == ["cat"] * 3 + ["dog"] * 3 and [row[1] for row in rows] == list("000111")
    assert np.array_equal(np.array([row[3:] for row in rows], np.float32), features.x)
    assert FeatureStore.open(tmp_path / "store").x.shape == (6, 48)  # a table beside it does not disturb a store


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow (pip install nearfar[parquet])")
def test_parquet_holds_the_same(
    tmp_path: Path, source: Source, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(feature_files, "_ROWS", 4)
    features = made(tmp_path, source, backbone)
    table = pq.read_table(write_table(tmp_path / "store", features, source, "parquet"))
    assert table.column_names == ["name", "label", "class", "feature"]
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), features.x)
    assert table["name"].to_pylist() == (tmp_path / "store" / "names.txt").read_text().splitlines()


def test_tables_that_cannot_be_written_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a row for each image, and grids have one for each patch"):
        check_table("csv", "grid")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package pyarrow, which is not installed"):
        check_table("parquet", "cls")
