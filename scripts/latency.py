"""How long a `forward` takes: median milliseconds of an artifact at several lengths, all rows.

python scripts/latency.py artifacts/dream_sudoku-int4_xnnpack ...
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from runtime import Program

REPEATS = 30


def median_ms(program: Program, T: int) -> float:
    tokens = torch.arange(T) % program.metadata.get_vocab_size
    program.forward(tokens, 0, T)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        program.forward(tokens, 0, T)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    lengths = (1, 38, 256)
    table = Table("artifact", *(f"T = {T}" for T in lengths))
    for artifact in parser.parse_args().artifacts:
        program = Program.open(artifact)
        table.add_row(artifact.name, *(f"{median_ms(program, T):.2f}" for T in lengths))
    Console().print(table)


if __name__ == "__main__":
    main()
