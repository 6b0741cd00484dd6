"""Damage files by the thousand, and count what becomes of them: docs/hostile.md shows the figures.

python -m scripts.fuzz N OUTPUT.json --artifact DIR [--targets NAME ...] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz import BAD, REFUSED, TAKEN, targets, verdict

CHUNK = 10
WHAT = {
    "checkpoint": "checkpoint",
    "shards": "checkpoint in shards",
    "tokenizer": "tokenizer and chat template",
    "manifest": "`manifest.json`, read",
    "reference": "`reference.safetensors`, read",
    "format": "`model.pte`, taken apart",
    "program": "`model.pte`, loaded and called",
    "verify": "artifact, its hashes",
    "validate": "artifact, `validate`",
    "resealed": "artifact resealed, `validate`",
}
SLOW = {"resealed": 200, "program": 2, "format": 4, "validate": 4}  # so many times fewer inputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage files by the thousand, and count what becomes of them.")
    parser.add_argument("n", type=int, help="inputs, over all targets")
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--artifact", type=Path, required=True, help="a whole and valid one")
    parser.add_argument("--targets", nargs="*", help="some of them; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        names = args.targets or list(targets(args.artifact, Path(folder)))
        share = args.n / sum(1 / SLOW.get(name, 1) for name in names)
        started = time.monotonic()
        counted = {}
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for name in names:
                n = max(CHUNK, round(share / SLOW.get(name, 1)))
                jobs = [(args.artifact, Path(folder), name, args.seed + i) for i in range(0, n, CHUNK)]
                counted[name] = _merged(list(pool.map(_chunk, jobs)))
                # After each: a long run may be cut short.
                result = {"seed": args.seed, "seconds": round(time.monotonic() - started), "targets": counted}
                args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _chunk(job: tuple[Path, Path, str, int]) -> dict[str, Any]:
    artifact, folder, name, seed = job
    target = targets(artifact, folder)[name]
    scratch = folder / f"{name}-{os.getpid()}"
    words: Counter[str] = Counter()
    seen = []
    slowest = 0.0
    for i in range(CHUNK):
        file = random.Random(seed + i).choice(target.files)
        started = time.monotonic()
        word = verdict(target, scratch, file, seed + i)
        slowest = max(slowest, time.monotonic() - started)
        kind = word.partition(":")[0]
        words[kind] += 1
        if kind not in ("refused", "taken"):
            seen.append({"file": file, "seed": seed + i, "verdict": word})
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"verdicts": dict(words), "seen": seen, "slowest_seconds": slowest, "largest_mib": largest >> 10}


def _merged(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    words: Counter[str] = Counter()
    for chunk in chunks:
        words.update(chunk["verdicts"])
    return {
        "inputs": words.total(),
        "verdicts": dict(sorted(words.items())),
        "slowest_seconds": round(max(chunk["slowest_seconds"] for chunk in chunks), 1),
        "largest_mib": max(chunk["largest_mib"] for chunk in chunks),
        "seen": [one for chunk in chunks for one in chunk["seen"]],
    }


def table(result: dict[str, Any]) -> str:
    """For docs/hostile.md."""
    lines = ["| what is damaged | inputs | refused | read | " + " | ".join(BAD) + " | slowest |"]
    lines.append("|---" * (5 + len(BAD)) + "|")
    for name, counted in result["targets"].items():
        words = counted["verdicts"]
        cells = [f"{counted['inputs']:,}", *(f"{words.get(word, 0):,}" for word in (REFUSED, TAKEN, *BAD))]
        lines.append(f"| {WHAT[name]} | {' | '.join(cells)} | {counted['slowest_seconds']} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
