"""The report: one self-contained file that shows what is there and says what is not."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nearfar.eval.report import write_report
from nearfar.ssl.errors import UserError

RESULTS = {
    "trained": {"knn_top1": 64.6, "linear_top1": 84.6, "miou": 30.0},
    "untrained": {"knn_top1": 30.6, "linear_top1": 65.5, "miou": 20.5},
    "pixels": {"knn_top1": 90.1, "linear_top1": 12.2, "miou": 9.1},
    "minutes": 3.2,
}
VOID = {"meta", "img", "br", "path", "circle"}


class Balanced(HTMLParser):
    """Fails on tags that do not close in order; collects rows of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "name: demo\nbackbone: {name: vit_tiny_patch8, lgp: true, prr: true, depth: null}\n"
        "train: {seed: 3, batch_size: 64, epochs: 10}\n"
    )
    lines: list[dict[str, Any]] = [
        {"step": s, "epoch": s / 30, "loss": 5 - s / 100, "lr": 1e-3, "entropy": 0.9, "img_per_s": 640.0}
        for s in range(10, 301, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 310, "lo')
    (folder / "results.json").write_text(json.dumps(RESULTS))
    for name, color in (("views", "red"), ("attention", "green"), ("pca", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{name}.png")
    return folder


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_everything_is_inside_the_one_file(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text()
    parsed(page)
    assert not re.search(r"<script|<link|https?://|@import|url\(", page)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [
        (run / f"{name}.png").read_bytes() for name in ("views", "attention", "pca")
    ]
    assert page.count("<svg") == 4
    assert 'class="missing"' not in page
    assert [file.name for file in run.glob("*.writing")] == []


def test_the_table_has_the_scores_the_best_and_the_differences(run: Path) -> None:
    page = write_report(run).read_text()
    rows = {row[0]: row[1:] for row in parsed(page).rows}
    assert rows["Trained"] == ["64.6", "84.6", "30.0"]
    assert rows["Raw pixels"] == ["90.1", "12.2", "9.1"]
    assert rows["Trained \u2212 untrained"] == ["+34.0", "+19.1", "+9.5"]
    assert rows["Trained \u2212 raw pixels"] == ["-25.5", "+72.4", "+20.9"]
    assert re.findall(r'class="best">([\d.]+)<', page) == ["84.6", "30.0", "90.1"]  # a lost column is shown as lost


def test_the_head_tells_the_facts_and_holds_all_settings(run: Path) -> None:
    page = write_report(run).read_text()
    for fact in ("vit_tiny_patch8 + LGP + PRR", "<dd>300</dd>", "<dd>10 of 10</dd>", "<dd>30 s</dd>"):
        assert fact in page
    rows = {row[0]: row[1:] for row in parsed(page).rows}
    assert rows["backbone.depth"] == ["default"]
    assert rows["train.batch_size"] == ["64"]


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    parsed(page)
    for file in ("config.yaml", "metrics.jsonl", "results.json", "views.png", "attention.png", "pca.png"):
        assert file in page
    assert page.count('class="missing"') == 6


def test_part_of_the_scores_is_enough(run: Path) -> None:
    (run / "results.json").write_text(json.dumps({"trained": {"knn_top1": 50.0}, "pixels": {"miou": 9.0}}))
    rows = {row[0]: row[1:] for row in parsed(write_report(run).read_text()).rows}
    assert rows["Trained"] == ["50.0", "\u2013"]
    assert rows["Raw pixels"] == ["\u2013", "9.0"]
    assert rows["Trained \u2212 raw pixels"] == ["\u2013", "\u2013"]


def test_names_from_outside_are_escaped(run: Path) -> None:
    (run / "config.yaml").write_text("name: <b>bold</b>\ndata: {path: '<script>alert(1)</script>'}\n")
    page = write_report(run).read_text()
    parsed(page)
    assert "<script" not in page
    assert "<b>bold" not in page


def test_a_loss_that_is_not_finite_does_not_stop_the_page(run: Path) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    assert "1 of 2 values are not finite" in write_report(run).read_text()


def test_writing_it_again_gives_the_same_file(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.parametrize(("file", "text"), [("results.json", "{"), ("results.json", "[1]"), ("config.yaml", "a: [")])
def test_a_broken_file_is_named(run: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(file)):
        write_report(run)


def test_no_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")
