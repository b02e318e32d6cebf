"""No score is computed twice or lost, what cannot be scored is said first, and features on disk need no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.features.extraction import Reading
from nearfar.eval.features.store import FeatureStore
from nearfar.eval.knn import knn
from nearfar.eval.scores.headline_scores import TaskScore
from nearfar.eval.scores.tasks import Data
from nearfar.launch import cli
from nearfar.launch.scoring import score as scores
from nearfar.launch.scoring.score import ScoreOptions, Subject, protocol_of, score, sources
from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data import open_source
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.defaults import resolve


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


TRAIN_SCENES, VAL_SCENES = scenes(60, 0), scenes(20, 1)
TRAIN, VAL = Data("/data/train", TRAIN_SCENES), Data("/data/val", VAL_SCENES)


@pytest.fixture
def output() -> StringIO:
    return StringIO()


def subject(folder: Path, seed: int = 0, *settings: str) -> Subject:
    recipe = ["name=r", f"folder={folder}", "views.global_crops_size=16", "views.local_crops_size=16", *settings]
    run, _ = resolve(config.load(None, recipe), 100)
    return Subject(network(seed), run, folder, 10)


def held(folder: Path) -> dict[tuple[str, str], float]:
    return {(each.subject, each.task): each.percent for each in results.read(folder / "results.json")}


def test_what_is_known_is_not_computed_again_and_other_tasks_join_it(
    tmp_path: Path, output: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[str, ...]] = []
    evaluate = scores.evaluate
    monkeypatch.setattr(scores, "evaluate", lambda *a: computed.append(a[3]) or evaluate(*a))
    console, one = Console(file=output, width=200), subject(tmp_path)

    def scored(tasks: list[str], steps: int | None = None) -> list[float]:
        options = ScoreOptions(protocol=protocol_of(one, steps=steps))
        return [each.percent for each in score(one, TRAIN, VAL, tasks=tasks, options=options, console=console)]

    first = scored(["knn"])
    both = scored(["knn", "segment"], 3)
    assert scored(["knn", "segment"], 3) == both and both[:1] == first
    scored(["knn", "segment"], 4)  # k-NN knows no steps
    assert computed == [("knn",), ("segment",), ("segment",)]
    assert len(results.read(tmp_path / "results.json")) == 3


def test_other_masks_of_the_same_images_are_scored_again(tmp_path: Path, output: StringIO) -> None:
    """Masks may be put right under the names that they had; the images, and so k-NN, are the same."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(8):
        Image.fromarray(TRAIN_SCENES.images[i]).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.full((16, 16), i % 2, np.uint8)).save(tmp_path / "masks" / f"{i}.png")

    def scored() -> int:
        data = Data(str(tmp_path / "images"), open_source(tmp_path / "images"))
        score(subject(tmp_path), data, VAL, tasks=("segment",), console=Console(file=output, width=200))
        return len(results.read(tmp_path / "results.json"))

    assert [scored(), scored()] == [1, 1]
    fingerprint = open_source(tmp_path / "images").fingerprint
    Image.fromarray(np.full((16, 16), 1, np.uint8)).save(tmp_path / "masks" / "0.png")
    assert scored() == 2 and open_source(tmp_path / "images").fingerprint == fingerprint


def test_features_are_pooled_as_the_head_read_them_unless_told(tmp_path: Path) -> None:
    assert protocol_of(subject(tmp_path)).pooled.pooling == "cls"
    assert protocol_of(subject(tmp_path, 0, "head.pooling=mean")).pooled.pooling == "mean"
    assert protocol_of(subject(tmp_path, 0, "head.pooling=mean"), pooling="cls").pooled.pooling == "cls"


def test_another_size_shows_the_same_share_of_an_image(tmp_path: Path) -> None:
    one = subject(tmp_path, 0, "eval.size=16", "eval.resize=20")
    assert protocol_of(one).pooled == Reading(16, 20)
    assert protocol_of(one, size=32).pooled == Reading(32, 40) and protocol_of(one, size=8).pooled == Reading(8, 10)
    assert protocol_of(one, size=32, resize=24).pooled == Reading(32, 24)  # refused when it is read


@pytest.mark.parametrize("other", ["weights", "images"])
def test_scores_of_other_weights_or_images_stay_beside_new_ones(tmp_path: Path, output: StringIO, other: str) -> None:
    console = Console(file=output, width=200)
    score(subject(tmp_path), TRAIN, VAL, tasks=["knn"], console=console)
    before = results.read(tmp_path / "results.json")
    seed, val = (1, VAL) if other == "weights" else (0, Data("other", scenes(20, 2)))
    score(subject(tmp_path, seed), TRAIN, val, tasks=["knn"], console=console)
    after = results.read(tmp_path / "results.json")
    assert after[:1] == before and len(after) == 2 and after[0].key != after[1].key


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_all_scores_what_the_images_allow_and_says_first_what_is_left_out(
    tmp_path: Path, output: StringIO, kind: str
) -> None:
    """Class folders ended with "no masks" after everything was computed, and CamVid the other way round."""
    plain = [
        Data(data.path, ArraySource(known.images, **{kind: getattr(known, kind)}))
        for data, known in ((TRAIN, TRAIN_SCENES), (VAL, VAL_SCENES))
    ]
    one = subject(tmp_path)
    options = ScoreOptions(protocol=protocol_of(one, steps=3))
    score(one, *plain, options=options, console=Console(file=output, width=200))
    expected = {"labels": {"knn", "linear", "logistic", "fewshot"}, "masks": {"segment"}}[kind]
    assert {task for _, task in held(tmp_path)} == expected
    text = output.getvalue()
    assert 0 <= text.index("Left out: ") < text.index("Scoring ")


def test_a_score_is_kept_when_another_task_fails(
    tmp_path: Path, output: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linear_fails(*arguments: object) -> Iterator[TaskScore]:
        tasks = arguments[3]
        assert isinstance(tasks, tuple)
        for task in tasks:
            if task == "linear":
                assert ("trained", "knn") in held(tmp_path)  # as soon as it is there
                raise UserError("The probe fell over.")
            yield TaskScore(task, 50.0, {})

    monkeypatch.setattr(scores, "evaluate", linear_fails)
    with pytest.raises(UserError, match="linear top-1: The probe fell over"):
        score(subject(tmp_path), TRAIN, VAL, console=Console(file=output, width=200))
    kept = ("knn", "logistic", "fewshot", "segment")
    assert held(tmp_path) == {("trained", task): 50.0 for task in kept}


def test_a_reason_that_all_share_is_told_once(tmp_path: Path, output: StringIO) -> None:
    """The size of the grids was refused three times, 22 seconds later: of the network, untrained, and of the pixels."""
    one_class = Data("/data/one", ArraySource(TRAIN_SCENES.images, labels=np.zeros(60, int)))
    options = ScoreOptions(baselines=True)
    with pytest.raises(UserError) as caught:
        score(subject(tmp_path), one_class, VAL, tasks=("knn",), options=options, console=Console(file=output))
    assert str(caught.value).startswith("trained, untrained and raw pixels, k-NN top-1: ")
    assert str(caught.value).count("with one class only") == 1


def test_where_no_task_has_a_score_only_the_reason_is_told(tmp_path: Path, output: StringIO) -> None:
    alone = Data("/data/one", ArraySource(TRAIN_SCENES.images, labels=np.zeros(60, int)))
    others = Data("/data/others", ArraySource(VAL_SCENES.images, labels=np.zeros(len(VAL_SCENES), int)))
    with pytest.raises(UserError, match="with one class only") as caught:
        score(subject(tmp_path), alone, others, tasks=("knn", "linear"), console=Console(file=output, width=200))
    assert "other scores" not in str(caught.value)
    assert "Frozen features" not in output.getvalue() and "Next:" not in output.getvalue()


def test_where_no_score_can_be_written_nothing_is_computed(
    tmp_path: Path, output: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "evaluate", None)
    (tmp_path / "file").write_text("")
    options = ScoreOptions(results=tmp_path / "file" / "results.json")
    with pytest.raises(UserError, match=r"cannot be written to .*--out"):
        score(subject(tmp_path), TRAIN, VAL, options=options, console=Console(file=output))


def test_the_end_says_what_the_scores_mean_and_what_to_do_next(tmp_path: Path, output: StringIO) -> None:
    tiny = ["backbone.name=vit_tiny_patch4", "backbone.embed_dim=24", "backbone.depth=1", "backbone.num_heads=2"]
    one = subject(tmp_path, 0, *tiny, "head.prototypes=16", "head.batch_norm=false", "head.hidden_dim=8")
    one = one._replace(run=resolve(one.run, 60)[0])  # as a run is written down
    (tmp_path / "config.yaml").write_text(config.to_yaml(one.run))
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0, "rankme": 2.5, "feature_std": 0.1}\n')
    score(one, TRAIN, VAL, tasks=["knn"], options=ScoreOptions(True), console=Console(file=output, width=200))
    *_, meaning, after = output.getvalue().splitlines()
    assert "untrained" in meaning and "raw pixels" in meaning and "RankMe 2.5" in meaning
    assert after.startswith("Next: ")
    log = (tmp_path / "run.log").read_text()
    assert meaning in log and after in log


def test_the_command_that_is_next_names_the_exported_file(tmp_path: Path, output: StringIO) -> None:
    """And not the folder in which it lies, which holds no weights that anyone meant."""
    one, file = subject(tmp_path), tmp_path / "mine.safetensors"
    checkpoint.export(file, one.backbone, {"run": one.run.model_dump(mode="json"), "step": 10})
    score(Subject.of(file), TRAIN, VAL, tasks=["knn"], console=Console(file=output, width=200))
    assert f"Next: nearfar features {file} IMAGES OUT" in output.getvalue()


def test_the_command_that_is_next_scores_the_same_images(tmp_path: Path, output: StringIO) -> None:
    """Without the --train and --val that were given, it failed or scored others."""
    one = subject(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml(one.run))
    train, val = Data("/my data/train", TRAIN.source), Data("/val", VAL.source)
    score(one, train, val, tasks=["knn"], console=Console(file=output, width=200))
    *_, after = output.getvalue().splitlines()
    assert f"nearfar eval all {tmp_path} --train '/my data/train' --val /val --baselines" in after


def test_images_left_out_and_masks_of_another_size_are_told(tmp_path: Path, output: StringIO) -> None:
    class Damaged(ArraySource):
        def mask(self, i: int) -> np.ndarray:
            mask = super().mask(i)
            assert mask is not None
            return np.ascontiguousarray(mask[:, :8] if i == 3 else mask[::2, ::2])

    val = Data("/data/half", Damaged(VAL_SCENES.images, masks=VAL_SCENES.masks))
    one = subject(tmp_path)
    options = ScoreOptions(protocol=protocol_of(one, steps=2))
    score(one, TRAIN, val, tasks=["segment"], options=options, console=Console(file=output, width=300))
    text = output.getvalue()
    assert "1 of 20 images in /data/half are left out: image 3: its mask of 8 x 16 does not fit" in text
    assert "19 masks of /data/half are not of their image's size" in text


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    for pooling in ("cls", "grid"):
        for name, source in (("train", TRAIN.source), ("val", VAL.source)):
            reading = Reading(16, pooling=pooling)
            FeatureStore.write(tmp_path / f"{pooling}-{name}", network(0), source, reading)
    FeatureStore.write(tmp_path / "other-val", network(1), VAL.source, Reading(16))
    return tmp_path


def test_features_on_disk_are_scored_without_the_network(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = stores / "scores.json"
    command = ["eval", "knn", str(stores / "cls-train"), "--val", str(stores / "cls-val"), "--out", str(out)]
    assert cli.main(command) == 0
    train, val = np.load(stores / "cls-train/features.npy"), np.load(stores / "cls-val/features.npy")
    expected = knn(train, TRAIN.source.labels, val, VAL.source.labels, (20,))[20]
    (held,) = json.loads(out.read_text())["scores"]
    assert (held["task"], held["percent"], held["val"]["path"]) == ("knn", expected, str(stores / "cls-val"))
    assert f"{expected:.1f}" in capsys.readouterr().out
    assert cli.main(["eval", "all", str(stores / "grid-train"), "--val", str(stores / "grid-val")]) == 0


@pytest.mark.parametrize(
    ("what", "train", "val", "message"),
    [
        ("knn", "cls-train", "other-val", "was made with checkpoint"),
        (
            "segment",
            "cls-train",
            "cls-val",
            "which segment cannot read; knn, whitened, linear, logistic and fewshot can",
        ),
        ("linear", "grid-train", "grid-val", "which linear cannot read; segment, retrieval and position can"),
        ("knn", "cls-train", None, "name those to score with --val"),
        ("knn", "cls-train", "nowhere", "There is nothing at"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    stores: Path, capsys: pytest.CaptureFixture[str], what: str, train: str, val: str | None, message: str
) -> None:
    command = ["eval", what, str(stores / train), *(["--val", str(stores / val)] if val else [])]
    assert cli.main(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_features_in_place_of_images_are_told_for_what_they_are(stores: Path) -> None:
    run = config.load(None, ["name=r", f"data.path={stores / 'cls-train'}"])
    with pytest.raises(UserError, match=r"cls-val holds features, .* nearfar eval all TRAIN_FEATURES --val"):
        sources(run, str(stores.parent), str(stores / "cls-val"))
