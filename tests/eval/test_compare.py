"""Runs side by side."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from nearfar.eval.compare import compare, runs_in, write_comparison
from nearfar.ssl.errors import UserError

Scores = dict[str, float] | None


def make(folder: Path, name: str, lr: float, loss: float, scores: Scores, online: float | None) -> None:
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"name": name, "folder": "x", "optim": {"lr": lr, "clip_grad": 3}}))
    lines = [{"step": 10, "loss": loss + 1}, {"step": 1200, "loss": loss}]
    lines += [{"step": 1200, "knn_top1": online}] if online is not None else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scores:
        (run / "results.json").write_text(json.dumps({"trained": scores, "pixels": {"miou": 1.0}}))


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.links: list[str] = []
        self._marked = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._marked = ("class", "best") in attrs
        if tag == "a":
            self.links.append(str(dict(attrs)["href"]))

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data.strip()
            if self._marked:
                self.best.append(data)


def test_what_differs_and_what_came_out(tmp_path: Path) -> None:
    make(tmp_path, "a", 1e-4, 2.5, {"knn_top1": 40.06, "linear_top1": 60.0}, 11.0)
    make(tmp_path, "b<", 5e-4, 2.25, None, 41.0)
    (tmp_path / "a" / "report.html").write_text("")
    (tmp_path / "cluster").mkdir()
    titles, rows = compare(runs_in(tmp_path))
    assert titles == ["run", "optim.lr", "step", "loss", "k-NN top-1", "linear top-1"]
    assert rows == [["a", "0.0001", "1,200", "2.5000", "40.1", "60.0"], ["b<", "0.0005", "1,200", "2.2500", "41.0", ""]]
    page = Cells()
    page.feed(write_comparison(tmp_path).read_text())
    assert page.rows == [titles, *rows]
    assert page.best == ["60.0", "41.0"] and page.links == ["a/report.html"]


def test_a_run_that_has_not_begun_has_an_empty_row(tmp_path: Path) -> None:
    make(tmp_path, "a", 1e-4, 2.5, None, None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("optim: {lr: 1}\n")
    assert compare(runs_in(tmp_path))[1][1] == ["b", "", "1", "", ""]  # clip is not among its settings


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor a folder of runs"):
        write_comparison(tmp_path)
    make(tmp_path, "a", 1e-4, 2.5, None, None)
    (tmp_path / "a" / "results.json").write_text("[")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        write_comparison(tmp_path)
