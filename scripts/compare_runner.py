"""Time the native runner beside `python -m pipeline generate`, each from its start to its answer to one prompt.

    python -m scripts.compare_runner artifacts/dream_sudoku-int4_xnnpack build/runner-x86_64/dreamedge-run

Prints JSON: medians, the two in turn, so that the ratios hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.processor import machine
from tests.checkpoints import ROOT

PUZZLE = "1003\n0300\n4000\n0041\n"


@dataclass(frozen=True)
class Measured:
    """seconds: from the start of the process to its end. peak_rss: bytes. tokens_per_second: as it says itself."""

    answer: str
    seconds: float
    peak_rss: int
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("runner", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompt", default=PUZZLE)
    args = parser.parse_args()
    keys = [f"artifact={args.artifact}", f"prompt={args.prompt}", "threshold=0.9"]
    commands = {
        "python": [sys.executable, "-m", "pipeline", "generate", *keys],
        "native": [str(args.runner), *keys],
    }
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            runs[name].append(measured(command))
    answers = {run.answer for of_one in runs.values() for run in of_one}
    medians = {name: median(of_one) for name, of_one in runs.items()}
    python, native = medians["python"], medians["native"]
    ratios = {name: python[name] / native[name] for name in ("seconds", "peak_rss")}
    ratios["tokens_per_second"] = native["tokens_per_second"] / python["tokens_per_second"]
    found = {"same_answer": len(answers) == 1, "repeats": args.repeats, **medians, "ratios": ratios} | machine()
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def measured(command: list[str]) -> Measured:
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    assert child.stderr is not None
    answer, said = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    speed = re.search(r"([\d,.]+) tokens/s", said)
    if child.returncode != 0 or speed is None:
        sys.exit(said)
    return Measured(answer, seconds, 1024 * usage.ru_maxrss, float(speed[1].replace(",", "")))


def median(runs: list[Measured]) -> dict[str, float]:
    names = ("seconds", "peak_rss", "tokens_per_second")
    return {name: statistics.median(asdict(run)[name] for run in runs) for name in names}


if __name__ == "__main__":
    main()
