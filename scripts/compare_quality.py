"""What each recipe costs on text: size, divergence and loss on held-out paragraphs, and seconds of a call.

    python -m scripts.compare_quality FILE.json [--checkpoint DIR] [--texts FILE] [--prompts N]

Each recipe is run, and `int4` also with each weight rounded to the nearest; then all programs are timed in one process,
in turn, so that the ratios hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from pipeline.__main__ import main as pipeline
from pipeline.config import ASSETS
from runtime.artifact import MANIFEST_FILE, MODEL_FILE
from runtime.program import Program

NEAREST = ("recipe.linear.rounding=nearest", "recipe.linear.scales=absmax")
RUNS: dict[str, tuple[str, ...]] = {
    "fp32_xnnpack": (),
    "fp16_xnnpack": (),
    "int8_xnnpack": (),
    "int4_xnnpack": (),
    "int4_xnnpack, lm_head int8": ("recipe.linear.rules.lm_head=int8",),
    "int4_xnnpack, to the nearest": NEAREST,
    "int4_fast_xnnpack": (),
    "int4_fast_xnnpack, to the nearest": NEAREST,
}
FIGURES = ("kl_divergence", "top1_agreement", "loss", "loss_increase", "order_agreement", "same_answers")
TOKENS, POSITIONS, ROUNDS = 32, 256, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "dream_english")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text" / "held_out.jsonl")
    parser.add_argument("--prompts", type=int, default=96, help="texts that are read")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    asked = [
        f"checkpoint={args.checkpoint}",
        f"validation.prompts={args.texts}",
        f"validation.n_prompts={args.prompts}",
    ]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, options) in enumerate(track(RUNS.items(), "recipes", transient=True)):
            recipe, output = name.partition(",")[0], Path(folder, str(i))
            paths = [f"output={output}", f"cache={folder}/cache", f"export.max_seq_len={POSITIONS}"]
            if pipeline(["run", f"recipe={recipe}", *asked, *paths, *options]) != 0:
                raise SystemExit(f"{name}: no valid program")
            manifest = json.loads((output / MANIFEST_FILE).read_text())
            figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
            rows[name] = {figure: figures[figure] for figure in FIGURES} | {"bytes": manifest["sizes"]["program"]}
        programs = {name: Program.open(Path(folder, str(i), MODEL_FILE)) for i, name in enumerate(RUNS)}
        for name, seconds in call_seconds(programs).items():
            rows[name]["seconds"] = seconds
    args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def call_seconds(programs: dict[str, Program]) -> dict[str, float]:
    """The median of a block step: 32 tokens that see 256 positions, 32 rows of logits."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    tokens, rows = torch.arange(TOKENS), torch.arange(TOKENS)
    for i in range(ROUNDS):
        for name, program in programs.items():
            if i == 0:
                program.forward(torch.arange(POSITIONS) % 100, 0, POSITIONS, rows)
            started = time.perf_counter()
            program.forward(tokens, POSITIONS - TOKENS, POSITIONS, rows)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def quality_table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| recipe | size | KL, nats | same token | loss, nats over float32's | time of a block step |"]
    lines.append("|---|---|---|---|---|---|")
    first = rows["int4_xnnpack"]["seconds"]
    for name, row in rows.items():
        recipe, _, rest = name.partition(",")
        cells = (
            f"`{recipe}`{',' * bool(rest)}{rest}",
            f"{row['bytes'] / 2**20:.2f} MiB",
            f"{row['kl_divergence']:.2g}",
            f"{100 * row['top1_agreement']:.1f}%",
            f"{row['loss_increase']:+.4f}",
            f"{row['seconds'] / first:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
