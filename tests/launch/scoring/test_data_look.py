"""`nearfar data look` on every kind of data set and network, and what it refuses."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.launch import cli
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.data.beton_writer import write_beton
from nearfar.ssl.data.sources.base import ArraySource

NETWORKS = {
    "vit": {"name": "vit_tiny_patch8", "embed_dim": 24, "depth": 1, "num_heads": 2},
    "vim": {"name": "vim_tiny_patch8", "embed_dim": 24, "depth": 1},
    "resnet": {"name": "timm/resnet18"},
}


def weights(folder: Path, **network: object) -> Path:
    torch.manual_seed(0)
    run = config.load(None, ["name=x", "views.global_crops_size=32", "views.local_crops_size=16"])
    file = folder / "network.safetensors"
    checkpoint.export(file, create(img_size=32, **network), {"run": run.model_dump(mode="json"), "step": 3})
    return file


def images(count: int = 12) -> np.ndarray:
    """Noise of three colors; the last image is a copy of the first."""
    rng = np.random.default_rng(0)
    base = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    pixels = base[np.arange(count) % 3][:, None, None] + rng.integers(-40, 40, (count, 32, 32, 3))
    pixels[-1] = pixels[0]
    return pixels.astype(np.uint8)


def data(folder: Path, kind: str) -> Path:
    pixels, labels = images(), np.arange(12) % 3
    if kind == "npz":
        np.savez(folder / "set.npz", images=pixels, label=labels)
        return folder / "set.npz"
    if kind == "beton":
        write_beton(ArraySource(pixels, labels, classes=["red", "green", "blue"]), folder / "set.beton")
        return folder / "set.beton"
    for i, picture in enumerate(pixels):
        where = folder / "set" / ("red", "green", "blue")[labels[i]] if kind == "classes" else folder / "set"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(where / f"{i:02}.png")
    if kind == "flat":
        (folder / "set" / "bad.png").write_bytes(b"no image")
    return folder / "set"


class Alts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.missing = self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images += 1
            self.missing += not dict(attrs).get("alt")


@pytest.mark.parametrize(
    ("kind", "network"), [("classes", "vit"), ("flat", "vit"), ("npz", "vim"), ("beton", "resnet")]
)
def test_the_page_has_everything_in_it(tmp_path: Path, kind: str, network: str) -> None:
    file, source, out = weights(tmp_path, **NETWORKS[network]), data(tmp_path, kind), tmp_path / "look.html"
    arguments = f"--weights {file} --out {out} --clusters 3 --duplicate-cosine 0.999999 --workers 0".split()
    assert cli.main(["data", "look", str(source), *arguments]) == 0
    page = out.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page)[:4] == ["Map", "Clusters", "Near duplicates", "Outliers"]
    assert ("Unreadable images" in page) == (kind == "flat")
    assert not re.search(r"<script|<link|https?://|@import|url\(", page)
    assert page.count("<circle") == 12 and "1 pair of images whose features" in page
    assert ("</i>red</li>" in page) == (kind in ("classes", "beton"))
    alts = Alts()
    alts.feed(page)
    assert alts.images > 12 and alts.missing == 0


def test_class_folders_go_by_their_descriptions(tmp_path: Path) -> None:
    file, source, out = weights(tmp_path, **NETWORKS["vit"]), data(tmp_path, "classes"), tmp_path / "look.html"
    (tmp_path / "classes.txt").write_text("red ripe tomato\n")
    assert cli.main(["data", "look", str(source), "--weights", str(file), "--out", str(out), "--workers", "0"]) == 0
    page = out.read_text()
    assert "</i>ripe tomato</li>" in page and "</i>green</li>" in page and "of class ripe tomato" in page
    assert "</i>red</li>" not in page


def test_a_network_that_tells_nothing_apart_is_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """340 near duplicates among 800 different pictures, of a network after 100 steps, without a word."""
    file, source, out = weights(tmp_path, **NETWORKS["vit"]), data(tmp_path, "classes"), tmp_path / "look.html"
    arguments = ["data", "look", str(source), "--weights", str(file), "--out", str(out), "--workers", "0"]
    doubt = "So many may say more about the network than about the images"
    for cosine, doubted in (("0.01", True), ("0.999999", False)):
        assert cli.main([*arguments, "--duplicate-cosine", cosine]) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert (doubt in output) is (doubt in out.read_text()) is doubted, output


def test_of_many_images_a_sample_is_looked_at_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, source, out = weights(tmp_path, **NETWORKS["vit"]), data(tmp_path, "npz"), tmp_path / "look.html"
    arguments = ["--weights", str(file), "--out", str(out), "--max-images", "8", "--workers", "0"]
    assert cli.main(["data", "look", str(source), *arguments]) == 0
    assert "8 of 12 images, evenly spread" in " ".join(capsys.readouterr().out.split())
    assert "8 of 12 images, evenly spread" in out.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-images", "2"], "at least 4"), (["--clusters", "1"], "between 2 and 50"),
        (["--duplicate-cosine", "0"], "cosine"),
        (["--out", "nowhere/look.html"], "a folder that exists"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["data", "look", str(tmp_path), "--weights", str(tmp_path), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
