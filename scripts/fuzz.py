"""Damage files by the thousand, and count what becomes of them: docs/hostile.md shows the figures.

python -m scripts.fuzz N OUTPUT.json --artifact DIR [--targets NAME ...] [--seed N] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.fuzz import BAD, REFUSED, TAKEN, Judge, Target, targets

CHUNK = 100  # inputs of one judge, which is one process
WHAT = {
    "checkpoint": "checkpoint",
    "shards": "checkpoint in shards",
    "tokenizer": "tokenizer and chat template",
    "manifest": "`manifest.json`, read",
    "reference": "`reference.safetensors`, read",
    "format": "`model.pte`, taken apart",
    "program": "`model.pte`, loaded and called",
    "hashes": "artifact, its hashes",
    "verify": "artifact signed, `verify` with the key",
    "envelope": "its signature, `verify` with the key",
    "inspect": "artifact signed, `inspect`",
    "inspect resealed": "artifact resealed, `inspect`",
    "validate": "artifact, `validate`",
    "validate resealed": "artifact resealed, `validate`",
}
# Of 20,000 inputs: what takes long gets fewer.
SHARES = {
    "checkpoint": 1816,
    "shards": 1816,
    "tokenizer": 1816,
    "manifest": 1816,
    "reference": 1816,
    "format": 908,
    "program": 480,
    "hashes": 2500,
    "verify": 2000,
    "envelope": 1500,
    "inspect": 2000,
    "inspect resealed": 500,
    "validate": 1000,
    "validate resealed": 32,
}
_TARGETS: dict[str, Target] = {}  # of this worker, which makes them once


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage files by the thousand, and count what becomes of them.")
    parser.add_argument("n", type=int, help="inputs, over all targets")
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--artifact", type=Path, required=True, help="a whole and valid one")
    parser.add_argument("--targets", nargs="*", choices=WHAT, default=list(WHAT), help="some of them; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at once; all cores by default")
    args = parser.parse_args()
    all_shares = sum(SHARES[name] for name in args.targets)
    started = time.monotonic()
    counted = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # what is ended in the middle of its work leaves files
        with ProcessPoolExecutor(args.workers, initializer=_prepare, initargs=(args.artifact, Path(folder))) as pool:
            for name in args.targets:
                seeds = range(args.seed, args.seed + math.ceil(args.n * SHARES[name] / all_shares))
                size = min(CHUNK, math.ceil(len(seeds) / args.workers))
                chunks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
                counted[name] = _merged(list(pool.map(_chunk, [name] * len(chunks), chunks)))
                # After each: a long run may be cut short.
                result = {"seed": args.seed, "seconds": round(time.monotonic() - started), "targets": counted}
                args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _prepare(artifact: Path, folder: Path) -> None:
    own = tempfile.mkdtemp(dir=folder)
    tempfile.tempdir = own
    logging.disable(logging.WARNING)
    _TARGETS.update(targets(artifact, Path(own)))


def _chunk(name: str, seeds: range) -> dict[str, Any]:
    target = _TARGETS[name]
    words: Counter[str] = Counter()
    seen = []
    seconds = []
    with Judge(target, Path(tempfile.mkdtemp()) / "scratch") as judge:
        # To validate a whole one may take longer than to refuse a damaged one.
        if name != "validate" and (word := judge.undamaged()) != TAKEN:
            raise SystemExit(f"{name}: what is not damaged is not taken: {word}")
        for seed in seeds:
            file = random.Random(seed).choice(target.files)
            started = time.monotonic()
            word = judge.verdict(file, seed)
            seconds.append(time.monotonic() - started)
            kind = word.partition(":")[0]
            words[kind] += 1
            if kind in BAD:
                seen.append({"file": file, "seed": seed, "verdict": word})
        return {
            "verdicts": dict(words),
            "seen": seen,
            "judged_again": judge.again,
            "seconds": seconds,
            "largest_mib": judge.largest_mib,
        }


def _merged(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    words: Counter[str] = Counter()
    for chunk in chunks:
        words.update(chunk["verdicts"])
    return {
        "inputs": words.total(),
        "verdicts": dict(sorted(words.items())),
        "judged_again": [word for chunk in chunks for word in chunk["judged_again"]],
        "mean_seconds": round(fmean(seconds for chunk in chunks for seconds in chunk["seconds"]), 3),
        "slowest_seconds": round(max(max(chunk["seconds"]) for chunk in chunks), 1),
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
