"""The page of several runs shows seeds together and every run."""

from __future__ import annotations

import re
from pathlib import Path

from nearfar.eval.pages.comparison_page import write_comparison


def test_the_page_has_both_tables(runs: list[Path], tmp_path: Path) -> None:
    page = write_comparison(runs, tmp_path / "report.html").read_text()
    assert "5 runs, 2 when runs that differ only in their seed count as one" in page
    assert '<td class="best">62.2 \u00b1 2.0</td><td>3</td>' in page and "a_lgp-seed2" in page
    assert page.index("Over seeds") < page.index("Every run")
    assert "Robustness" not in page and "Position" not in page


def test_robustness_and_position_are_grouped_by_seed_as_well(runs_with_details: list[Path], tmp_path: Path) -> None:
    page = write_comparison(runs_with_details, tmp_path / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Over seeds", "Every run", "Robustness", "Position"]
    row = "<td>patch shuffle</td><td>42.0 \u00b1 1.7 (-20.0 \u00b1 1.0)</td><td>51.8 \u00b1 2.5 (+0.2 \u00b1 0.4)</td>"
    assert f"<tr>{row}</tr>" in page
    assert "<tr><td>row</td><td>0.600 \u00b1 0.100</td><td>0.800</td></tr>" in page
    assert "<th>plain&amp;</th>" in page
