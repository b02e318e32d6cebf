"""`nearfar finetune` and `nearfar predict` as a user types them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.launch.cli import main
from nearfar.ssl import checkpoint, config
from nearfar.ssl.settings import finetune_settings

COLORS = {"red": 0, "green": 1, "blue": 2}
RECIPE = """
augment: {size: 16, scale: [0.6, 1.0]}
backbone: {name: vit_tiny_patch4, embed_dim: 24, depth: 2, num_heads: 2, lgp: true, drop_path: 0.0}
classifier: {cutmix: 0.5}
optim: {lr: 0.005, warmup_epochs: 1}
train: {epochs: 8, batch_size: 12, device: cpu, precision: fp32, threads: 1, world_size: 1}
eval: {size: 16, resize: 16, every_epochs: 4}
data: {workers: 0}
"""


def write_images(folder: Path, count: int, seed: int, classes: dict[str, int] = COLORS) -> Path:
    rng = np.random.default_rng(seed)
    for name, channel in classes.items():
        target = folder / name
        target.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (20, 20, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in ROOT/runs/tiny on ROOT/train, scored on ROOT/val; returns ROOT."""
    root = tmp_path_factory.mktemp("finetuned")
    write_images(root / "train", 30, 0)
    write_images(root / "val", 12, 1)
    (root / "tiny.yaml").write_text(RECIPE)
    command = ["finetune", str(root / "tiny.yaml"), f"folder={root / 'runs'}"]
    assert main([*command, f"data.path={root / 'train'}", f"data.val={root / 'val'}"]) == 0
    return root


def test_results_hold_every_class_and_the_confusion(trained: Path) -> None:
    (score,) = json.loads((trained / "runs" / "tiny" / "results.json").read_text())["scores"]
    detail = score["detail"]
    assert score["task"] == "finetune" and score["percent"] == detail["top1"] > 80
    assert detail["classes"] == ["blue", "green", "red"]
    confusion = np.array(detail["confusion"])
    assert confusion.sum(1).tolist() == [12, 12, 12]
    assert score["percent"] == pytest.approx(100 * confusion.trace() / 36)
    assert detail["per_class"] == pytest.approx((100 * confusion.diagonal() / 12).tolist())
    page = (trained / "runs" / "tiny" / "report.html").read_text()
    assert all(part in page for part in ("Top-1 on data.val", "true classes", "green"))
    assert "http" not in page.replace("http://www.w3.org", "")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[-4:] == ["Views", "Settings", "Environment", "Lineage"]
    assert torch.__version__ in page and "random weights of the seed" in page and score["weights"] in page


def test_report_of_damaged_weights_says_so_and_is_written(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "runs" / "tiny", tmp_path / "tiny"))
    (run / "classifier.safetensors").write_bytes(b"damaged")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "The weights have not been read." in page and "Top-1 on data.val" in page


def test_its_features_are_scored_beside_those_of_its_network_untrained(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "runs" / "tiny", tmp_path / "tiny"))
    (run / "results.json").unlink()
    assert main(["eval", "knn", str(run), "--baselines", "--workers", "0"]) == 0
    scores = {score["subject"]: score for score in json.loads((run / "results.json").read_text())["scores"]}
    assert set(scores) == {"trained", "untrained", "pixels"}
    assert len({score["weights"] for score in scores.values()}) == 3


def predictions_in(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_predict_writes_the_answers_and_leaves_out_what_it_cannot_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "new", 4, 2)
    (images / "red" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out.csv"
    assert main(["predict", str(trained / "runs" / "tiny"), str(images), "--csv", str(out), "--top", "3"]) == 0
    output = capsys.readouterr().out
    rows = predictions_in(out)
    assert "12 images, 1 unreadable ones left out" in output and "red/broken.png" in output
    assert len(rows) == 36 and [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1, abs=1e-5)
    first = [row for row in rows if row["rank"] == "1"]
    right = 100 * np.mean([row["file"].split("/")[0] == row["class"] for row in first])
    assert f"top1 {right:.2f} %" in output and right > 60


def test_predict_on_a_flat_folder_tells_no_accuracy(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, out = trained / "val" / "blue", tmp_path / "flat.csv"
    file = trained / "runs" / "tiny" / checkpoint.CLASSIFIER
    assert main(["predict", str(file), str(flat), "--csv", str(out)]) == 0
    assert len(predictions_in(out)) == 12 and "Accuracy on" not in capsys.readouterr().out


def test_features_are_read_from_a_classifier(trained: Path, tmp_path: Path) -> None:
    arguments = ["features", str(trained / "runs" / "tiny"), str(trained / "val"), str(tmp_path / "store")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert np.load(tmp_path / "store" / "features.npy").shape == (36, 24)


def test_from_a_run_takes_over_its_backbone(trained: Path) -> None:
    recipe = trained / "next.yaml"
    recipe.write_text(RECIPE.replace("embed_dim: 24, depth: 2, num_heads: 2, lgp: true, ", ""))
    command = ["finetune", str(recipe), f"folder={trained / 'runs'}", f"data.path={trained / 'train'}"]
    assert main([*command, "--from", str(trained / "runs" / "tiny"), "train.epochs=1"]) == 0
    run = finetune_settings.recorded(checkpoint.about(trained / "runs" / "next")["run"])
    assert run.backbone.embed_dim == 24 and run.backbone.lgp and run.backbone.depth == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "BARE", "VAL", "--csv", "OUT"], "holds a backbone without a classifier"),
        (["predict", "RUN", "VAL", "--csv", "OUT", "--top", "4"], "--top 4 is not possible"),
        (["predict", "RUN", "NOWHERE", "--csv", "OUT"], "There is nothing at"),
        (["predict", "RUN", "VAL", "--csv", "NOWHERE/x.csv"], "cannot be written"),
        (["finetune", "RECIPE", "data.path=FLAT"], "have no labels"),
        (["finetune", "RECIPE", "data.path=EMPTY"], "owl"),
        (["finetune", "RECIPE", "data.path=ONE"], "two classes or more"),
        (["finetune", "RECIPE", "data.path=TRAIN", "data.val=ONE"], "1 classes of"),
        (["finetune", "RECIPE", "data.path=TRAIN", "data.val=TRAIN"], "the very images that the classifier learns"),
        (["finetune", "RECIPE", "data.path=TRAIN", "optim.lrr=3"], "did you mean optim.lr"),
        (["finetune", "RECIPE"], "data.path is not set"),
    ],
)
def test_a_mistake_is_one_paragraph(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "RUN": trained / "runs" / "tiny", "VAL": trained / "val", "TRAIN": trained / "train", "OUT": tmp_path / "o.csv",
        "RECIPE": trained / "tiny.yaml", "FLAT": trained / "val" / "red", "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty", "ONE": tmp_path / "one", "BARE": tmp_path / "bare.safetensors",
    }  # fmt: skip
    write_images(places["EMPTY"], 1, 0)
    (places["EMPTY"] / "owl").mkdir()
    write_images(places["ONE"], 2, 0, {"pink": 0})
    whole = checkpoint.load_classifier(places["RUN"])
    run = config.load(None, ["name=x", "data.path=x"])
    checkpoint.export(places["BARE"], whole.backbone, {"step": 1, "run": run.model_dump(mode="json")})
    for name, place in sorted(places.items(), key=lambda item: -len(item[0])):
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    if arguments[0] != "predict":
        arguments = [*arguments, f"folder={tmp_path / 'runs'}"]
    assert main(arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error


def test_bundled_recipes_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    names = sorted(folder.glob("finetune_*.yaml"))
    assert [file.stem for file in names] == ["finetune_cifar10", "finetune_imagenet100"]
    for file in names:
        run = finetune_settings.load(file)
        finetune_settings.resolve_finetune(run, 126_689, 8, world_size=8)
    assert "NOT RUN BY US" in (folder / "finetune_imagenet100.yaml").read_text()
