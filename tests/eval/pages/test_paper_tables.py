"""Tables for a paper are Markdown and LaTeX as they stand."""

from __future__ import annotations

from pathlib import Path

from nearfar.eval.pages.compare import compare
from nearfar.eval.pages.paper_tables import latex, markdown


def test_markdown_can_be_pasted(runs: list[Path]) -> None:
    lines = markdown(compare(runs)).splitlines()
    assert lines[:4] == [
        "| | k-NN top-1 | runs |", "|---|---|---|", "| a_lgp | **62.2 \u00b1 2.0** | 3 |",
        "| plain& | 51.5 \u00b1 2.1 | 2 |",
    ]  # fmt: skip
    assert "mean and standard deviation" in lines[-1]


def test_latex_can_be_pasted(runs: list[Path]) -> None:
    text = latex(compare(runs))
    assert r"a\_lgp & \textbf{62.2 $\pm$ 2.0} & 3 \\" in text and r"plain\& & 51.5 $\pm$ 2.1 & 2 \\" in text
    assert text.count(r"\begin{tabular}{lcc}") == text.count(r"\end{tabular}") == 1


def test_robustness_and_position_have_tables_of_their_own(runs_with_details: list[Path]) -> None:
    found = compare(runs_with_details)
    lines = markdown(found).splitlines()
    assert "| test images | a_lgp | plain& |" in lines
    assert "| patch shuffle | 42.0 \u00b1 1.7 (-20.0 \u00b1 1.0) | 51.8 \u00b1 2.5 (+0.2 \u00b1 0.4) |" in lines
    text = latex(found)
    assert r"patch shuffle & 42.0 $\pm$ 1.7 (-20.0 $\pm$ 1.0) & 51.8 $\pm$ 2.5 (+0.2 $\pm$ 0.4) \\" in text
    assert r"band shuffle & 61.0 $\pm$ 2.0 (-1.0 $\pm$ 0.0) & -- \\" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
