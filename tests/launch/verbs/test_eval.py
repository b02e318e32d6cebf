"""`nearfar eval` from its command line: every evaluator, and every mistake as one paragraph with exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.eval.results import TITLES
from nearfar.launch import cli
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.settings.defaults import resolve

Evaluated = Callable[..., tuple[int, str, list[dict[str, Any]]]]

SIDE = 16


def draw(root: Path, count: int, seed: int, labels: tuple[int, ...] = (0, 1, 2)) -> None:
    """Class folders below root / "classes", and root / "images" with root / "masks"."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = labels[i % len(labels)]
        pixels = rng.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        pixels[4:12, 4:12, label] = 255
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[4:12, 4:12] = label + 1
        for file, content in (
            (f"classes/{label}/{i:03}.png", pixels),
            (f"images/{i:03}.png", pixels),
            (f"masks/{i:03}.png", mask),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / file)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported weights, images to learn from and to score."""
    folder = tmp_path_factory.mktemp("eval")
    draw(folder / "train", 30, 0)
    draw(folder / "val", 12, 1)
    tiny = ["backbone.name=vit_tiny_patch4", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2"]
    small = ["views.global_crops_size=16", "views.local_crops_size=16", "head.prototypes=16", "head.hidden_dim=8"]
    run, _ = resolve(config.load(None, ["name=r", *tiny, *small, "head.batch_norm=false"]), 100)
    torch.manual_seed(0)
    backbone = create("vit_tiny_patch4", img_size=SIDE, embed_dim=24, depth=2, num_heads=2)
    state = {"run": run.model_dump(mode="json"), "step": 3, "arch": backbone.arch}
    checkpoint.export(folder / "weights.safetensors", backbone, state)
    return folder


@pytest.fixture
def evaluated(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluated:
    """Runs `nearfar eval WHAT`: exit code, all that was said, and the scores."""

    def run(
        what: str, *flags: str, kind: str = "classes", train: Path | None = None, val: Path | None = None
    ) -> tuple[int, str, list[dict[str, Any]]]:
        out = tmp_path / "results.json"
        paths = ["--train", str(train or shared / "train" / kind), "--val", str(val or shared / "val" / kind)]
        model = str(shared / "weights.safetensors")
        code = cli.main(["eval", what, model, *paths, "--out", str(out), "--workers", "0", *flags])
        output = capsys.readouterr()
        scores = json.loads(out.read_text())["scores"] if out.exists() else []
        return code, " ".join((output.out + output.err).split()), scores

    return run


@pytest.mark.parametrize(
    ("what", "flags", "kind"),
    [
        ("logistic", (), "classes"),
        ("fewshot", ("--baselines",), "classes"),
        ("robustness", ("--baselines",), "classes"),
        ("position", ("--baselines",), "classes"),
        ("linear", ("--augment", "--epochs", "4"), "classes"),
        ("retrieval", ("--memory", "100", "--baselines"), "images"),
        ("segment", ("--head", "locat", "--steps", "4", "--window", "12", "--stride", "4"), "images"),
        ("segment", ("--window", "8", "--steps", "4"), "images"),
    ],
)
def test_every_evaluator_has_a_name(evaluated: Evaluated, what: str, flags: tuple[str, ...], kind: str) -> None:
    code, output, scores = evaluated(what, *flags, kind=kind)
    assert code == 0, output
    subjects = {"trained"} | ({"untrained", "pixels"} if "--baselines" in flags else set())
    subjects -= {"pixels"} if what == "robustness" else set()
    assert {(score["subject"], score["task"]) for score in scores} == {(subject, what) for subject in subjects}
    assert TITLES[what].split()[0] in output
    rows = {"fewshot": "1 % of labels", "robustness": "patch shuffle", "position": "column"}
    assert rows.get(what, "") in output


def test_public_weights_are_scored_read_and_written_as_they_are(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .pth in DINO's names: the same scores and features as the self-describing file that `export` makes of it."""
    torch.manual_seed(1)
    network = create("vit_tiny_patch4", img_size=SIDE, embed_dim=64, depth=2, num_heads=1)
    state = {f"backbone.{name.removeprefix('model.')}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"teacher": state | {"head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "public.pth")
    monkeypatch.chdir(tmp_path)
    images = ["--train", str(shared / "train/classes"), "--val", str(shared / "val/classes"), "--size", "16"]
    assert cli.main(["export", "public.pth", "ours.safetensors"]) == 0
    assert "vit_base_patch4 of public.pth" in capsys.readouterr().out.replace("\n", " ")
    for file in ("public.pth", "ours.safetensors"):
        assert cli.main(["eval", "knn", file, *images, "--baselines", "--out", f"{file}.json", "--workers", "0"]) == 0
        assert cli.main(["features", file, str(shared / "val/classes"), f"{file}.features", "--size", "16"]) == 0
    (first, *_), (second, *_) = (
        json.loads(Path(f"{file}.json").read_text())["scores"] for file in ("public.pth", "ours.safetensors")
    )
    assert first["percent"] == second["percent"] and first["weights"] == second["weights"]
    found, same = (np.load(f"{file}.features/features.npy") for file in ("public.pth", "ours.safetensors"))
    assert np.array_equal(found, same) and found.shape == (12, 64)
    capsys.readouterr()
    assert cli.main(["eval", "knn", "public.pth"]) == 2
    assert "name labeled images with --val" in capsys.readouterr().err
    picture = next((shared / "val").rglob("*.png"))
    assert cli.main(["eval", "knn", str(picture), *images]) == 2
    assert "is no file of weights" in " ".join(capsys.readouterr().err.split())


def test_all_is_what_reads_the_same_features(evaluated: Evaluated) -> None:
    code, output, scores = evaluated("all", "--epochs", "2")
    assert code == 0 and {score["task"] for score in scores} == {"knn", "linear", "logistic", "fewshot"}
    assert "Left out: mIoU." in output
    assert scores[1]["detail"]["epochs"] == 2


def test_the_pooling_is_part_of_what_a_score_is_of(evaluated: Evaluated) -> None:
    evaluated("knn")
    code, _, (cls, mean) = evaluated("knn", "--pooling", "mean")
    assert code == 0 and [each["detail"]["features"]["pooling"] for each in (cls, mean)] == ["cls", "mean"]
    code, _, (*_, linear) = evaluated("linear", "--epochs", "2", "--pooling", "cls,mean", "--layer", "final,blocks-2")
    assert code == 0 and {row["chosen"] for row in linear["detail"]["holdout"]} == {
        "final cls", "final mean", "blocks-2 cls", "blocks-2 mean",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "flags", "message"),
    [
        ("knn", ("--window", "8"), "--window is for `eval segment`; `eval knn` does not read it"),
        ("segment", ("--augment",), "--augment is for `eval linear`"),
        ("segment", ("--stride", "4"), "say --window too"),
        ("segment", ("--steps", "0"), "--steps must be at least 1, not 0"),
        ("linear", ("--augment", "--layer", "final,blocks-2"), "--augment trains on one kind of feature"),
        ("linear", ("--augment", "--pooling", "cls,mean"), "--augment trains on one kind of feature"),
        ("knn", ("--pooling", "cls,mean"), "--pooling takes several for `eval linear` alone; `eval knn` reads one"),
        ("knn", ("--pooling", "grid"), 'not "grid"'),
        ("segment", ("--pooling", "mean"), "--pooling is for `eval all`, `eval knn`, `eval whitened`"),
        ("segment", ("--window", "7"), "multiple of 4"),
        ("segment", ("--grid-size", "10", "16", "--baselines"), "cannot be cut into patches of 4x4: both sides must"),
        ("segment", ("--window", "8", "--stride", "9"), "between 1 and 8"),
    ],
)
def test_flags_that_mean_nothing_here_are_refused(
    evaluated: Evaluated, what: str, flags: tuple[str, ...], message: str
) -> None:
    code, output, scores = evaluated(what, *flags, kind="images" if what == "segment" else "classes")
    assert code == 2 and message in output and not scores


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["knn", "whitened", "linear", "logistic", "fewshot", "robustness"])
def test_missing_labels(evaluated: Evaluated, what: str) -> None:
    code, output, _ = evaluated(what, kind="images")
    assert code == 2 and "have no labels. Labels are class folders" in output


@pytest.mark.parametrize("what", ["segment", "retrieval"])
def test_missing_masks(evaluated: Evaluated, what: str) -> None:
    code, output, _ = evaluated(what, kind="classes")
    assert code == 2 and "have no masks. Masks are 8-bit PNGs" in output


def listed(shared: Path, file: Path, numbers: dict[str, int]) -> Path:
    """A list of the images of `shared` with other class numbers."""
    images = sorted((shared / "classes").rglob("*.png"))
    file.write_text("".join(f"{image}\t{numbers[image.parent.name]}\n" for image in images))
    return file


@pytest.mark.parametrize("what", ["linear", "logistic", "fewshot"])
def test_labels_with_gaps(evaluated: Evaluated, shared: Path, tmp_path: Path, what: str) -> None:
    gaps = {"0": 0, "1": 1, "2": 3}
    train, val = (listed(shared / side, tmp_path / f"{side}.txt", gaps) for side in ("train", "val"))
    code, output, _ = evaluated(what, train=train, val=val)
    assert code == 2 and "have gaps: 1 of the classes 0 to 3" in output and "class 2" in output


@pytest.mark.parametrize("what", ["linear", "logistic", "fewshot"])
def test_one_class_only(evaluated: Evaluated, shared: Path, tmp_path: Path, what: str) -> None:
    same = {"0": 0, "1": 0, "2": 0}
    train, val = (listed(shared / side, tmp_path / f"{side}.txt", same) for side in ("train", "val"))
    code, output, _ = evaluated(what, train=train, val=val)
    assert code == 2 and "with one class only, any answer is right" in output


def test_fewer_images_than_k(evaluated: Evaluated, tmp_path: Path) -> None:
    draw(tmp_path / "few", 6, 3)
    code, output, scores = evaluated("knn", train=tmp_path / "few" / "classes")
    assert code == 0, output
    assert scores[0]["detail"]["k"] == 6 and "at most 6" in scores[0]["detail"]["capped"]
    code, _, scores = evaluated("robustness", train=tmp_path / "few" / "classes")
    assert code == 0 and scores[-1]["detail"]["k"] == 6


@pytest.mark.parametrize(
    "what", ["knn", "whitened", "linear", "logistic", "fewshot", "robustness", "segment", "retrieval", "position"]
)
def test_features_that_are_not_finite(
    evaluated: Evaluated, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    diverged = create("vit_tiny_patch4", img_size=SIDE, embed_dim=24, depth=2, num_heads=2)
    for parameter in diverged.parameters():
        parameter.data.fill_(float("nan"))
    monkeypatch.setattr(checkpoint, "load", lambda file: diverged)
    flags = ("--window", "8", "--head", "locat", "--steps", "2") if what == "segment" else ()
    code, output, scores = evaluated(what, *flags, kind="images" if what in ("segment", "retrieval") else "classes")
    assert code == 2 and "not finite" in output and "diverged" in output and not scores


@pytest.fixture
def scenes(shared: Path, tmp_path: Path) -> Path:
    """A copy of the images and masks to score, to be spoiled."""
    draw(tmp_path / "spoiled", 12, 1)
    return tmp_path / "spoiled"


@pytest.mark.parametrize("flags", [(), ("--window", "8")])
@pytest.mark.parametrize("what", ["segment", "retrieval"])
def test_masks_with_unknown_values(evaluated: Evaluated, scenes: Path, what: str, flags: tuple[str, ...]) -> None:
    flags = flags if what == "segment" else ()
    Image.fromarray(np.full((SIDE, SIDE), 200, np.uint8)).save(scenes / "masks" / "004.png")
    code, output, scores = evaluated(what, *flags, kind="images", val=scenes / "images")
    assert code == 2 and "The mask of 004.png has class 200" in output and not scores
    code, output, _ = evaluated(what, *flags, "--classes", "4", kind="images", val=scenes / "images")
    assert code == 2 and "004.png has class 200, but there are 4 classes" in output


@pytest.mark.parametrize("flags", [(), ("--window", "8")])
def test_masks_of_another_shape_are_named_and_left_out(
    evaluated: Evaluated, scenes: Path, flags: tuple[str, ...]
) -> None:
    Image.fromarray(np.ones((SIDE, 6), np.uint8)).save(scenes / "masks" / "004.png")
    code, output, scores = evaluated("segment", "--steps", "2", *flags, kind="images", val=scenes / "images")
    assert code == 0 and "1 of 12 images" in output and "004.png: its mask of 6 x 16 does not fit" in output
    assert scores[0]["detail"]["test"] == 11
    for file in (scenes / "masks").iterdir():
        Image.fromarray(np.ones((SIDE, 6), np.uint8)).save(file)
    code, output, _ = evaluated("segment", "--steps", "3", *flags, kind="images", val=scenes / "images")
    assert code == 2 and ("all masks" in output or "could be read" in output)


def test_a_mask_in_colors_is_refused(evaluated: Evaluated, scenes: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(scenes / "masks" / "004.png")
    code, output, _ = evaluated("segment", kind="images", val=scenes / "images")
    assert code == 2 and "004.png has mode RGB; 8-bit class numbers are needed" in output


# --- feature stores --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(shared: Path) -> Path:
    model = str(shared / "weights.safetensors")
    for side in ("train", "val"):
        for pooling, kind, flags in (("cls", "classes", []), ("grid", "images", ["--size", "16"])):
            images, out = str(shared / side / kind), str(shared / f"{pooling}-{side}")
            arguments = ["features", model, images, out, "--pooling", pooling, "--workers", "0", *flags]
            assert cli.main(arguments) == 0
    return shared


@pytest.mark.parametrize(
    ("what", "kind"),
    [("whitened", "cls"), ("logistic", "cls"), ("fewshot", "cls"), ("retrieval", "grid"), ("position", "grid")],
)
def test_features_on_disk_are_scored_alike(
    evaluated: Evaluated, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, kind: str
) -> None:
    out = tmp_path / "stored.json"
    pair = [str(stores / f"{kind}-train"), "--val", str(stores / f"{kind}-val")]
    assert cli.main(["eval", what, *pair, "--out", str(out)]) == 0
    capsys.readouterr()
    flags = () if what in ("retrieval", "position") else ("--size", "16")
    _, output, scores = evaluated(what, *flags, kind="images" if what == "retrieval" else "classes")
    (stored,) = json.loads(out.read_text())["scores"]
    if kind == "cls":
        assert stored["percent"] == scores[0]["percent"], output
    else:  # batches of another size add up in another order
        assert stored["percent"] == pytest.approx(scores[0]["percent"], abs=0.5)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("robustness", "cls", "robustness cannot read"),
        ("position", "cls", "position cannot read"),
        ("fewshot", "grid", "fewshot cannot read"),
    ],
)
def test_features_of_another_kind_are_refused(
    stores: Path, capsys: pytest.CaptureFixture[str], what: str, kind: str, message: str
) -> None:
    assert cli.main(["eval", what, str(stores / f"{kind}-train"), "--val", str(stores / f"{kind}-val")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_features_of_the_same_images_are_for_nearest_neighbors_alone(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stored.json"
    store = str(stores / "cls-train")
    assert cli.main(["eval", "all", store, "--val", store, "--out", str(out)]) == 2
    assert "would be learned from and scored on" in " ".join(capsys.readouterr().err.split())
    (only,) = json.loads(out.read_text())["scores"]
    assert only["task"] == "knn" and only["detail"]["leave_one_out"]


@pytest.mark.parametrize("flags", [("--window", "8"), ("--head", "locat")])
def test_what_needs_images_is_refused_of_features(
    stores: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    arguments = ["eval", "segment", str(stores / "grid-train"), "--val", str(stores / "grid-val"), *flags]
    assert cli.main(arguments) == 2
    assert "needs the images: name the weights" in " ".join(capsys.readouterr().err.split())


def test_a_store_that_is_half_written_is_refused(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in (stores / "cls-val").iterdir():
        content = file.read_bytes()
        (half / file.name).write_bytes(content[: len(content) // 2] if file.name == "features.npy" else content)
    assert cli.main(["eval", "logistic", str(stores / "cls-train"), "--val", str(half)]) == 2
    assert "is damaged: features.npy" in " ".join(capsys.readouterr().err.split())
    (half / "manifest.json").unlink()
    assert cli.main(["eval", "fewshot", str(stores / "cls-train"), "--val", str(half)]) == 2
    assert "is not a readable feature store" in " ".join(capsys.readouterr().err.split())
