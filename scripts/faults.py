"""Put faults into right programs and see what catches them; build right ones and see that nothing is raised.

python -m scripts.faults catch OUTPUT.json [--only NAME ...]
python -m scripts.faults alarms OUTPUT.json [--seeds N] [--workers N]

docs/faults.md shows the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from pipeline.__main__ import main as pipeline
from pipeline.config import names_of
from runtime.artifact import MANIFEST_FILE
from scripts.make_checkpoint import read_shape, write_checkpoint
from tests.checkpoints import GOLDEN, ROOT, arguments
from tests.faults.judge import Right, right
from tests.faults.table import FAULTS, Fault

SHAPE = ROOT / "conf" / "shape" / "tiny.yaml"
FIDELITY = ("fidelity_db", "fidelity_exact_db")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("catch", "alarms"), help="wrong programs, or right ones")
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--only", nargs="*", default=[], help="faults, or groups of them; all by default")
    parser.add_argument("--seeds", type=int, default=20, help="checkpoints that right programs are made of")
    parser.add_argument("--workers", type=int, default=1, help="processes that make right programs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "catch":
            chosen = [fault for fault in FAULTS if not args.only or {fault.name, fault.group} & set(args.only)]
            catch(chosen, Path(folder), args.output)
        else:
            alarms(range(args.seeds), args.workers, Path(folder), args.output)


def catch(faults: list[Fault], folder: Path, output: Path) -> None:
    """Writes after each fault: what failed, and all that was said. What `output` says of other faults is kept."""
    rights: dict[tuple[str, str], Right] = {}
    found = json.loads(output.read_text())["faults"] if output.is_file() else {}
    for fault in track(faults, "faults", transient=True):
        key = (fault.checkpoint, fault.recipe)
        if key not in rights:
            artifact = folder / "-".join(key)
            code, said = _quiet(["run", f"recipe={fault.recipe}", f"output={artifact}", *arguments(*key)])
            if code != 0:
                raise SystemExit(f"faults: the right program of {key} was not made: {said}")
            rights[key] = right(artifact, GOLDEN / fault.checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            verdict = fault.inject(rights[key], Path(scratch) / "model.pte")
        says = verdict.says.replace(scratch, "").replace(str(folder), "")
        found[fault.name] = {
            "group": fault.group,
            "recipe": fault.recipe,
            "checks": list(verdict.checks),
            "says": says,
        }
        ordered = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
        output.write_text(json.dumps({"faults": ordered}, indent=2) + "\n", encoding="utf-8")


def is_caught(fault: Fault, one: dict[str, Any]) -> bool:
    """By the check named, in words that point to it."""
    return fault.check in one["checks"] and re.search(fault.says, one["says"]) is not None


def alarms(seeds: Iterable[int], workers: int, folder: Path, output: Path) -> None:
    """Every recipe for each seed, by `python -m pipeline run`. Writes after each seed."""
    runs: list[dict[str, Any]] = []
    started = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(_runs_of, seed, folder) for seed in seeds]
        for job in track(jobs, "checkpoints", transient=True):
            runs += job.result()
            result = {"seconds": round(time.monotonic() - started), "workers": workers, "runs": runs}
            output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _runs_of(seed: int, folder: Path) -> list[dict[str, Any]]:
    checkpoint = folder / f"seed-{seed}"
    write_checkpoint(read_shape(SHAPE), checkpoint, seed)
    runs: list[dict[str, Any]] = []
    for recipe in sorted(names_of("recipe")):
        artifact = folder / f"{seed}-{recipe}"
        paths = [f"checkpoint={checkpoint}", f"output={artifact}", f"cache={folder / f'cache-{seed}'}"]
        code, said = _quiet(["run", f"recipe={recipe}", *paths])
        figures: dict[str, float] = {}
        if code == 0:
            manifest = json.loads((artifact / MANIFEST_FILE).read_text())
            figures = {f["name"]: f["value"] for f in manifest["figures"] if f["name"] in FIDELITY}
        runs.append({"seed": seed, "recipe": recipe, "exit_code": code, "says": said, "figures": figures})
    return runs


def _quiet(command: list[str]) -> tuple[int, str]:
    """(exit code, the last line it wrote to stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pipeline(command)
    return code, err.getvalue().strip().splitlines()[-1] if code else ""


def faults_table(found: dict[str, dict[str, Any]]) -> str:
    """For docs/faults.md: a row for each fault, one for all flipped bits."""
    lines = ["| | fault | recipe | caught by | what else failed |", "|---|---|---|---|---|"]
    flips = 0
    for fault in FAULTS:
        one = found[fault.name]
        if fault.is_flip:
            flips += 1
            if flips > 1:
                continue
        name = f"{sum(f.is_flip for f in FAULTS)} flipped bits" if fault.is_flip else fault.name
        others = [check for check in one["checks"] if check not in (fault.check, "exports_that_differ")]
        cells = (fault.group, name, fault.recipe.removesuffix("_xnnpack"), f"`{fault.check}`", ", ".join(others))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rates(found: dict[str, dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """For docs/faults.md: caught of injected by group, alarms of right programs by recipe."""
    lines = ["| faults | injected | caught by the check named |", "|---|---|---|"]
    groups: dict[str, list[bool]] = defaultdict(list)
    for fault in FAULTS:
        groups[fault.group].append(is_caught(fault, found[fault.name]))
    lines += [f"| {group} | {len(caught)} | {sum(caught)} |" for group, caught in groups.items()]
    lines += ["", "| right programs | built | alarms | lowest `fidelity_db` | lowest `fidelity_exact_db` |"]
    lines.append("|---|---|---|---|---|")
    for recipe in sorted({run["recipe"] for run in runs}):
        mine = [run for run in runs if run["recipe"] == recipe]
        lowest = [min((r["figures"][name] for r in mine if name in r["figures"]), default=None) for name in FIDELITY]
        cells = ["" if db is None else f"{db:.0f}" for db in lowest]
        lines.append(f"| {recipe} | {len(mine)} | {sum(r['exit_code'] != 0 for r in mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
