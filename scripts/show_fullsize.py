"""The tables and the picture of docs/memory.md, from what `make fullsize` measured.

python -m scripts.show_fullsize docs/fullsize.json docs/fullsize.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from model import DreamEdgeConfig
from pipeline.config import load_recipe
from pipeline.estimate import of_sizes
from pipeline.export import lengths
from pipeline.schema import ExportConfig
from report.chart import Axis, Series, chart
from report.page import picture
from report.plots import Plot

GIB, MIB = 2**30, 2**20
STAGES = ("load", "quantize", "export", "lower", "validate")


def road_table(result: dict[str, Any]) -> str:
    """Seconds, memory and estimate of each stage of the main job."""
    job, needs = result["main_job"], estimated(result)
    rows = ["| stage | seconds | peak RSS | of it anonymous | estimated |", "|---|---|---|---|---|"]
    for stage in job["stages"]:
        if stage["name"] in STAGES:
            memory = (stage["peak_rss"], stage["peak_anonymous"], needs[stage["name"]])
            rows.append(f"| {stage['name']} | {stage['seconds']:.0f} | " + " | ".join(map(_gib, memory)) + " |")
    program = job["program"]
    memory = (program["peak_rss"], program["anonymous"], needs["program"])
    rows.append(
        f"| the program, in its process | {program['run_seconds']:.0f} | " + " | ".join(map(_gib, memory)) + " |"
    )
    return "\n".join(rows)


def estimated(result: dict[str, Any]) -> dict[str, int]:
    """What `run` says today of the main job."""
    config, S = DreamEdgeConfig(**result["shape"]), result["max_seq_len"]
    recipe, (_, max_rows) = load_recipe("int4_xnnpack"), lengths(config, ExportConfig(S))
    return of_sizes(config, result["main_job"]["sizes"]["checkpoint"], recipe, S, max_rows).memory


def growth_table(result: dict[str, Any]) -> str:
    """Load to lower, without validation."""
    rows = ["| | seconds | of them lowering | peak RSS | `model.pte` |", "|---|---|---|---|---|"]
    for name, road in growth(result).items():
        lower = next(stage["seconds"] for stage in road["stages"] if stage["name"] == "lower")
        memory, size = _gib(_peak(road)), _gib(road["program_bytes"])
        rows.append(f"| {name} | {_seconds(road):.0f} | {lower:.0f} | {memory} | {size} |")
    return "\n".join(rows)


def recipe_table(result: dict[str, Any]) -> str:
    rows = ["| recipe | seconds | peak RSS | `model.pte` | of the ideal |", "|---|---|---|---|---|"]
    rows += [
        f"| `{name}` | {_seconds(road):.0f} | {_gib(_peak(road))} | {road['program_bytes'] / GIB:.2f} GiB | "
        f"{road['of_ideal']:.4f} |"
        for name, road in recipes(result).items()
    ]
    return "\n".join(rows)


def speed_table(result: dict[str, Any]) -> str:
    """One call, by tokens and positions that it sees."""
    others = {name: road["bench"] for name, road in result["recipes"].items() if "bench" in road}
    benches = {"int4_xnnpack": result["bench"]} | others
    calls = [(call["tokens"], call["kv_len"], call["rows"]) for call in result["bench"]["calls"]]
    heads = [f"{T} of {kv_len}, {rows} rows" for T, kv_len, rows in calls]
    rows = ["| tokens of positions, rows of logits | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, bench in benches.items():
        times = [f"{1000 * call['seconds']['median']:,.0f} ms" for call in bench["calls"]]
        rows.append(f"| `{name}` | " + " | ".join(times) + " |")
    return "\n".join(rows)


def llama_table(result: dict[str, Any]) -> str:
    """A block step and llama.cpp's, taken in turn."""
    rows = ["| recipe | ms | llama.cpp, in turn | of llama.cpp |", "|---|---|---|---|"]
    for name, measured in result["llama_cpp"].items():
        ours, theirs = (measured[side]["median"] for side in ("program", "llama.cpp"))
        rows.append(f"| `{name}` | {1000 * ours:,.0f} | {1000 * theirs:,.0f} | {ours / theirs:.2f} |")
    return "\n".join(rows)


def recipes(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"int4_xnnpack": _main_road(result)} | result["recipes"]


def growth(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    grown: dict[str, dict[str, Any]] = dict(result["growth"])
    *layers, vocabulary = grown
    whole = f"{result['shape']['num_hidden_layers']} layers"
    return {name: grown[name] for name in layers} | {whole: _main_road(result), vocabulary: grown[vocabulary]}


def draw(result: dict[str, Any]) -> str:
    """Seconds and peak memory by layers, as SVG."""
    roads = {int(name.split()[0]): road for name, road in growth(result).items() if name.endswith("layers")}
    curves = {
        ("Time from loading to lowering", "seconds"): [(float(n), _seconds(road)) for n, road in roads.items()],
        ("Peak memory", "GiB"): [(float(n), _peak(road) / GIB) for n, road in roads.items()],
    }
    plots = []
    for (title, unit), points in curves.items():
        top = 1.15 * max(y for _, y in points)
        axes = (Axis("layers", (0, max(roads)), whole=True), Axis(unit, (0, top)))
        tips = tuple(f"{x:.0f} layers: {y:.3g} {unit}" for x, y in points)
        plots.append(Plot(title, chart(title, *axes, [Series(unit, points, "line", tips)]), ""))
    return picture(plots)


def _main_road(result: dict[str, Any]) -> dict[str, Any]:
    job = result["main_job"]
    stages = [stage for stage in job["stages"] if stage["name"] in STAGES[:4]]
    return {"stages": stages, "program_bytes": job["sizes"]["program"], "of_ideal": job["of_ideal"]}


def _seconds(road: dict[str, Any]) -> float:
    return sum(float(stage["seconds"]) for stage in road["stages"])


def _peak(road: dict[str, Any]) -> int:
    return max(int(stage["peak_rss"]) for stage in road["stages"])


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    args.picture.write_text(draw(result), encoding="utf-8")
    tables = (road_table, growth_table, recipe_table, speed_table, llama_table)
    sys.stdout.write("\n\n".join(table(result) for table in tables) + "\n")


if __name__ == "__main__":
    main()
