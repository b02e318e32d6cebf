"""The sections of robustness and position: what they tell is in the scores, and what is broken there is passed over."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from nearfar.eval.pages.robustness_page import position_section, robustness_section
from nearfar.eval.results import DataName, Score

DATA = DataName("val", "val", 1000)


def scored(task: str, **details: Any) -> dict[str, dict[str, Score]]:
    return {
        subject: {task: Score(subject, task, 50.0, "w", DATA, DATA, {}, detail=detail)}
        for subject, detail in details.items()
    }


def rows(page: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in lines]


def costs(clean: float, **changes: float) -> dict[str, Any]:
    named = {name.replace("_", " "): clean + change for name, change in changes.items()}
    table = {name: {"top1": top1, "drop": clean - top1} for name, top1 in named.items()}
    return {"table": table | {"clean": {"top1": clean, "drop": 0.0}}}


def test_every_perturbation_stands_beside_clean_images() -> None:
    trained = costs(60.0, patch_shuffle=-20.25, mirrored=0.5) | {"left_out": {"band shuffle": "needs <LGP>."}}
    page = robustness_section(scored("robustness", trained=trained, untrained=costs(30.0, patch_shuffle=-1.0)))
    assert rows(page) == [
        ["test images", "trained", "untrained"],
        ["clean", "60.0", "30.0"],
        ["patch shuffle", "39.8 (-20.2)", "29.0 (-1.0)"],
        ["mirrored", "60.5 (+0.5)", "\u2013"],
    ]
    noise = 2 * 100 * math.sqrt(2 * 0.6 * 0.4 / 1000)
    assert f"Changes up to {noise:.1f} points are within the noise of 1,000 images." in page
    assert "The largest loss of the trained features: patch shuffle, -20.2 points of 60.0 %." in page
    assert "band shuffle: needs &lt;LGP&gt;." in page


def test_positions_are_told_beside_the_baselines() -> None:
    sides = {"trained": (0.8, 0.6), "untrained": (0.9, 0.7), "pixels": (0.3, 0.1)}
    details = {name: {"row": row, "column": column} for name, (row, column) in sides.items()}
    page = position_section(scored("position", **details))
    assert rows(page)[1:] == [
        ["trained", "0.800", "0.600"], ["untrained", "0.900", "0.700"], ["raw pixels", "0.300", "0.100"],
    ]  # fmt: skip
    assert "-0.10 from untrained, +0.50 from raw pixels" in page


@pytest.mark.parametrize(
    "detail",
    [None, {}, {"table": 3}, {"table": {"clean": {"top1": "high", "drop": 0}}}, {"table": {"mirrored": {"top1": 1.0}}}],
)
def test_what_is_no_score_gives_no_section(detail: Any) -> None:
    assert robustness_section(scored("robustness", trained=detail)) == ""
    assert position_section(scored("position", trained=detail)) == ""
    assert robustness_section({}) == position_section({}) == ""
