"""`kill -9` a run at random moments, and look what is left: docs/hostile.md shows the figures.

python -m scripts.kill N OUTPUT.json --artifact DIR --seconds N [--seed N]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from runtime.artifact import ArtifactError, read_manifest
from tests.checkpoints import GOLDEN, ROOT

STAGES = ("load", "quantize", "export", "lower", "validate", "package")
LENGTHS = (32, 64)  # max_seq_len of two artifacts, which take each other's place


def main() -> None:
    parser = argparse.ArgumentParser(description="`kill -9` a run at random moments, and look what is left.")
    parser.add_argument("n", type=int, help="how many moments")
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--artifact", type=Path, required=True, help="the earlier one, which runs try to replace")
    parser.add_argument("--seconds", type=float, required=True, help="that a run takes here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    in_stage: Counter[str] = Counter()
    found: Counter[str] = Counter({"other folders left": 0})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        shutil.copytree(args.artifact, output)
        there = read_manifest(output)["export"]["max_seq_len"]
        for i in range(args.n):
            new = LENGTHS[there == LENGTHS[0]]
            # Every other one after validation, when the folders change places: that takes milliseconds.
            moment = ("validate", 0.2 * chance.random()) if i % 2 else (None, args.seconds * chance.random())
            code, stage = _run(folder, new, moment)
            in_stage[stage] += 1
            try:
                now = read_manifest(output)["export"]["max_seq_len"]
                found["the new one" if now == new else "the earlier one"] += 1
                there = now
            except ArtifactError as error:
                found[f"LOST: {error}"] += 1
            found["ended before it was killed"] += code == 0
            surplus = {path.name for path in Path(folder).iterdir()} - {"out", ".out.partial", "cache"}
            found["other folders left"] += bool(surplus)
            killed_in = {stage: in_stage[stage] for stage in (*STAGES, "end")}
            result = {"kills": i + 1, "seed": args.seed, "found": dict(found), "killed_in": killed_in}
            # After each: it may be cut short itself.
            args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _run(folder: str, max_seq_len: int, moment: tuple[str | None, float]) -> tuple[int, str]:
    """(exit code, the stage it was in). moment: a stage that has to be done, or None, and seconds after it."""
    arguments = ["recipe=fp32_portable", f"checkpoint={GOLDEN / 'gqa2'}", f"output={folder}/out", "overwrite=true"]
    arguments += [f"cache={folder}/cache", f"export.max_seq_len={max_seq_len}", "validation.n_prompts=8"]
    command = [sys.executable, "-u", "-m", "pipeline", "run", *arguments]
    done = -1
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        after, seconds = moment
        if after is not None:
            next((line for line in run.stdout if line.startswith(after)), None)
            done = STAGES.index(after)
        time.sleep(seconds)
        run.send_signal(signal.SIGKILL)
        said = run.stdout.read()
    done = max([done, *(i for i, stage in enumerate(STAGES) if f"\n{stage} " in f"\n{said}")])
    return run.returncode, STAGES[done + 1] if done + 1 < len(STAGES) else "end"


if __name__ == "__main__":
    main()
