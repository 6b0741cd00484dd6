"""Draw the way of a checkpoint through the rooms, and the way of one call on a device, for docs/architecture.md.

The first is read off the code: the stages of pipeline/road.py, which rooms each one's file imports, what each returns.

python -m scripts.draw_rooms docs/rooms.svg docs/call.svg
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "recipes", "runtime", "validation", "evidence", "report")
WIDTH = 500  # of both: on a narrow screen the smallest text is still 8 px high
LEFT, BOX = 12, 110
LANE_X, LANE = 158, 64
ROW, BOX_HEIGHT = 66, 32


@dataclass(frozen=True)
class Stage:
    """rooms: that its file imports. gives: the type that it returns, empty for the last."""

    name: str
    rooms: tuple[str, ...]
    gives: str


def stages() -> list[Stage]:
    """In the order in which the road goes through them."""
    road = (ROOT / "pipeline" / "road.py").read_text(encoding="utf-8")
    found = []
    for name in re.findall(r'display\.stage\("(\w+)"\)', road):
        if name == "arm64":  # the artifact once more, on other processors, where that is asked for
            continue
        tree = ast.parse((ROOT / "pipeline" / f"{name}.py").read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported = {module.partition(".")[0] for module in modules}
        (work,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        gives = ast.unparse(work.returns) if work.returns else ""
        found.append(Stage(name, tuple(room for room in ROOMS if room in imported), gives))
    return found


def draw_rooms() -> str:
    """As SVG."""
    road = stages()
    height = 52 + BOX_HEIGHT + ROW * (len(road) + 1) + 12
    parts = [_text(LANE_X + i * LANE, 24, room, "strong", "middle") for i, room in enumerate(ROOMS)]
    parts += [f'<line class="grid" x1="{x}" x2="{x}" y1="34" y2="{height - 14}"/>' for x in _lanes()]
    y = 36
    parts += [_box(LEFT, y, BOX, "checkpoint", "end")]
    for stage in road:
        parts.append(_arrow(LEFT + BOX // 2, y + BOX_HEIGHT, y + ROW))
        y += ROW
        middle = y + BOX_HEIGHT // 2
        dots = [x for room, x in zip(ROOMS, _lanes(), strict=True) if room in stage.rooms]
        parts.append(f'<line class="line s0" x1="{LEFT + BOX}" x2="{max(dots)}" y1="{middle}" y2="{middle}"/>')
        parts += [f'<circle class="dot s0" cx="{x}" cy="{middle}" r="6"/>' for x in dots]
        parts.append(_box(LEFT, y, BOX, f"{stage.name}.py", "stage"))
        if stage is not road[-1]:
            parts.append(_text(LEFT + BOX // 2 + 10, y + BOX_HEIGHT + 22, stage.gives, "", "start"))
    parts.append(_arrow(LEFT + BOX // 2, y + BOX_HEIGHT, y + ROW))
    parts.append(_box(LEFT, y + ROW, BOX, "artifact", "end"))
    return _svg(parts, height, "Which rooms each stage of the road imports, and what it hands on")


# What a call goes through: (file, function, in words). tests/test_docs.py sees that they are there.
ASKED = (
    ("runtime/tokenizer.py", "encode", "text to ids"),
    ("runtime/generation.py", "generate", "which block, which positions"),
    ("runtime/program.py", "forward", "refuses what the contract has not"),
)
ANSWERED = (
    ("runtime/sample.py", "sample", "a token for each mask, how sure it is"),
    ("runtime/sample.py", "most_confident", "the surest are written, the rest stay"),
    ("runtime/tokenizer.py", "decode", "ids to text"),
)
# Inside model.pte: (what, whether it is one of XNNPACK's delegates).
INSIDE = (
    ("embedding: T rows of the table", False),
    ("norm, q, k, v, RoPE", True),
    ("update_cache: k, v of T tokens", False),
    ("attention, MLP; next norm, q, k, v, RoPE", True),
    ("update_cache: k, v of T tokens", False),
    ("attention, MLP of the rows; norm, output layer", True),
)
REPEATED = (3, 4)  # for every layer but the last
STEP, INNER = 48, 34


def draw_call() -> str:
    """As SVG."""
    parts: list[str] = []
    y = 12
    for asked in ASKED:
        y += STEP * (asked is not ASKED[0])
        parts.append(_step(y, *asked))
        if asked is not ASKED[-1]:
            parts.append(_arrow(WIDTH // 2, y + BOX_HEIGHT, y + STEP))
    y += BOX_HEIGHT + 24
    parts.append(_arrow(WIDTH // 2, y - 24, y))
    parts.append(_text(WIDTH // 2 + 12, y - 9, "tokens, start_pos, kv_len, rows", "", "start"))
    inside = 30 + len(INSIDE) * INNER + 78
    parts.append(f'<rect class="frame" x="{LEFT}" y="{y}" width="{WIDTH - 2 * LEFT}" height="{inside}" rx="8"/>')
    parts.append(_text(LEFT + 12, y + 20, "model.pte in the ExecuTorch runtime", "strong", "start"))
    for x, kind, what in ((274, "delegate", "XNNPACK delegate"), (414, "kernel", "kernel")):
        parts.append(f'<rect class="{kind}" x="{x}" y="{y + 11}" width="10" height="10" rx="2"/>')
        parts.append(_text(x + 15, y + 20, what, "", "start"))
    at = y + 32
    for i, (what, is_delegate) in enumerate(INSIDE):
        kind = "delegate" if is_delegate else "kernel"
        parts.append(f'<rect class="{kind}" x="{LEFT + 12}" y="{at}" width="370" height="{INNER - 8}" rx="5"/>')
        parts.append(_text(LEFT + 24, at + 17, what, "value", "start"))
        if i == REPEATED[0]:
            x, end = LEFT + 390, at + INNER * len(REPEATED) - 8
            parts.append(f'<path class="axis" d="M{x} {at}h6V{end}h-6"/>')
            parts.append(_text(x + 12, (at + end) // 2, "all layers", "", "start"))
            parts.append(_text(x + 12, (at + end) // 2 + 14, "but the last", "", "start"))
        at += INNER
    parts += _cache(LEFT + 12, at + 6)
    y += inside
    parts.append(_arrow(WIDTH // 2, y, y + 24))
    parts.append(_text(WIDTH // 2 + 12, y + 17, "logits float32 [1, K, vocab]", "", "start"))
    y += 24
    for i, answered in enumerate(ANSWERED):
        parts.append(_step(y, *answered))
        if i + 1 < len(ANSWERED):
            parts.append(_arrow(WIDTH // 2, y + BOX_HEIGHT, y + STEP))
        y += STEP
    # Back to the next call, as long as there are masks.
    top, bottom = 12 + STEP + BOX_HEIGHT // 2, y - 2 * STEP + BOX_HEIGHT // 2
    x = WIDTH - LEFT + 6
    parts.append(f'<path class="line s1" d="M{WIDTH - LEFT} {bottom}H{x}V{top}H{WIDTH - LEFT + 2}"/>')
    parts.append(f'<path class="dot s1" d="M{WIDTH - LEFT - 2} {top}l8 -5v10z"/>')
    return _svg(parts, y, "The way of one call on a device")


def _cache(x: int, y: int) -> list[str]:
    """Of one layer: what a call writes, and what it sees."""
    width, cells = WIDTH - 2 * LEFT - 24, 24
    cell, start, stop, seen = width // cells, 8, 14, 18
    parts = [_text(x, y + 10, "a layer's cache of max_seq_len positions: kv_len are seen, T written", "", "start")]
    for i in range(cells):
        kind = "written" if start <= i < stop else "seen" if i < seen else "unseen"
        parts.append(f'<rect class="{kind}" x="{x + i * cell}" y="{y + 20}" width="{cell - 2}" height="18" rx="2"/>')
    marks = ((start, "start_pos", "start"), (seen, "kv_len", "start"), (0, "0", "start"))
    return [*parts, *(_text(x + i * cell, y + 54, mark, "", anchor) for i, mark, anchor in marks)]


def _step(y: int, file: str, function: str, what: str) -> str:
    box = f'<rect class="box" x="{LEFT}" y="{y}" width="{WIDTH - 2 * LEFT}" height="{BOX_HEIGHT}" rx="6"/>'
    name = _text(LEFT + 12, y + 21, f"{file.partition('/')[2]}: {function}", "strong", "start")
    return box + name + _text(WIDTH - LEFT - 12, y + 21, what, "", "end")


def _lanes() -> list[int]:
    return [LANE_X + i * LANE for i in range(len(ROOMS))]


def _box(x: int, y: int, width: int, text: str, kind: str) -> str:
    radius = 16 if kind == "end" else 6
    rect = f'<rect class="{"rail" if kind == "end" else "box"}" x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}"'
    return f'{rect} rx="{radius}"/>' + _text(x + width // 2, y + 21, text, "strong", "middle")


def _arrow(x: int, top: int, bottom: int) -> str:
    return (
        f'<line class="axis" x1="{x}" x2="{x}" y1="{top}" y2="{bottom - 6}"/>'
        f'<path class="head" d="M{x - 4} {bottom - 8}h8l-4 7z"/>'
    )


def _text(x: int, y: int, text: str, kind: str, anchor: str) -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: list[str], height: int, title: str) -> str:
    """In the colors of the reports, light and dark."""
    style = (ROOT / "report" / "templates" / "plot.css").read_text(encoding="utf-8").strip()
    own = """\
svg .box { fill: var(--card); stroke: var(--s0); stroke-width: 1.5; }
svg .frame { fill: var(--back); stroke: var(--line); }
svg .delegate, svg .written { fill: var(--s0); fill-opacity: .3; }
svg .kernel, svg .seen { fill: var(--rail); stroke: var(--line); }
svg .unseen { fill: none; stroke: var(--line); }
svg .head { fill: var(--soft); }"""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 12} {height}" width="{WIDTH + 12}" '
        f'height="{height}" font-family="system-ui, sans-serif" role="img" aria-label="{title}">'
    )
    paper = '<rect class="paper" width="100%" height="100%" rx="8"/>'
    return "\n".join([head, f"<style>\n{style}\n{own}\n</style>", paper, *parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rooms", type=Path)
    parser.add_argument("call", type=Path)
    args = parser.parse_args()
    args.rooms.write_text(draw_rooms(), encoding="utf-8")
    args.call.write_text(draw_call(), encoding="utf-8")


if __name__ == "__main__":
    main()
