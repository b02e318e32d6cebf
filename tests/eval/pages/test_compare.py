"""Runs side by side."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from rich.console import Console

from nearfar.eval import results
from nearfar.eval.pages.compare import ONLINE, compare, comparison_table, runs_in
from nearfar.eval.pages.comparison_page import write_comparison
from nearfar.eval.pages.seeds import by_seed, is_best_group
from nearfar.eval.results import TASKS, DataName, Score
from nearfar.ssl.errors import UserError

Scores = dict[str, float] | None


def make(
    folder: Path,
    name: str,
    lr: float,
    loss: float,
    scores: Scores,
    online: float | None,
    more: dict[str, object] | None = None,
) -> None:
    run = folder / name
    run.mkdir()
    settings = {"name": name, "folder": "x", "optim": {"lr": lr, "clip_grad": 3}, "data": {"workers": len(name)}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | (more or {})))
    lines = [{"step": 10, "loss": loss + 1}, {"step": 1200, "loss": loss}]
    lines += [{"step": 1200, "knn_top1": online}] if online is not None else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task, percent in (scores or {}).items():
        data = DataName("val", "val", 10)
        results.add(run / "results.json", Score("trained", task, percent, "w", data, data, {}))


def shown(folder: Path, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(comparison_table(compare(runs_in(folder)), console))
    return console.file.getvalue()  # type: ignore[attr-defined]


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.links: list[str] = []
        self._marked = self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True
            self._marked = ("class", "best") in attrs
        if tag == "a":
            self.links.append(str(dict(attrs)["href"]))

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data.strip()
            if self._marked:
                self.best.append(data)


def test_what_came_out_and_what_differs(tmp_path: Path) -> None:
    make(tmp_path, "a", 1e-4, 2.5, {"knn": 40.06, "linear": 60.0}, 11.0)
    make(tmp_path, "b<", 5e-4, 2.25, None, 41.0)
    (tmp_path / "cluster").mkdir()
    page = Cells()
    page.feed(write_comparison(runs_in(tmp_path), tmp_path / "report.html").read_text())
    assert page.rows == [
        ["run", "k-NN top-1", "linear top-1", "loss", "step", "optim.lr"],
        ["a", "40.1", "60.0", "2.5000", "1,200", "0.0001"],
        ["b<", "41.0*", "", "2.2500", "1,200", "0.0005"],
    ]
    assert page.best == ["40.1", "60.0"]  # an online score is of fewer images
    assert ONLINE in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["a", "javascript:alert(1)", "<b>'&", "a b#c?d%", 'quote"onclick="x'])
def test_a_link_leads_to_the_run_whatever_its_name(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, 1e-4, 2.5, None, None)
    (tmp_path / name / "report.html").write_text("")
    page = Cells()
    text = write_comparison(runs_in(tmp_path), tmp_path / "report.html").read_text()
    page.feed(text)
    (link,) = page.links
    assert link.startswith("./") and urlsplit(link).scheme == ""
    assert (tmp_path / unquote(link)).is_file()
    assert page.rows[1][0] == name and "<b>" not in text


def test_a_terminal_of_80_columns_has_whole_words(tmp_path: Path) -> None:
    more = {"views": {"global_crops_size": 64}, "head": {"prototypes": 128}, "loss": {"koleo_weight": 0.1}}
    make(tmp_path, "short", 1e-4, 2.5, {"knn": 40.0, "linear": 60.0, "segment": 20.0}, None)
    make(tmp_path, "longer-name", 5e-4, 2.25, {"knn": 41.0}, None, more)
    narrow, wide = shown(tmp_path, 80), shown(tmp_path, 200)
    assert max(map(len, narrow.splitlines())) <= 80
    for text in ("longer-name", "lr=0.0005", "global_crops_size=64", "prototypes=128", "koleo_weight=0.1", "40.0"):
        assert text in narrow
    for text in ("global_crops_size", "prototypes", "0.0005"):
        assert text in wide
    assert "workers" not in narrow  # changes no result


def test_unlike_runs_do_not_fill_the_terminal(tmp_path: Path) -> None:
    """A run of a recipe beside one of another differs in 27 settings, which were 60 lines of the narrowest column."""
    views = {f"local_crops_size_{i}": i for i in range(27)}
    make(tmp_path, "a", 1e-4, 2.5, {"knn": 40.0}, None, {"views": views})
    make(tmp_path, "b", 1e-4, 2.5, {"knn": 41.0}, None, {"views": {key: 0 for key in views}})
    output = shown(tmp_path, 80)
    assert "8 of 26:" in output and "page" in output
    assert output.count("local_crops_size_") == 16
    assert "local_crops_size_26" in write_comparison(runs_in(tmp_path), tmp_path / "report.html").read_text()


def test_scores_that_do_not_fit_beside_each_other_are_shown_below(tmp_path: Path) -> None:
    scores = {task: 30.0 + at for at, task in enumerate(TASKS)}
    for name, lr in (("first-run", 1e-4), ("second-run", 5e-4)):
        make(tmp_path, name, lr, 2.5, scores, None, {"data": {"path": "/a/long/path/to/images" * 4 + name}})
    text = shown(tmp_path, 80)
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    for percent in scores.values():
        assert text.count(f" {percent:.1f} ") == 2
    assert text.count("first-run") == text.count("second-run") > 2 and text.count("2.5000") == 2
    wide = shown(tmp_path, 400)
    assert wide.count("first-run") == 2 and wide.count("\u250f") == 1  # one table; the other name is in the path


def test_a_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    make(tmp_path, "a\x1b[31m[red]", 1e-4, 2.5, None, None)
    assert "\x1b" not in shown(tmp_path, 80) and "[red]" in shown(tmp_path, 80)


def test_a_run_that_has_not_begun_has_an_empty_row(tmp_path: Path) -> None:
    make(tmp_path, "a", 1e-4, 2.5, None, None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("optim: {lr: 1}\n")
    row = compare(runs_in(tmp_path)).rows[1]
    assert row.outcome == ["", ""] and row.settings == {"optim.lr": "1"} and row.scores == {}


def test_one_broken_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make(tmp_path, "a", 1e-4, 2.5, None, None)
    make(tmp_path, "b", 2e-4, 2.5, {"knn": 41.0}, None)
    (tmp_path / "a" / "results.json").write_text("[")
    found = compare(runs_in(tmp_path))
    assert found.rows[1].scores == {"knn": 41.0}
    assert "results.json does not hold results" in found.notes[0]


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor a folder of runs"):
        write_comparison(runs_in(tmp_path), tmp_path / "report.html")


def test_scores_on_several_data_sets_are_all_there_and_like_is_shown_beside_like(tmp_path: Path) -> None:
    """A segmentation scored last hid the k-NN of its run, and showed the online one of another."""
    scored = {"one": [("knn", "a", 40.0), ("segment", "road", 20.0)], "two": [("knn", "a", 30.0), ("knn", "b", 90.0)]}
    for name, lr in (("one", 1e-4), ("two", 5e-4)):
        make(tmp_path, name, lr, 2.5, None, 11.0, {"backbone": {"lgp": name == "one"}})
        for task, where, percent in scored[name]:
            data = DataName(where, where, 10)
            results.add(tmp_path / name / "results.json", Score("trained", task, percent, "w", data, data, {}))
    found = compare(runs_in(tmp_path))
    assert [row.scores for row in found.rows] == [{"knn": 40.0, "segment": 20.0}, {"knn": 30.0}]
    assert not any(row.online for row in found.rows) and found.notes == []
    assert [row.settings["backbone.lgp"] for row in found.rows] == ["true", "false"]

    make(tmp_path, "zoo", 1e-3, 2.5, None, None)
    data = DataName("b", "b", 10)
    results.add(tmp_path / "zoo" / "results.json", Score("trained", "segment", 5.0, "w", data, data, {}))
    found = compare(runs_in(tmp_path))
    assert found.rows[2].scores == {"segment": 5.0}
    assert found.notes == ["Not all runs were scored on the same images: mIoU cannot be compared."]
    assert [found.is_best(row, "segment") for row in found.rows] == [False] * 3
    assert [found.is_best(row, "knn") for row in found.rows] == [True, False, False]
    groups = by_seed(found)
    assert not any(is_best_group(group, groups, "segment") for group in groups)
    assert is_best_group(groups[0], groups, "knn")
