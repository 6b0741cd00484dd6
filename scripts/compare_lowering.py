"""Export and lower a checkpoint twice, equal layers once and each by itself: seconds, and that the programs are one.

    python -m scripts.compare_lowering CHECKPOINT OUTPUT.json [--recipe int4_xnnpack] [--cache DIR] [--max-seq-len N]

Weights are rounded to the nearest: what integers they become makes no difference here. Two programs are written for a
moment, which for a 7B model takes 10 GB of disk beside the cache of quantized weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import export as export_stage
from pipeline.config import load_recipe
from pipeline.export import export
from pipeline.load import load
from pipeline.lower import lower
from pipeline.quantize import Quantized, quantize
from pipeline.schema import ExportConfig
from recipes.options import Rounding
from report.files import write_json
from runtime.artifact import sha256
from runtime.processor import machine
from scripts.show_bench import markdown_table
from validation.progress import silent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", default="int4_xnnpack")
    parser.add_argument("--cache", type=Path, default=Path("artifacts/.cache"))
    parser.add_argument("--max-seq-len", type=int, default=2048)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    if recipe.linear is not None:
        recipe.linear.rounding = Rounding.nearest
    quantized = quantize(load(args.checkpoint, None, args.cache), recipe, args.cache, silent)
    settings = ExportConfig(args.max_seq_len)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        once = made(quantized, settings, Path(folder) / "once.pte")
        with patch.object(export_stage, "runs_of", lambda _: []):
            each = made(quantized, settings, Path(folder) / "each.pte")
    if once.pop("sha256") != each.pop("sha256"):
        raise SystemExit("the two programs differ")
    layers = quantized.weights.model.config.num_hidden_layers
    write_json(args.output, {"machine": machine(), "recipe": recipe.name, "layers": layers, "once": once, "each": each})


def table_of(found: dict[str, Any]) -> str:
    """Of docs/performance.md."""
    parts = ("export", "delegates", "equal layers", "memory plan", "writing")
    rows: list[tuple[str, ...]] = [("", *parts, "all")]
    for name, key in (("each layer by itself", "each"), ("equal layers once", "once")):
        seconds = found[key]["seconds"]
        cells = (f"{seconds[part]:.1f}" if part in seconds else "" for part in parts)
        rows.append((name, *cells, f"{sum(seconds.values()):.1f}"))
    return markdown_table(rows)


def made(quantized: Quantized, settings: ExportConfig, pte: Path) -> dict[str, Any]:
    """Seconds of its parts, and the program's sha256."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def clock(what: str) -> None:
        nonlocal began
        seconds[what] = time.perf_counter() - began
        began = time.perf_counter()

    exported = export(quantized, settings)
    clock("export")
    phases = ["lowering"]

    def begun(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:  # noqa: ARG001
        clock(phases[-1])
        phases.append(what)

    lower(exported, quantized, pte, begun)
    clock(phases[-1])
    del seconds["lowering"]  # until the first phase begins
    return {"seconds": seconds, "sha256": sha256(pte)}


if __name__ == "__main__":
    main()
