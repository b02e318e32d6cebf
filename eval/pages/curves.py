"""Curves of a run as small SVG drawings: crisp at any size, no plotting library in the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 22
_MOST_POINTS = 400  # more would not show at this size


class Panel(NamedTuple):
    """One drawing: the key in `metrics.jsonl`, its title, and a value worth a dashed line with what it means."""

    key: str
    title: str
    guide: float | None = None
    meaning: str = ""


PANELS = (
    Panel("loss", "Loss"),
    Panel("knn_top1", "k-NN of the teacher, %"),
    Panel("rankme", "RankMe (effective rank)"),
    Panel("entropy", "Teacher entropy / ln K", 1.0, "1 = flat, uniform collapse; 0 = one prototype only"),
    Panel("kl", "KL(teacher || its mean), nats", 0.0, "0 = every image gets the same answer"),
    Panel("feature_std", "Feature std x sqrt(d)", 1.0, "healthy near 1; 0 = collapse"),
    Panel("lr", "Learning rate"),
    Panel("grad_norm", "Gradient norm"),
    Panel("img_per_s", "Images per second"),
)


def curves(metrics: Iterable[Mapping[str, Any]], panels: Iterable[Panel] = PANELS) -> list[str]:
    """One `<figure>` with an SVG for each panel whose key has a finite value; x is the step.

    Non-finite values are left out of a line and counted below it.
    """
    lines = list(metrics)
    return [figure for panel in panels if (figure := _figure(lines, panel))]


def _figure(metrics: list[Mapping[str, Any]], panel: Panel) -> str | None:
    given = [(float(m["step"]), float(m[panel.key])) for m in metrics if isinstance(m.get(panel.key), (int, float))]
    points = [(x, y) for x, y in given if math.isfinite(y)]
    if not points:
        return None
    notes = [panel.meaning] if panel.meaning else []
    if len(points) < len(given):
        notes.append(f"{len(given) - len(points)} of {len(given)} values are not finite")
    note = f"<small>{html.escape('; '.join(notes))}</small>" if notes else ""
    caption = f"<figcaption><b>{html.escape(panel.title)}</b><span>{number(points[-1][1])}</span></figcaption>"
    return f"<figure>{caption}{_drawing(points, panel)}{note}</figure>"


def _drawing(points: list[tuple[float, float]], panel: Panel) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    reach = [*ys, panel.guide] if panel.guide is not None and _near(panel.guide, ys) else ys
    ticks = nice_ticks(min(reach), max(reach))
    low, high = min(ticks[0], min(reach)), max(ticks[-1], max(reach))
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(panel.title)} over steps">']
    for tick in ticks:
        y = at(first, tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    if len(reach) > len(ys) and panel.guide is not None:
        parts.append(f'<path class="guide" d="M{_LEFT} {at(first, panel.guide)[1]:.1f}H{_WIDTH - _RIGHT}"/>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{"step " if last > first else ""}{first:,.0f}</text>')
    if last > first:
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{last:,.0f}</text>')
    shown = [at(x, y) for x, y in thinned(points)]
    if len(shown) > 1:
        parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in shown)}"/>')
    if len(shown) <= 40:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in shown]
    return "".join([*parts, "</svg>"])


def scatter(points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """An SVG of dots (x, y), x in whole numbers such as layers; `across` and `up` name the axes."""
    ticks = nice_ticks(0.0, max(y for _, y in points) or 1.0)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    width = (_WIDTH - _LEFT - _RIGHT) / (last - first + 1)
    height = _HEIGHT - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return _LEFT + (x - first + 0.5) * width

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - height * y / ticks[-1]

    name = html.escape(f"{up} by {across}")
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_of(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_of(tick) + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{x_of(x):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    parts += [f'<circle class="dot" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>' for x, y in points]
    return "".join([*parts, "</svg>"])


def _near(guide: float, ys: list[float]) -> bool:
    """Is a guide near enough to be drawn? One far outside the data would flatten the curve."""
    span = max(max(ys) - min(ys), 0.25 * max(abs(y) for y in ys))
    return min(ys) - 1.5 * span <= guide <= max(ys) + 1.5 * span


def thinned(points: list[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points that keep every spike: the lowest and the highest value of each stretch."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def nice_ticks(low: float, high: float) -> list[float]:
    """3 to 6 round values (1, 2, 2.5 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if not high > low:
        spare = abs(low) * 0.1 or 1.0
        low, high = low - spare, high + spare
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short, for people: 3 significant digits, thousands with commas, small ones as 2.5e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"
