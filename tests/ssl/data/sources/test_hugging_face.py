from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.sources.choose import open_source
from nearfar.ssl.data.sources.hugging_face import HuggingFaceSource
from nearfar.ssl.errors import BadImage, UserError

Row = dict[str, Any]


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images(n: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, 20, 24, 3), np.uint8)


class Label:
    names = ("cat", "dog")


class Dataset:
    """What of `datasets.Dataset` is used."""

    def __init__(self, rows: list[Row], features: dict[str, Any]) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


class Castable(Dataset):
    def cast_column(self, column: str, kind: str) -> Dataset:
        assert column == "image" and kind == "undecoded"
        rows = [{**row, "image": {"bytes": png(np.asarray(row["image"])), "path": None}} for row in self.rows]
        return Dataset(rows, self.features)


def rows(n: int = 6) -> list[Row]:
    return [{"image": Image.fromarray(pixels), "label": i % 2} for i, pixels in enumerate(images(n))]


FEATURES = {"image": object(), "label": Label()}


def test_rows_of_pillow_images() -> None:
    source = HuggingFaceSource(Dataset(rows(), FEATURES))
    assert len(source) == 6 and source.labels.tolist() == [0, 1] * 3 and source.classes == ["cat", "dog"]
    np.testing.assert_array_equal(np.asarray(source.read(2)), images(6)[2])
    assert source.encoded(2) is None and source.mask(0) is None and source.name(2) == "a data set[2]"
    turned = rows(1)
    turned[0]["image"].getexif()[0x0112] = 6
    assert HuggingFaceSource(Dataset(turned, FEATURES)).read(0).size == (20, 24)


def test_rows_of_bytes_where_the_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.SimpleNamespace(Image=lambda decode: "undecoded")
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = HuggingFaceSource(Castable(rows(), FEATURES))
    np.testing.assert_array_equal(np.asarray(source.read(3)), images(6)[3])
    assert source.encoded(3) == png(images(6)[3])
    assert source.fingerprint == HuggingFaceSource(Castable(rows(), FEATURES)).fingerprint
    assert source.fingerprint != HuggingFaceSource(Castable(rows()[:5], FEATURES)).fingerprint


def test_hugging_face_data_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no column 'picture'; its columns are: image, label"):
        HuggingFaceSource(Dataset(rows(), FEATURES), image="picture")
    with pytest.raises(UserError, match="is streamed"):
        HuggingFaceSource(iter(rows()))
    bad = HuggingFaceSource(Dataset([{"image": 3, "label": 0}], FEATURES))
    with pytest.raises(BadImage, match="holds int, not an image"):
        bad.read(0)
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="not installed: pip install datasets"):
        open_source(tmp_path)


def test_the_real_package(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    data = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    np.testing.assert_array_equal(np.asarray(source.read(2)), images(6)[2])


def test_labels_that_are_words_and_a_folder_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [{**row, "label": "cat"} for row in rows()]
    with pytest.raises(UserError, match="must be class numbers"):
        HuggingFaceSource(Dataset(words, FEATURES))
    (tmp_path / "state.json").write_text("[" * 100_000)  # deeper than JSON is read: no data set, so a folder
    with pytest.raises(UserError, match="no images in"):
        open_source(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": []}')

    def damaged(path: str) -> None:
        raise KeyError("_fingerprint")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=damaged))
    with pytest.raises(UserError, match="cannot be read as a data set of Hugging Face's"):
        open_source(tmp_path)
