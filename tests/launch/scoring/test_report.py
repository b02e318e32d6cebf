"""The report of any run has its pictures, or says why not; a folder of runs is compared."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.eval import results
from nearfar.eval.results import DataName, Score
from nearfar.launch import cli
from nearfar.launch.scoring.figures import picture_head
from nearfar.launch.scoring.report import report_run
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create


def make_run(folder: Path, run_name: str, **network: object) -> Path:
    """A run folder as training leaves it, with three images to draw, one of them damaged."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"{i}.png")
        (images / "0a.png").write_bytes(b"no image")
    run = config.load(
        None,
        [f"name={run_name}", f"folder={folder}", f"data.path={images}", "views.global_crops_size=16",
         "views.local_crops_size=16"],
    )  # fmt: skip
    run.path.mkdir()
    (run.path / "config.yaml").write_text(config.to_yaml(run))
    torch.manual_seed(0)
    about = {"run": run.model_dump(mode="json"), "step": 3}
    checkpoint.export(run.path / "teacher.safetensors", create(img_size=16, **network), about)
    return run.path


VIT = {"name": "vit_tiny_patch4", "embed_dim": 24, "depth": 1, "num_heads": 2}


def test_a_run_of_the_users_own_has_its_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine", **VIT)
    page = report_run(run).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:5] == ["Nearest neighbors", "Predicted masks", "Attention", "Patch tokens", "Curves"]
    assert "Layers" in titles
    assert page.count("data:image/") == 2 * (1 + 2 * 1) + 2 * 2 + 2 * 3  # 2 images; the views are training's to draw
    drawn = (run / "figures.json").stat().st_mtime_ns
    report_run(run)
    assert (run / "figures.json").stat().st_mtime_ns == drawn
    os.utime(run / "teacher.safetensors", (2**31, 2**31))  # trained further
    report_run(run)
    assert (run / "figures.json").stat().st_mtime_ns > drawn


def test_neighbors_of_class_folders_go_by_their_descriptions(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine", **VIT)
    images = tmp_path / "images"
    for name, folder in (("0.png", "n01440764"), ("1.png", "n02102040"), ("0a.png", "n02102040")):
        (images / folder).mkdir(exist_ok=True)
        (images / name).rename(images / folder / name)
    (tmp_path / "classes.txt").write_text("n01440764 tench\n")
    page = report_run(run).read_text()
    assert 'alt="query of class tench"' in page and 'alt="query of class n02102040"' in page


def test_predicted_masks_appear_once_segmentation_is_scored(tmp_path: Path) -> None:
    masks = np.zeros((6, 16, 16), np.uint8)
    masks[::2, 4:12, 4:12], masks[1::2, :8] = 1, 2
    path = tmp_path / "scenes.npz"
    np.savez(path, images=np.repeat(80 * masks[..., None], 3, 3), label=np.arange(6) % 2, mask=masks)
    run = make_run(tmp_path, "mine", **VIT)
    assert "Segmentation is not scored" in report_run(run).read_text()
    data = DataName(str(path), "f", 6)
    reading = {"layer": "last-block", "size": 16, "head": "linear", "steps": 5}
    results.add(run / "results.json", Score("trained", "segment", 12.5, "w", data, data, reading, 3, {"classes": 3}))
    page = report_run(run).read_text()
    assert (
        "the score is 12.5 % mIoU" in page and page.count("truth: class 0, class 1") == 6
    )  # 3 captions, 3 alternative texts
    assert len(re.findall(r"predicted: [\w ,.]+ \(\d+ % of pixels right\)", page)) == 6 and "class 2</li>" in page
    drawn = (run / "figures.json").stat().st_mtime_ns
    report_run(run)
    assert (run / "figures.json").stat().st_mtime_ns == drawn  # nothing is new
    reading |= {"head": "locat", "size": [18, 14]}  # windows and crops of a size that patches do not divide
    results.add(run / "results.json", Score("trained", "segment", 9.5, "v", data, data, reading, 3, {"classes": 3}))
    assert "the score is 9.5 % mIoU" in report_run(run).read_text()
    (run / "figures.json").write_text('{"format": "nearfar figures 1", "figures": []}')  # of another version
    assert "the score is 9.5 % mIoU" in report_run(run).read_text()


@pytest.mark.parametrize(
    ("head", "steps", "cells", "expected"),
    [("linear", None, 1200, ("linear", 500)), ("linear", None, 64, ("linear", 2000)), ("linear", 5, 64, ("linear", 5)),
     ("mlp", None, 64, ("mlp", 500)), ("mlp", None, 1200, ("mlp", 200)), ("locat", 20_000, 1200, ("linear", 500))],
)  # fmt: skip
def test_a_picture_of_masks_takes_no_longer_than_half_a_minute(
    head: str, steps: int | None, cells: int, expected: tuple[str, int]
) -> None:
    """LocAt's score was followed by minutes without a word, of the mlp for 500 steps on whole images."""
    drawn = picture_head({"head": head, "steps": steps}, cells)
    assert (drawn.head, drawn.steps_taken) == expected


def test_drawing_is_told_and_the_path_stands_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "mine", **VIT)
    cli.main(["report", str(run)])
    told = capfd.readouterr()
    assert told.out.splitlines() == [str(run / "report.html")] and "Drawing the pictures" in told.err
    cli.main(["report", str(run)])
    assert "Drawing" not in capfd.readouterr().err


def test_a_network_without_attention_and_a_run_without_images_say_so(tmp_path: Path) -> None:
    vim = make_run(tmp_path, "vim", name="vim_tiny_patch4", embed_dim=24, depth=1)
    for _ in range(2):  # the second page has to say it as well
        page = report_run(vim).read_text()
        assert "vim_tiny_patch4 has no plain global attention" in page and "Patch tokens" in page
    mine = make_run(tmp_path, "mine", **VIT)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert "There is nothing at" in report_run(mine).read_text()
    (mine / "teacher.safetensors").unlink()
    assert "has no weights in it (yet)" in report_run(mine).read_text()


def test_a_folder_of_runs_links_to_their_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        make_run(tmp_path, name, **VIT)
    assert cli.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<a href=") == 2 and (tmp_path / "one" / "report.html").is_file()
    assert "one" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone", "backbone.pt"])
def test_an_export_is_named_for_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run = make_run(tmp_path, "mine", **VIT)
    assert cli.main(["export", str(run), str(tmp_path / name)]) == 2
    assert "backbone.safetensors" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / name).exists()


def test_what_kept_the_scores_from_a_run_is_told_and_not_what_kept_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that nobody may write to, the report failed as well, and its message hid the mend: --out."""
    run = make_run(tmp_path, "mine", **VIT)
    (tmp_path / "images" / "0a.png").unlink()
    labeled = tmp_path / "labeled.txt"
    labeled.write_text("images/0.png\t0\nimages/1.png\t1\n")
    for name in ("results.json", "report.html", "figures.json"):  # also in the way of root
        (run / name).mkdir()
    assert cli.main(["eval", "knn", str(run), "--train", str(labeled), "--val", str(labeled)]) == 2
    message = capsys.readouterr().err
    assert "results.json" in message and "report.html" not in message


def test_figures_of_another_version_or_damaged_are_drawn_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, "old", **VIT)
    figures = run / "figures.json"
    for text in ('{"format": "nearfar figures 1", "figures": []}', "{"):
        figures.write_text(text)
        report_run(run)
        assert figures.read_text() != text
