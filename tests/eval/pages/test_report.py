"""The report: one self-contained file that shows what is there and says what is not."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nearfar.eval.pages.report import write_report
from nearfar.eval.pictures import figures
from nearfar.eval.pictures.figures import Cell, Figure, Group, encoded
from nearfar.eval.results import FORMAT
from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError


def entry(subject: str, task: str, percent: Any, val: str = "val", **more: Any) -> dict[str, Any]:
    names = {name: {"path": f"/data/{name}", "fingerprint": name, "images": 1000} for name in ("train", val)}
    what = {"subject": subject, "task": task, "percent": percent, "weights": "w", "reading": {"layer": "final"}}
    return {**what, "train": names["train"], "val": names[val], "step": None, "detail": None, **more}


def held(*entries: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "scores": entries})


RESULTS = [
    entry(subject, task, percent)
    for subject, row in (
        ("trained", (64.6, 84.6, 30.0)), ("untrained", (30.6, 65.5, 20.5)), ("pixels", (90.1, 12.2, 9.1)),
    )
    for task, percent in zip(("knn", "linear", "segment"), row, strict=True)
]  # fmt: skip
GREEN = Cell(encoded(Image.new("RGB", (8, 8), "green")), "query", "<cat>")
BLUE = Cell(encoded(Image.new("RGB", (8, 8), "blue"), exact=True), "neighbor 1", "dog", "wrong")
NEIGHBORS = Figure("neighbors", "Nearest neighbors", "A & B", (Group((("trained", (BLUE,)),), GREEN),))
SECTIONS = [
    "Nearest neighbors", "Attention", "Curves", "Frozen features", "Confusion", "Views", "Settings", "Environment",
    "Lineage",
]  # fmt: skip
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
    (folder / "results.json").write_text(held(*RESULTS))
    Image.new("RGB", (40, 30), "red").save(folder / "views.png")
    figures.write(folder / figures.FILE, [NEIGHBORS, Figure("attention", "Attention", missing="no <attention> maps.")])
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
    pictures = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [GREEN.image, BLUE.image, (run / "views.png").read_bytes()]
    assert page.count("<svg") == 4
    assert [file.name for file in run.glob(f"{files.PARTIAL}*")] == []


def test_the_sections_come_in_order_and_every_picture_has_words(run: Path) -> None:
    page = write_report(run, about={"versions": {"torch": "2.13"}, "step": 300, "data": "abc"}).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img alt="[^"]+"', page)) == 3
    assert (
        "\u2717 dog" in page and 'alt="neighbor 1, wrong"' in page
    )  # told by a symbol and in words, not by color only
    assert "&lt;cat&gt;" in page and "no &lt;attention&gt; maps." in page
    rows = {row[0]: row[1:] for row in parsed(page).rows}
    assert (
        rows["torch"] == ["2.13"] and rows["weights of step"] == ["300"] and rows["/data/val, 1,000 images"] == ["val"]
    )


def test_a_confusion_matrix_is_shown_with_its_names(run: Path) -> None:
    detail = {
        "confusion": [[9, 1], [4, 6]],
        "classes": ["cat", "<dog>"],
        "most_confused": [{"class": "<dog>", "images": 4}],
    }
    (run / "results.json").write_text(held(entry("trained", "knn", 75.0, detail=detail)))
    rows = {row[0]: row[1:] for row in parsed(write_report(run).read_text()).rows}
    assert rows["cat"] == ["90", "10"] and rows["<dog>"] == ["40", "60"]
    (run / "results.json").write_text(held(entry("trained", "knn", 75.0, detail={"confusion": [[1], "x"]})))
    assert "is not scored yet" in write_report(run).read_text()


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
    lede = "vit_tiny_patch8 + LGP + PRR, pretrained without labels for 10 epochs (300 steps), in 30 seconds."
    for fact in (lede, "<dd>300</dd>", "<dd>10 of 10</dd>", "<dd>30 seconds</dd>"):
        assert fact in page
    rows = {row[0]: row[1:] for row in parsed(page).rows}
    assert rows["backbone.depth"] == ["default"]
    assert rows["train.batch_size"] == ["64"]


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    parsed(page)
    for file in ("config.yaml", "metrics.jsonl", "results.json", "views.png", "figures.json"):
        assert file in page
    assert page.count('class="missing"') == 8


def test_part_of_the_scores_is_enough(run: Path) -> None:
    (run / "results.json").write_text(held(entry("trained", "knn", 50.0), entry("pixels", "segment", 9.0)))
    rows = {row[0]: row[1:] for row in parsed(write_report(run).read_text()).rows}
    assert rows["Trained"] == ["50.0", "\u2013"]
    assert rows["Raw pixels"] == ["\u2013", "9.0"]
    assert rows["Trained \u2212 raw pixels"] == ["\u2013", "\u2013"]


def test_images_without_labels_have_no_confusion(run: Path) -> None:
    (run / "results.json").write_text(held(entry("trained", "segment", 9.0)))
    assert "Confusion" not in re.findall(r"<h2>(.*?)</h2>", write_report(run).read_text())
    (run / "results.json").write_text(held(entry("trained", "segment", 9.0), entry("trained", "linear", 50.0)))
    assert "The k-NN of the trained features is not scored yet" in write_report(run).read_text()


def test_robustness_and_position_are_sections_where_they_are_scored(run: Path) -> None:
    detail = {"table": {"clean": {"top1": 64.6, "drop": 0.0}, "patch shuffle": {"top1": 50.1, "drop": 14.5}}}
    more = [
        entry("trained", "robustness", 50.1, detail=detail),
        entry("trained", "position", 62.5, detail={"row": 0.75, "column": 0.5}),
    ]
    (run / "results.json").write_text(held(*RESULTS, *more))
    page = write_report(run).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page)[4:8] == ["Confusion", "Robustness", "Position", "Views"]
    assert ["patch shuffle", "50.1 (-14.5)"] in parsed(page).rows
    assert ["trained", "0.750", "0.500"] in parsed(page).rows


def test_names_from_outside_are_escaped(run: Path) -> None:
    (run / "config.yaml").write_text("name: <b>bold</b>\ndata: {path: '<script>alert(1)</script>'}\n")
    page = write_report(run).read_text()
    parsed(page)
    assert "<script" not in page
    assert "<b>bold" not in page


def test_lines_of_metrics_that_are_not_numbers_are_passed_over(run: Path) -> None:
    strange = ['{"step": "1", "loss": 2}', '{"step": 1, "loss": "low", "lr": null}', "[" * 100_000, "7", "{}"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(strange) + '\n{"step": 400, "loss": 1.5}\n')
    assert "<dd>400</dd>" in write_report(run).read_text()


def test_scores_on_other_images_stand_in_a_table_of_their_own(run: Path) -> None:
    (run / "results.json").write_text(held(*RESULTS, entry("trained", "knn", 12.5, val="other")))
    page = write_report(run).read_text()
    parsed(page)
    assert page.index("scored on /data/other (1,000)") < page.index("scored on /data/val (1,000)")
    assert "All 10 scores" in page and ">12.5<" in page and ">64.6<" in page


def test_what_the_scores_mean_stands_at_the_top(run: Path) -> None:
    page = write_report(run).read_text()
    top = page[: page.index("<h2>")]
    verdict = (
        "Training has not paid off yet: the features are better than untrained by 34.0 points, and worse than raw "
    )
    verdict += "pixels"
    assert f'<p class="verdict bad"><b>{verdict}: ' in top
    assert "k-NN top-1 64.6 % (untrained 30.6 %, raw pixels 90.1 %)" in top


def test_the_reason_of_missing_figures_is_told(run: Path) -> None:
    (run / figures.FILE).unlink()
    (run / "views.png").write_bytes(b"<script>")
    page = write_report(run, "There is nothing at <here>.").read_text()
    assert "There is nothing at &lt;here&gt;." in page and "views.png is not a PNG" in page


def test_a_loss_that_is_not_finite_does_not_stop_the_page(run: Path) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    assert "1 of 2 values are not finite" in write_report(run).read_text()


def test_writing_it_again_gives_the_same_file(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("figures.json", b"{"),
        ("figures.json", json.dumps({"format": figures.FORMAT, "figures": [{"key": "x"}]}).encode()),
        ("results.json", b"{"),
        ("results.json", b"[1]"),
        ("results.json", b"\xff\xfe{}"),
        ("results.json", held(entry("trained", "knn", "64.6")).encode()),
        ("results.json", held(entry("trained", "knn", float("nan"))).encode()),
        ("config.yaml", b"a: ["),
        ("config.yaml", b"- a"),
        ("config.yaml", b"\xff"),
        ("config.yaml", b"[" * 5000),
        ("config.yaml", BOMB.encode()),
        ("metrics.jsonl", b'{"step": 1, "loss": 2}\n\xff\n'),
    ],
)
def test_a_broken_file_is_named(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(file)):
        write_report(run)


def test_no_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report(tmp_path / "nowhere")
