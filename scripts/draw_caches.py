"""Draw which positions each call computes, without a cache and with each: docs/caches.svg.

The calls are those of a real generation with the bundled checkpoint in eager.

python scripts/draw_caches.py docs/caches.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import DreamEdge, load_hf_model
from pipeline.config import ASSETS
from runtime import generate

CHECKPOINT = ASSETS / "dream_sudoku"
PROMPT = list(b"1003\n030")
NEW_TOKENS, BLOCK_LENGTH, STEPS = 16, 4, 16
PANELS = (("no cache", None), ("prefix", "prefix"), ("dual", "dual"))
CELL, GAP, LEFT, TOP = 11, 26, 12, 44
COLORS = {"token": "#9ec5e8", "mask": "#1f5c99", "kept token": "#ececec", "kept mask": "#c9c9c9"}

# (tokens of the row [L], first computed position, after the last)
Call = tuple[Tensor, int, int]


def calls_of(model: DreamEdge, cache: Any) -> list[Call]:
    """Every call of one generation."""
    calls: list[Call] = []

    class Traced(DreamEdge):
        def start(self, max_seq_len: int | None = None) -> Callable[[Tensor, int, int, Tensor], Tensor]:
            forward = model.start(max_seq_len)
            known: dict[int, int] = {}

            def traced(tokens: Tensor, start_pos: int, kv_len: int, rows: Tensor) -> Tensor:
                known.update(enumerate(tokens.tolist(), start=start_pos))
                row = torch.tensor([known[i] for i in range(kv_len)])
                calls.append((row, start_pos, start_pos + len(tokens)))
                return forward(tokens, start_pos, kv_len, rows)

            return traced

    with torch.device("meta"):
        traced = Traced(model.config)
    generate(traced, PROMPT, max_new_tokens=NEW_TOKENS, steps=STEPS, block_length=BLOCK_LENGTH, cache=cache)
    return calls


def draw(model: DreamEdge) -> str:
    """The picture as SVG."""
    length = len(PROMPT) + NEW_TOKENS
    panels = [(title, calls_of(model, cache)) for title, cache in PANELS]
    width = LEFT + len(panels) * (length * CELL + GAP)
    height = TOP + max(len(calls) for _, calls in panels) * CELL + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, calls) in enumerate(panels):
        x0 = LEFT + i * (length * CELL + GAP)
        computed = sum(stop - first for _, first, stop in calls)
        parts.append(f'<text x="{x0}" y="18">{title}: {len(calls)} calls, {computed} positions</text>')
        parts.append(f'<text x="{x0}" y="36" fill="#666" font-size="10">positions →, calls ↓</text>')
        for row, (tokens, first, stop) in enumerate(calls):
            for position, token in enumerate(tokens.tolist()):
                kind = "mask" if token == model.mask_id else "token"
                color = COLORS[kind if first <= position < stop else f"kept {kind}"]
                x, y = x0 + position * CELL, TOP + row * CELL
                parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{color}"/>')
    legend = ("computed, token", "computed, mask", "taken from the cache, token", "taken from the cache, mask")
    x = LEFT
    for text, color in zip(legend, COLORS.values(), strict=True):
        parts.append(f'<rect x="{x}" y="{height - 22}" width="{CELL}" height="{CELL}" fill="{color}"/>')
        parts.append(f'<text x="{x + CELL + 5}" y="{height - 12}">{text}</text>')
        x += 200
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(draw(load_hf_model(CHECKPOINT, dtype=torch.float32)[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
