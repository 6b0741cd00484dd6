"""What a sweep costs beside single runs: all recipes of a checkpoint, once each by itself with a cache of its own, and
once as a sweep.

python -m scripts.measure_sweep OUTPUT.json [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.config import names_of
from report.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets" / "dream_sudoku")
    given = parser.parse_args()
    recipes = names_of("recipe")
    with tempfile.TemporaryDirectory() as folder:
        single = {recipe: run(Path(folder, recipe), given.checkpoint, [f"recipe={recipe}"]) for recipe in recipes}
        together = Path(folder, "together")
        seconds = run(together, given.checkpoint, ["--multirun", f"recipe={','.join(recipes)}"])
        files = sorted((together / "artifacts" / ".sweep").glob("*.json"))
        jobs = [json.loads(file.read_text()) for file in files]
    kept = ("overrides", "seconds", "peak_memory", "read", "written")
    content = {
        "checkpoint": given.checkpoint.name,
        "single": single,
        "single_sum": round(sum(single.values()), 1),
        "sweep": seconds,
        "share": round(seconds / sum(single.values()), 3),
        "jobs": [{key: job[key] for key in kept} | {"job": Path(job["output"]).name} for job in jobs],
    }
    for job in content["jobs"]:
        job["overrides"] = [one for one in job["overrides"] if one.startswith("recipe=")]
    write_json(given.output, content)


def run(folder: Path, checkpoint: Path, arguments: list[str]) -> float:
    """Seconds, of the whole command."""
    folder.mkdir()
    command = [sys.executable, "-m", "pipeline", "run", f"checkpoint={checkpoint}", *arguments]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


if __name__ == "__main__":
    main()
