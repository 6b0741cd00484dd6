"""Plots as inline SVG. Their colours are the page's, so they follow it into the dark; no script is in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

# As wide as a phone, so that the text keeps its size there.
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
ROOM = 28  # that a number takes across


@dataclass(frozen=True)
class Series:
    """points: (x, y). tips: of each point, what a pointer over it shows. A step lasts to the next point."""

    name: str
    points: list[tuple[float, float]]
    draw: Literal["line", "dots", "steps"] = "line"
    tips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """text: stands for the value. mark: another value, as a line across the bar."""

    name: str
    value: float
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class Axis:
    """limits: None for those of the values. whole: only whole numbers are named."""

    label: str
    limits: tuple[float, float] | None = None
    log: bool = False
    whole: bool = False

    def scaled(self, value: float) -> float:
        return math.log2(value) if self.log else value


def chart(
    title: str,
    x: Axis,
    y: Axis,
    series: list[Series],
    bounds: dict[str, float] | None = None,
    legend: Literal["below", "inside"] = "below",
) -> Markup:
    """bounds: lines across, by what they are. legend: of several series; there is room for two short names inside."""
    bounds = bounds or {}
    points = [point for one in series for point in one.points]
    x_low, x_high = _limits(x, [px for px, _ in points])
    y_low, y_high = _limits(y, [py for _, py in points] + list(bounds.values()))
    if bounds:
        y_low -= 0.1 * (y_high - y_low)  # their names stand below them

    def at(px: float, py: float) -> tuple[str, str]:
        across = (x.scaled(px) - x_low) / (x_high - x_low)
        up = (y.scaled(py) - y_low) / (y_high - y_low)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f}", f"{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [_open(title, HEIGHT)]
    for tick in _ticks(y, y_low, y_high):
        _, height = at(points[0][0], tick)
        parts.append(f'<path class="grid" d="M{LEFT} {height}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height}" dy=".32em" text-anchor="end">{number(tick)}</text>')
    for tick in _ticks(x, x_low, x_high):
        across, _ = at(tick, points[0][1])
        parts.append(f'<path class="tick" d="M{across} {bottom}v4"/>')
        parts.append(f'<text x="{across}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text x="2" y="11">{escape(y.label)}</text>')
    for name, bound in bounds.items():
        _, height = at(points[0][0], bound)
        parts.append(f'<path class="bound" d="M{LEFT} {height}H{right}"/>')
        parts.append(f'<text x="{right}" y="{height}" dy="12" text-anchor="end">{escape(name)}</text>')
    for i, one in enumerate(series):
        places = [at(px, py) for px, py in one.points]
        if one.draw == "line":
            parts.append(f'<polyline class="line s{i}" points="{" ".join(map(",".join, places))}"/>')
        if one.draw == "steps":
            stairs = "".join(f"V{height}H{end}" for (_, height), (end, _) in pairwise(places))
            parts.append(f'<path class="area s{i}" d="M{places[0][0]} {bottom}{stairs}V{bottom}Z"/>')
            continue
        for n, (across, height) in enumerate(places):
            parts.append(f'<circle class="dot s{i}" cx="{across}" cy="{height}" r="3">{_tip(one, n)}</circle>')
    if legend == "inside":
        names = (f'<tspan class="s{i}" dx="{12 * (i > 0)}">{escape(one.name)}</tspan>' for i, one in enumerate(series))
        parts.append(f'<text x="{right}" y="11" text-anchor="end">{"".join(names)}</text>')
    return Markup("".join([*parts, "</svg>", _legend(series) if legend == "below" else ""]))


def tints(title: str, label: str, rows: dict[str, list[float | None]]) -> Markup:
    """A cell for each value, by row and column: the lower the value, the stronger its tint. None: an empty cell."""
    found = [value for values in rows.values() for value in values if value is not None]
    low, high, n = min(found), max(found), max(map(len, rows.values()))
    right, bottom, top = WIDTH - RIGHT, HEIGHT - BOTTOM, 8
    width, height = (right - LEFT) / n, (bottom - top) / len(rows)
    every = math.ceil(n / (right - LEFT) * ROOM)
    parts = [_open(title, HEIGHT)]
    for row, (name, values) in enumerate(rows.items()):
        y = top + row * height
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + height / 2:.1f}" dy=".32em" text-anchor="end">{escape(name)}</text>'
        )
        for column, value in enumerate(values):
            if value is None:
                continue
            x = LEFT + column * width
            tint = 0.06 + 0.4 * ((high - value) / (high - low) if high > low else 0)
            place = f'x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"'
            tip = f"<title>{escape(name)}, {escape(label)} {column}: {value:.1f}</title>"
            parts.append(f'<rect class="cell" {place} fill-opacity="{tint:.2f}">{tip}</rect>')
            if every == 1:
                middle = f'x="{x + width / 2:.1f}" y="{y + height / 2:.1f}" dy=".32em" text-anchor="middle"'
                parts.append(f'<text class="value" {middle}>{value:.1f}</text>')
    for column in range(0, n, every):
        across = LEFT + (column + 0.5) * width
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{column}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def bars(title: str, rows: list[Bar]) -> Markup:
    """Its name over each bar, so that long names have room on a phone."""
    row, left = 38, 2
    most = max([bar.value for bar in rows] + [bar.mark or 0 for bar in rows]) or 1
    scale = (WIDTH - 2 * left) / most
    parts = [_open(title, row * len(rows) + 4)]
    for i, bar in enumerate(rows):
        y = i * row
        parts.append(f'<text class="strong" x="{left}" y="{y + 14}">{escape(bar.name)}</text>')
        parts.append(f'<text x="{WIDTH - left}" y="{y + 14}" text-anchor="end">{escape(bar.text)}</text>')
        parts.append(f'<rect class="rail" x="{left}" y="{y + 20}" width="{WIDTH - 2 * left}" height="10" rx="3"/>')
        width = f"{max(1.0, scale * bar.value):.1f}" if bar.value else "0"
        parts.append(f'<rect class="bar" x="{left}" y="{y + 20}" width="{width}" height="10" rx="3"/>')
        if bar.mark is not None:
            parts.append(f'<path class="mark" d="M{left + scale * bar.mark:.1f} {y + 17}v16"/>')
    return Markup("".join([*parts, "</svg>"]))


def number(value: float) -> str:
    """Short: 0, 0.25, 1,024, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _open(title: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'


def _tip(series: Series, i: int) -> str:
    return f"<title>{escape(series.tips[i])}</title>" if series.tips else ""


def _legend(series: list[Series]) -> str:
    if len(series) < 2:
        return ""
    names = "".join(f'<li><i class="s{i}"></i>{escape(one.name)}</li>' for i, one in enumerate(series))
    return f'<ul class="legend">{names}</ul>'


def _limits(axis: Axis, values: list[float]) -> tuple[float, float]:
    low, high = (axis.scaled(v) for v in (axis.limits or (min(values), max(values))))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(axis: Axis, low: float, high: float) -> list[float]:
    """About four, of round numbers; low and high are scaled."""
    if axis.log:
        step = max(1, math.ceil((high - low) / 5))
        return [2.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]
    rough = max((high - low) / 4, 1 if axis.whole else 0)
    magnitude = 10 ** math.floor(math.log10(rough))
    steps = [m * magnitude for m in (1, 2, 2.5, 5, 10) if not axis.whole or m * magnitude % 1 == 0]
    step = next(step for step in steps if step >= 0.8 * rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
