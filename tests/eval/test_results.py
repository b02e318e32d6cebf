"""results.json: every score of its own, none erased, and nothing believed that a file merely says."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nearfar.eval import results
from nearfar.eval.results import DataName, Score
from nearfar.ssl.errors import UserError

TRAIN, VAL, OTHER = (DataName(f"/data/{name}", name, 100) for name in ("train", "val", "other"))
SCORE = Score("trained", "knn", 50.0, "w1", TRAIN, VAL, {"layer": "final"}, 10, {"k": 20})


def test_a_score_replaces_only_its_equal(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "results.json"
    others = [
        replace(SCORE, subject="untrained"),
        replace(SCORE, task="linear"),
        replace(SCORE, weights="w2"),
        replace(SCORE, val=OTHER),
        replace(SCORE, reading={"layer": "blocks-4"}),
    ]
    for score in (SCORE, *others, replace(SCORE, percent=51.0)):
        results.add(file, score)
    assert results.read(file) == [*others, replace(SCORE, percent=51.0)]
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_moved_data_is_the_same_data(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results.add(file, SCORE)
    moved = replace(SCORE, val=replace(VAL, path="/elsewhere"))
    assert results.add(file, moved) == [moved]


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "results.json"

    def write(first: int) -> None:
        for weights in range(first, first + 10):
            results.add(file, replace(SCORE, weights=str(weights)))

    # two processes, since a process's own threads would share the partial file's name
    if not (child := os.fork()):
        write(0)
        os._exit(0)
    thread = threading.Thread(target=write, args=(10,))
    thread.start()
    thread.join()
    os.waitpid(child, 0)
    assert {score.weights for score in results.read(file)} == {str(i) for i in range(20)}


def test_tables_pair_what_was_scored_on_the_same_images() -> None:
    scores = [
        replace(SCORE, val=OTHER, percent=1.0),
        SCORE,
        replace(SCORE, subject="pixels", step=None, percent=30.0),
        replace(SCORE, weights="w0", step=5, percent=99.0),  # earlier weights, scored later
    ]
    first, second = results.tables(scores)
    assert {subject: found["knn"].percent for subject, found in first.items()} == {"trained": 50.0, "pixels": 30.0}
    assert second["trained"]["knn"].percent == 1.0


GOOD = {
    "subject": "trained", "task": "knn", "percent": 50.0, "weights": "w", "reading": {}, "step": 1, "detail": None,
    "train": {"path": "a", "fingerprint": "b", "images": 3}, "val": {"path": "a", "fingerprint": "c", "images": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        {"percent": "50"}, {"percent": float("nan")}, {"percent": None}, {"subject": "<b>"}, {"task": []},
        {"step": "1"}, {"reading": 3}, {"train": {"path": 1, "fingerprint": "b", "images": 3}}, {"val": "x"},
        {"more": 1},
    ],
)  # fmt: skip
def test_scores_that_no_evaluation_writes_are_refused(tmp_path: Path, entry: dict) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"format": results.FORMAT, "scores": [GOOD]}))
    assert len(results.read(file)) == 1
    file.write_text(json.dumps({"format": results.FORMAT, "scores": [GOOD | entry]}))
    with pytest.raises(UserError, match="move it away"):
        results.read(file)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"trained": {"knn_top1": 3}}', b"\xff\xfe", b"[" * 100_000, b'{"format": "nearfar']
)
def test_other_files_are_told_and_not_overwritten(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="move it away"):
        results.add(file, SCORE)
    assert file.read_bytes() == content


def test_where_nothing_can_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        results.check_results_writable(tmp_path / "file" / "results.json")
