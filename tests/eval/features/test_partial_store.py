"""A killed writer of features is gone on from, to the same bits; whatever it left that does not fit is made anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nearfar.eval.features import store
from nearfar.eval.features.extraction import Reading
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.store import FeatureStore
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk import files
from nearfar.ssl.errors import BadImage

READING, BATCH = Reading((16, 24), pooling="grid"), 4


class Some(ArraySource):
    """23 images with masks, two of which cannot be read; `seen` are those that were asked for."""

    def __init__(self, bad: tuple[int, int] = (1, 13)) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (23, 16, 24, 3), np.uint8)
        super().__init__(images, np.arange(23) % 3, rng.integers(0, 5, (23, 16, 24)).astype(np.uint8))
        self.bad = bad
        self.seen: list[int] = []

    def read(self, i: int) -> Image.Image:
        self.seen.append(i)
        if i in self.bad:
            raise BadImage(f"image-{i}", "cut off")
        return super().read(i)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create("vit_tiny_patch8", img_size=16, embed_dim=24, depth=1, num_heads=2).eval()


def killed(folder: Path, after: int) -> Path:
    """What is left of a process that is killed when it has read so many images."""
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch; torch.set_num_threads(1)
        import test_partial_store as t
        done = 0
        def progress(images):
            global done
            done += images
            if done >= {after}:
                os.kill(os.getpid(), signal.SIGKILL)
        t.store._KEPT_EVERY = 8
        t.write(t.Path({str(folder)!r}), t.Some(), progress=progress)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (left,) = folder.parent.glob(f"{files.partial_prefix(folder)}*")
    return left


@pytest.fixture(scope="module")
def left_after_20(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed(tmp_path_factory.mktemp("killed") / "store", 20)


@pytest.fixture
def left(tmp_path: Path, left_after_20: Path) -> Path:
    """What a writer of tmp_path / "store" left."""
    return shutil.copytree(left_after_20, tmp_path / left_after_20.name)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store, "_KEPT_EVERY", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, source: Some, seed: int = 0, batch: int = BATCH, **decoding: Callable[..., Any]) -> Any:
    return FeatureStore.write(folder, network(seed), source, READING, Decoding(batch, 0, **decoding))


def same(folder: Path, other: Path) -> bool:
    """Are all files of two stores alike to the byte?"""
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_it_goes_on_where_a_killed_one_was_and_ends_in_the_same_bytes(tmp_path: Path, left: Path) -> None:
    write(tmp_path / "other", Some())
    source = Some()
    counted: list[int] = []
    write(tmp_path / "store", source, progress=counted.append)
    assert source.seen == list(range(16, 23))  # 16 of the 20 were on the disk
    assert sum(counted) == 23
    assert same(tmp_path / "store", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "store"]


def test_killed_twice_is_gone_on_from_twice(tmp_path: Path, left: Path) -> None:
    assert killed(tmp_path / "store", 22) == left  # 16 that were there, a batch of 4 and one of 3
    file = left / "progress.jsonl"
    assert [json.loads(line)["images"] for line in file.read_text().splitlines()] == [8, 16]
    write(tmp_path / "store", Some())
    write(tmp_path / "other", Some())
    assert same(tmp_path / "store", tmp_path / "other")


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path, left: Path) -> None:
    file = left / "progress.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    source = Some()
    write(tmp_path / "store", source)
    assert source.seen == list(range(8, 23))
    write(tmp_path / "other", Some())
    assert same(tmp_path / "store", tmp_path / "other")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda left: (left / "progress.jsonl").write_text("[]\n"),
        lambda left: (left / "progress.jsonl").write_text('{"images": 99, "index": [], "bad": [], "rescaled": []}\n'),
        lambda left: (left / "features.npy").write_bytes(b"nothing"),
        lambda left: (left / "making.json").write_text("{"),
        lambda left: (left / "making.json").write_text(json.dumps({"checkpoint": "other"})),
    ],
)
def test_what_does_not_fit_is_made_anew(tmp_path: Path, left: Path, spoil: Callable[..., Any]) -> None:
    spoil(left)
    source = Some()
    write(tmp_path / "store", source)
    assert source.seen == list(range(23))
    write(tmp_path / "other", Some())
    assert same(tmp_path / "store", tmp_path / "other")


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch": 5}])
def test_other_weights_and_other_batches_begin_anew(tmp_path: Path, left: Path, other: dict[str, int]) -> None:
    source = Some()
    write(tmp_path / "store", source, **other)
    assert source.seen == list(range(23))
    assert os.listdir(tmp_path) == ["store"]


def test_a_hard_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        if len(source.seen) >= 20:
            raise KeyboardInterrupt

    source = Some()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", source, progress=stop)
    assert write(tmp_path / "store", again := Some()).x.shape[0] == 21
    assert again.seen[0] == 16
