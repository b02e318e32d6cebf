"""Curves: valid SVG, faithful to the numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from nearfar.eval.pages.curves import PANELS, Panel, curves, nice_ticks, number, thinned

LOSS = Panel("loss", "Loss")


def path_of(figure: str) -> list[tuple[float, float]]:
    (d,) = re.findall(r'class="line" d="M([^"]+)"', figure)
    return [(float(x), float(y)) for x, y in (point.split() for point in d.split("L"))]


def test_each_key_with_values_gets_a_figure_that_is_well_formed() -> None:
    metrics = [{"step": s, "loss": 5 - s / 10, "lr": 1e-4 * s, "entropy": 0.9} for s in range(1, 20)]
    metrics += [{"step": 20, "knn_top1": 50.0}]
    drawn = curves(metrics, PANELS)
    titles = [ET.fromstring(figure).findtext("figcaption/b") for figure in drawn]
    assert titles == ["Loss", "k-NN of the teacher, %", "Teacher entropy / ln K", "Learning rate"]
    assert curves([]) == []


def test_the_line_is_the_data_up_to_scale() -> None:
    values = [3.0, 1.0, 2.0, 5.0]
    points = path_of(curves([{"step": 10 * i, "loss": v} for i, v in enumerate(values)], [LOSS])[0])
    xs, ys = [x for x, _ in points], [-y for _, y in points]
    assert all(math.isclose((x - xs[0]) / (xs[-1] - xs[0]), i / 3, abs_tol=0.01) for i, x in enumerate(xs))
    assert all(
        math.isclose((y - ys[1]) / (ys[3] - ys[1]), (v - 1) / 4, abs_tol=0.01) for y, v in zip(ys, values, strict=True)
    )


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    (figure,) = curves([{"step": i, "loss": v} for i, v in enumerate([1.0, math.nan, 2.0, math.inf])], [LOSS])
    assert len(path_of(figure)) == 2
    assert "2 of 4 values are not finite" in figure


def test_a_guide_far_from_the_data_is_not_drawn() -> None:
    panel = Panel("rankme", "RankMe", guide=1.0, meaning="one")
    near, far = (curves([{"step": 0, "rankme": a}, {"step": 1, "rankme": a + 1}], [panel])[0] for a in (1.5, 400.0))
    assert 'class="guide"' in near
    assert 'class="guide"' not in far


def test_a_single_point_and_a_flat_line_can_be_drawn() -> None:
    for metrics in ([{"step": 5, "loss": 2.0}], [{"step": 5, "loss": 0.0}, {"step": 6, "loss": 0.0}]):
        (figure,) = curves(metrics, [LOSS])
        ET.fromstring(figure)
        assert "nan" not in figure.lower()


def test_titles_are_escaped() -> None:
    (figure,) = curves([{"step": 1, "loss": 1.0}], [Panel("loss", "a < b & c")])
    assert ET.fromstring(figure).findtext("figcaption/b") == "a < b & c"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_keeps_the_order_and_every_extreme(values: list[float]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thinned(points, most=100)
    assert len(kept) <= 101
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_enclose_the_range_in_few_round_steps(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7


def test_numbers_are_short() -> None:
    given_ = [0, 1234.5, 61.237, 0.987, 0.00025, 1e-5, -0.002]
    assert [number(v) for v in given_] == ["0", "1,234", "61.2", "0.987", "2.5e-4", "1e-5", "-2e-3"]
