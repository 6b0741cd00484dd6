"""How many gaps the bundled infilling checkpoint fills right, from each number of masks: docs/infill.json.

    python -m scripts.compare_infill ARTIFACT OUTPUT.json [--gaps N]

Each gap is filled by the float32 model and by the artifact, as DreamOn draws tokens and greedily. Training saw none of
the gaps.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from model import load_hf_model
from pipeline.config import ASSETS
from report.files import write_json
from runtime import Network, Program
from scripts.train_infill import STARTS, Gap, filled, held_out_gaps, is_right

DREAMON = "DreamOn's"
SETTINGS: dict[str, dict[str, Any]] = {
    DREAMON: {"seed": 0},
    "DreamOn's, prefix": {"seed": 0, "cache": "prefix"},
    "greedy": {"temperature": 0.0, "top_p": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "dream_infill", help="the float32 model")
    parser.add_argument("--gaps", type=int, default=200)
    args = parser.parse_args()
    networks: dict[str, Network] = {
        "float32": load_hf_model(args.checkpoint, dtype=torch.float32)[0],
        args.artifact.name.rpartition("-")[2]: Program.open(args.artifact),
    }
    gaps = held_out_gaps(args.gaps, seed=2**31)
    rows = [
        {"network": name, "setting": setting, "masks": n_masks} | measured(network, gaps, n_masks, options)
        for name, network in networks.items()
        for setting, options in SETTINGS.items()
        for n_masks in track(STARTS, f"{name}, {setting}", transient=True)
    ]
    write_json(args.output, {"gaps": len(gaps), "rows": rows})


def measured(network: Network, gaps: list[Gap], n_masks: int, options: dict[str, Any]) -> dict[str, float]:
    """The share that is right, in percent; calls, positions and masks that became two of a gap."""
    found = [filled(network, gap, n_masks, **options) for gap in gaps]
    right = [is_right(gap, one.tokens) for gap, one in zip(gaps, found, strict=True)]
    return {
        "right": 100 * statistics.fmean(right),
        "calls": statistics.fmean(one.forward_calls for one in found),
        "positions": statistics.fmean(one.positions for one in found),
        "expanded": statistics.fmean(one.expanded for one in found),
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    heads = ["network", "setting", *(f"{n_masks} mask{'s' * (n_masks > 1)}" for n_masks in STARTS)]
    lines = [f"| {' | '.join([*heads, 'calls', 'positions', 'became two'])} |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    kinds = dict.fromkeys((row["network"], row["setting"]) for row in rows)
    for kind in kinds:
        of_kind = [row for row in rows if (row["network"], row["setting"]) == kind]
        shares = [f"{row['right']:.1f}%" for row in of_kind]
        means = [statistics.fmean(row[name] for row in of_kind) for name in ("calls", "positions", "expanded")]
        cells = [*kind, *shares, f"{means[0]:.1f}", f"{means[1]:.0f}", f"{means[2]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
