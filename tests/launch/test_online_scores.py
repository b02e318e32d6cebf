"""The online k-NN: which images it looks at, what ends it, and who computes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.eval.features.extraction import Reading, extract
from nearfar.eval.knn import knn
from nearfar.launch.online_scores import OnlineKNN
from nearfar.ssl import config
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.settings.run import Run


def make(folder: Path, *settings: str) -> Run:
    return config.load(None, ["name=r", f"folder={folder}", "train.device=cpu", "train.batch_size=64", *settings])


def test_the_online_score_looks_at_no_more_images_than_asked() -> None:
    def source(count: int) -> Any:
        return ArraySource(np.zeros((count, 8, 8, 3), np.uint8), labels=np.arange(count) % 7)

    probe = OnlineKNN(source(1000), source(330), 100)
    assert len(probe.memory) == 100 and len(probe.val) == 83
    assert set(np.asarray(probe.val.labels)) == set(range(7))
    assert len(OnlineKNN(source(50), source(30), 100).val) == 30


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_online_score_reads_what_the_head_reads(tmp_path: Path, pooling: str) -> None:
    rng = np.random.default_rng(0)
    images = ArraySource(rng.integers(0, 256, (60, 16, 16, 3), np.uint8), labels=np.arange(60) % 3)
    backbone = create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2)
    run = make(tmp_path, "eval.size=16", "eval.resize=16", "data.workers=0", f"head.pooling={pooling}")
    features = extract(backbone, images, Reading(16, 16, pooling=pooling))
    assert features.labels is not None
    (expected,) = knn(features.x, features.labels, features.x, features.labels, ks=(20,)).values()
    assert OnlineKNN(images, images, 60)(backbone, run) == {"knn_top1": expected}


def test_the_online_score_matches_classes_by_name(tmp_path: Path) -> None:
    """Each class is a color, so that the nearest neighbor is right; data.val has one class of three, numbered 0."""
    colors = np.repeat(np.asarray([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8), 30, 0)
    pixels = np.broadcast_to(colors[:, None, None], (90, 16, 16, 3)).copy()
    pixels += np.random.default_rng(0).integers(0, 5, pixels.shape, np.uint8)
    train = ArraySource(pixels, labels=np.repeat(range(3), 30), classes=["red", "green", "blue"])
    backbone = create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2)
    run = make(tmp_path, "eval.size=16", "eval.resize=16", "data.workers=0")
    blue = ArraySource(pixels[60:], labels=np.zeros(30, int), classes=["blue"])
    assert OnlineKNN(train, blue, 90)(backbone, run) == {"knn_top1": 100.0}


def test_the_online_score_of_classes_that_training_lacks_is_refused_by_name(tmp_path: Path) -> None:
    pixels = np.zeros((60, 16, 16, 3), np.uint8)
    train = ArraySource(pixels, labels=np.arange(60) % 2, classes=["cat", "dog"])
    val = ArraySource(pixels, labels=np.arange(60) % 2, classes=["car", "dog"])
    probe = OnlineKNN(train, val, 60)
    assert "1 of the 2 classes of the validation images" in probe.missing and "(car;" in probe.missing
    assert probe(create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2), make(tmp_path)) == {}
    assert "labels" in OnlineKNN(ArraySource(pixels), val, 60).missing


def test_a_stop_ends_the_online_score(tmp_path: Path) -> None:
    images = ArraySource(np.zeros((300, 16, 16, 3), np.uint8), labels=np.arange(300) % 3)
    backbone = create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2)
    run = make(tmp_path, "eval.size=16", "eval.resize=16", "data.workers=0")
    calls = []
    stopping = OnlineKNN(images, images, 300, lambda: bool(calls.append(1)) or len(calls) == 2)
    assert stopping(backbone, run) is None and len(calls) == 2
    assert OnlineKNN(images, images, 300)(backbone, run) == {"knn_top1": pytest.approx(100 / 3, abs=70)}


def test_the_online_score_is_computed_where_the_teacher_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ArraySource(np.zeros((60, 16, 16, 3), np.uint8), labels=np.arange(60) % 3)
    backbone = create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2)
    run = make(tmp_path, "eval.size=16", "eval.resize=16", "data.workers=0")
    seen = []
    monkeypatch.setattr("nearfar.launch.online_scores.knn", lambda *_, ks, device: seen.append(device) or {20: 50.0})
    assert OnlineKNN(images, images, 60)(backbone, run) == {"knn_top1": 50.0}
    assert seen == [next(backbone.parameters()).device]


RANK = """
import json
import sys
from pathlib import Path
import numpy as np
import torch
from nearfar.launch.online_scores import OnlineKNN
from nearfar.ssl import config
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.parallel import distributed

folder, world = sys.argv[1], distributed.from_environment()
torch.set_num_threads(1)
images = ArraySource(np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), np.uint8), labels=np.arange(600) % 3)
run = config.load(None, ["name=r", f"folder={folder}", "train.device=cpu", "train.precision=fp32", "eval.size=16",
                         "eval.resize=16", "data.workers=0"])
seen, messages = [], []
read = images.read
images.read = lambda i: seen.append(i) or read(i)


def backbone(seed):
    torch.manual_seed(seed)
    return create("vit_tiny_patch4", img_size=16, embed_dim=12, depth=1, num_heads=2)


def scored(network, stop=lambda: False, val=images):
    seen.clear()
    score = OnlineKNN(images, val, 600, stop, world.size > 1, messages.append)
    found = score(network, run) if world.first else score.assist(network, run)
    return found, len(seen)


with distributed.joined(world):
    polls = iter(range(10**6))
    found = [scored(backbone(0)), scored(backbone(0), lambda: next(polls) == 3), scored(backbone(world.rank))]
    mine = ArraySource(images.images, None if world.rank else images.labels)
    found += [scored(backbone(0), val=mine), messages]
Path(folder, f"{world.size}-{world.rank}").write_text(json.dumps(found))
"""


def test_all_ranks_compute_the_online_score_and_it_is_that_of_one(tmp_path: Path) -> None:
    """In full, then with a stop in the middle, then with other weights and other images on the second rank."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start in ([sys.executable], torchrun):
        subprocess.run([*start, str(script), str(tmp_path)], timeout=120, check=True)
    alone, first, other = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    (score, read), stopped, own, others, _ = alone
    assert read == 1200 and stopped[0] is None and own == [score, 1200]
    assert first[0][0] == score and first[0][1] + other[0][1] == 1200 and other[0][1] == 2 * 280
    assert first[1][0] is None and first[1][1] < 400
    assert first[2] == own and other[2] == [None, 0]
    assert first[3] == others and others[0] == score and other[3] == [None, 0]
    assert [line.split(",")[0] for line in first[4]] == [f"The ranks have different {x}" for x in ("weights", "images")]
