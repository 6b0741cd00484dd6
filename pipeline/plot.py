"""Pictures of an explanation, as SVG that needs nothing else and is readable on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.noise import LayerNoise

WIDTH, HEIGHT, LEFT, TOP = 360, 230, 56, 40
CURVES = {"stream_db": ("stream", "#1f77b4"), "alone_db": ("layer alone", "#d9730d")}
MOST_LABELS = 10  # of layers, or numbers in cells overlap
STYLE = (
    ".explain{color:#222;background:#fff;font:12px sans-serif}"
    "@media(prefers-color-scheme:dark){.explain{color:#ddd;background:#161616}}"
)


def draw(layers: Sequence[LayerNoise], kinds: Sequence[str]) -> str:
    """Left the signal to noise of each layer, right that of each of its matrices: the darker, the noisier."""
    width, height = 2 * (WIDTH + LEFT) + 30, TOP + HEIGHT + 44
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="explain" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" style="max-width:100%;height:auto" role="img">',
            f"<title>Signal to noise by layer and by matrix, decibels</title><style>{STYLE}</style>",
            *_curves(layers, LEFT),
            *_cells(layers, kinds, 2 * LEFT + WIDTH + 20),
            "</svg>\n",
        ]
    )


def _curves(layers: Sequence[LayerNoise], x0: int) -> list[str]:
    y0, step = TOP + HEIGHT, (WIDTH - 20) / max(1, len(layers) - 1)
    top = 1.15 * max(max(layer.stream_db, layer.alone_db) for layer in layers)
    parts = [f'<path d="M{x0} {TOP} V{y0} H{x0 + WIDTH}" fill="none" stroke="currentColor" opacity=".5"/>']
    for value in (0, top / 2.3, top / 1.15):
        y = y0 - HEIGHT * value / top
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{value:.0f}</text>')
    for n, (name, (label, color)) in enumerate(CURVES.items()):
        points = [
            (x0 + 10 + i * step, y0 - HEIGHT * max(0.0, getattr(layer, name)) / top) for i, layer in enumerate(layers)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<text x="{x0 + 110 * n}" y="20" font-weight="bold" fill="{color}">{label}, dB</text>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    every = -(-len(layers) // MOST_LABELS)
    parts += [_below(x0 + 10 + i * step, y0, str(i)) for i in range(0, len(layers), every)]
    return [*parts, f'<text x="{x0 + WIDTH / 2:.1f}" y="{y0 + 38}" fill="currentColor">layer</text>']


def _cells(layers: Sequence[LayerNoise], kinds: Sequence[str], x0: int) -> list[str]:
    found = [layer.matrices[kind] for layer in layers for kind in kinds]
    low, high = min(found), max(found)
    w, h = (WIDTH - 20) / len(layers), HEIGHT / len(kinds)
    parts = [f'<text x="{x0}" y="20" font-weight="bold" fill="currentColor">each matrix alone, dB</text>']
    for row, kind in enumerate(kinds):
        y = TOP + row * h
        name = escape(kind.removesuffix("_proj"))
        parts.append(f'<text x="{x0 - 6}" y="{y + h / 2 + 4:.1f}" text-anchor="end" fill="currentColor">{name}</text>')
        for i, layer in enumerate(layers):
            db, x = layer.matrices[kind], x0 + i * w
            noisy = (high - db) / (high - low) if high > low else 0.0
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="#d9730d" '
                f'fill-opacity="{0.08 + 0.87 * noisy:.2f}"><title>{name} of layer {i}: {db:.1f} dB</title></rect>'
            )
            if len(layers) <= MOST_LABELS:
                parts.append(
                    f'<text x="{x + w / 2:.1f}" y="{y + h / 2 + 4:.1f}" text-anchor="middle" '
                    f'fill="currentColor">{db:.1f}</text>'
                )
    every = -(-len(layers) // MOST_LABELS)
    parts += [_below(x0 + (i + 0.5) * w, TOP + HEIGHT, str(i)) for i in range(0, len(layers), every)]
    return [*parts, f'<text x="{x0 + WIDTH / 2:.1f}" y="{TOP + HEIGHT + 38}" fill="currentColor">layer</text>']


def _below(x: float, y0: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y0 + 18}" text-anchor="middle" fill="currentColor">{text}</text>'


def page(title: str, verdict: str, svg: str, tables: list[tuple[str, list[str], list[list[str]]]]) -> str:
    """One HTML file that opens offline. tables: (title, column names, rows)."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>body{{font:15px sans-serif;margin:2em auto;"
        "max-width:60em;padding:0 1em}div{overflow-x:auto}td,th{padding:.2em .8em;text-align:right}</style>",
        f"<h1>{escape(title)}</h1><p>{escape(verdict)}</p>{svg}",
    ]
    for heading, columns, rows in tables:
        parts.append(f"<h2>{escape(heading)}</h2><div><table>{_row('th', columns)}")
        parts += [_row("td", row) for row in rows]
        parts.append("</table></div>")
    return "\n".join([*parts, "</html>\n"])


def _row(cell: str, values: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(value)}</{cell}>" for value in values) + "</tr>"
