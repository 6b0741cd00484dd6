"""The tables and the pictures of docs/performance.md, from what `make bench` measured and kept.

python -m scripts.show_bench docs/bench.json docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report.chart import Axis, Series, chart
from report.page import picture
from report.plots import Plot
from scripts.bench import KV_LEN, RECIPES, RULES, T
from scripts.compare_decoding import BEST_BEFORE

Result = dict[str, Any]


def ratio_table(kinds: dict[str, Result]) -> str:
    names = list(dict.fromkeys(name for result in kinds.values() for name in result["ratios"]))
    rows: list[tuple[str, ...]] = [("ratio", *kinds)]
    rows += [(name, *(_ratio(result["ratios"].get(name)) for result in kinds.values())) for name in names]
    return markdown_table(rows)


def step_table(result: Result) -> str:
    rows: list[tuple[str, ...]] = [
        (f"{T} of {KV_LEN} positions", "llama.cpp, Q4_0", *(f"`{recipe}`" for recipe in RECIPES))
    ]
    for shape, seconds in result["steps"].items():
        cells = [f"{1000 * seconds[side]['median']:.1f} ms" for side in ("llama.cpp", *RECIPES)]
        rows.append((shape, *cells))
    return markdown_table(rows)


def length_table(result: Result) -> str:
    calls = result["lengths"]["own"]
    rows: list[tuple[str, ...]] = [("tokens", *(f"{call['tokens']:,}" for call in calls))]
    rows.append(("ms", *(f"{1000 * call['median']:,.0f}" for call in calls)))
    rows.append(("ms a token", *(f"{1000 * call['median'] / call['tokens']:.2f}" for call in calls)))
    return markdown_table(rows)


def one_token_table(result: Result) -> str:
    one = result["one_token"]
    rows = [("recipe", "reads", "takes", "GB/s", f"of {one['bandwidth'] / 1e9:.1f} GB/s")]
    for recipe in RECIPES:
        n_bytes, seconds = one[recipe]["bytes"], one[recipe]["median"]
        speed = n_bytes / seconds
        share = f"{speed / one['bandwidth']:.0%}"
        rows.append((f"`{recipe}`", f"{n_bytes / 1e9:.2f} GB", f"{1000 * seconds:.1f} ms", f"{speed / 1e9:.1f}", share))
    return markdown_table(rows)


def answer_table(result: Result) -> str:
    chosen, decoded, job, opened = (result[name] for name in ("choosing", "decoding", "road", "opening"))
    step, choose = (chosen[name]["median"] for name in ("step", "choose"))
    before, rules = decoded[BEST_BEFORE], decoded[RULES]
    rows = [("what", "measured")]
    rows.append((f"choosing tokens of {T} rows", f"{1000 * choose:.1f} ms, the step before it {1000 * step:.0f}"))
    for name, one in ((BEST_BEFORE, before), (RULES, rules)):
        rows.append((f"four answers, {name}", f"{one['calls']} calls, {one['seconds']:.1f} s"))
    rows.append(("`Program.open`, each time", f"{opened['plain']['median']:.2f} s"))
    rows.append(("with `packed_cache`: once", f"{opened['packed_first']:.2f} s"))
    rows.append(("with `packed_cache`: then", f"{opened['packed_then']:.2f} s"))
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in job["stages"].items())
    rows.append(("the main job, from nothing", f"{job['whole']:.1f} s: {stages}"))
    return markdown_table(rows)


def draw(result: Result) -> str:
    """What a call costs by its length, and by what it sees, as SVG."""
    found = result["lengths"]
    titles = {"own": "sees its own tokens alone", "block": f"{T} tokens", "one": "1 token"}
    by_tokens = [("tokens of a call", "tokens", ("own",)), ("positions that it sees", "kv_len", ("block", "one"))]
    plots = []
    for label, key, names in by_tokens:
        series = []
        for name in names:
            points = [(float(call[key]), 1000 * call["median"]) for call in found[name]]
            tips = tuple(f"{x:,.0f}: {y:,.1f} ms" for x, y in points)
            series.append(Series(titles[name], points, "line", tips))
        title = f"Milliseconds of a call by the {label}"
        plots.append(Plot(title, chart(title, Axis(label, log=True), Axis("ms", log=True), series), ""))
    return picture(plots)


TABLES = {
    "steps": step_table,
    "lengths": length_table,
    "one token": one_token_table,
    "answers": answer_table,
}


def page(text: str, kinds: dict[str, Result]) -> str:
    """`text` with its tables made anew: each stands behind a comment that names it."""
    result = next(iter(kinds.values()))
    made = {name: table(result) for name, table in TABLES.items()} | {"ratios": ratio_table(kinds)}
    for name, table in made.items():
        found = re.search(rf"<!-- {name} -->\n\n((?:\|.*\n)+)", text)
        if found is None:
            raise ValueError(f"no table behind <!-- {name} -->")
        text = text[: found.start(1)] + table + "\n" + text[found.end(1) :]
    return text


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    kinds = json.loads(args.result.read_text(encoding="utf-8"))
    args.page.write_text(page(args.page.read_text(encoding="utf-8"), kinds), encoding="utf-8")
    args.page.with_name("lengths.svg").write_text(draw(next(iter(kinds.values()))), encoding="utf-8")


if __name__ == "__main__":
    main()
