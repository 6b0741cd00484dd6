"""Put faults into right programs and see what catches them; build right ones and see that nothing is raised.

python -m scripts.faults catch OUTPUT.json [--only NAME ...] [--on golden|text|outliers]
python -m scripts.faults alarms OUTPUT.json [--first N] [--seeds N] [--kind text]

Right programs, and wrong ones if it is asked for, are also made of checkpoints that know English, with text for
calibration and validation, tied and not, some with outliers that quantization cannot bear, up to 2,048 positions.

docs/faults.md shows the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from model import DreamEdgeConfig
from model.checkpoint_files import read_config
from pipeline.__main__ import main as pipeline
from pipeline.config import names_of
from recipes.options import Fold
from runtime.artifact import MANIFEST_FILE
from scripts.make_checkpoint import read_shape, write_checkpoint
from scripts.text_checkpoints import write_text_checkpoint
from tests.checkpoints import GOLDEN, ROOT
from tests.faults.judge import Right, right
from tests.faults.table import FAULTS, Fault

SHAPE = ROOT / "conf" / "shape" / "tiny.yaml"
FIDELITY = ("fidelity_db", "fidelity_exact_db")
FIGURES = (*FIDELITY, "kl_divergence", "kl_beside_plain", "loss", "loss_increase")
# What right programs are made of, in turn. Prompts are random tokens, others for each seed, or texts.
CHECKPOINTS = (
    "assets/dream_sudoku",
    "random",
    "text",
    "tests/golden/mha-tied",
    "text-outliers",
    "random",
    "text-tied",
    "tests/golden/mqa4-sharded",
    "text-outliers",
)
LENGTHS = (64, 128, 256, 16)
TEXT_LENGTHS = (128, 2048, 512, 1024)
ON = ("golden", "text", "outliers")
# Faults are put into what `quantize_model` alone makes, without calibration.
PLAIN = ("recipe.linear.rounding=nearest", "recipe.linear.scales=absmax")
KERNELS: tuple[dict[str, str], ...] = (
    {},
    {"OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2"},
    {"OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "3"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "what", choices=("catch", "alarms", "right"), help="wrong programs, or right ones; those of a seed"
    )
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--only", nargs="*", default=[], help="faults, or groups of them; all by default")
    parser.add_argument(
        "--seeds", type=int, default=36, help="how many checkpoints right programs are made of; of `right`, which one"
    )
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--kind", default="", help="of right programs, only those of checkpoints that begin with this")
    parser.add_argument("--on", choices=ON, default="golden", help="what wrong programs are made of")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "catch":
            chosen = [fault for fault in FAULTS if not args.only or {fault.name, fault.group} & set(args.only)]
            catch(chosen, args.on, Path(folder), args.output)
        elif args.what == "alarms":
            seeds = range(args.first, args.first + args.seeds)
            chosen_seeds = [seed for seed in seeds if CHECKPOINTS[seed % len(CHECKPOINTS)].startswith(args.kind)]
            alarms(chosen_seeds, Path(folder), args.output)
        else:
            right_programs(args.seeds, Path(folder), args.output)


def catch(faults: list[Fault], on: str, folder: Path, output: Path) -> None:
    """Writes after each fault: what failed, and all that was said. What `output` says of others is kept."""
    rights: dict[tuple[str, str], Right] = {}
    written = json.loads(output.read_text()) if output.is_file() else {}
    found = written.get(on, {})
    if on != "golden":  # a changed file is one, whatever made it
        faults = [fault for fault in faults if fault.group != "file"]
    for fault in track(faults, "faults", transient=True):
        key = (fault.checkpoint, fault.recipe)
        if key not in rights:
            artifact = folder / "-".join(key)
            checkpoint = _like_golden(fault.checkpoint, on, folder)
            settings = [f"checkpoint={checkpoint}", f"cache={folder / 'cache'}", "export.max_seq_len=256"]
            settings += PLAIN * fault.recipe.startswith("int")
            code, said = _quiet(["run", f"recipe={fault.recipe}", f"output={artifact}", *settings])
            if code != 0:
                raise SystemExit(f"faults: the right program of {key} was not made: {said}")
            rights[key] = right(artifact, checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            verdict = fault.inject(rights[key], Path(scratch) / "model.pte")
        says = verdict.says.replace(scratch, "").replace(str(folder), "")
        found[fault.name] = {
            "group": fault.group,
            "recipe": fault.recipe,
            "checks": list(verdict.checks),
            "says": says,
        }
        written[on] = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
        output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _like_golden(name: str, on: str, folder: Path) -> Path:
    """The golden checkpoint, or one of its sizes that knows English."""
    if on == "golden":
        return GOLDEN / name
    checkpoint = folder / f"{on}-{name}"
    if not checkpoint.is_dir():
        sizes = replace(read_config(GOLDEN / name), max_position_embeddings=256)
        write_text_checkpoint(sizes, checkpoint, 0, _outliers(sizes) if on == "outliers" else ())
    return checkpoint


def is_caught(fault: Fault, one: dict[str, Any]) -> bool:
    """By the check named, in words that point to it."""
    return fault.check in one["checks"] and re.search(fault.says, one["says"]) is not None


def alarms(seeds: Iterable[int], folder: Path, output: Path) -> None:
    """Every recipe for each seed, by `python -m pipeline run`. Writes after each seed; those in `output` are kept.

    Eager computes with the kernels of another processor from one seed to the next, each in a process of its own.
    """
    started = time.monotonic()
    before: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {"seconds": 0, "runs": []}
    runs: list[dict[str, Any]] = before["runs"]
    chosen = [seed for seed in seeds if seed not in {run["seed"] for run in runs}]
    for seed in track(chosen, "checkpoints", transient=True):
        environment = os.environ | KERNELS[seed % len(KERNELS)]
        command = [sys.executable, "-m", "scripts.faults", "right", str(folder / "runs.json"), "--seeds", str(seed)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        runs += json.loads((folder / "runs.json").read_text())
        seconds = before["seconds"] + round(time.monotonic() - started)
        result = {"seconds": seconds, "runs": sorted(runs, key=lambda run: (run["seed"], run["recipe"]))}
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def right_programs(seed: int, folder: Path, output: Path) -> None:
    """Of one checkpoint, with every recipe."""
    checkpoint, kind = _checkpoint(seed, folder), CHECKPOINTS[seed % len(CHECKPOINTS)]
    lengths = TEXT_LENGTHS if kind.startswith("text") else LENGTHS
    length = lengths[seed // len(CHECKPOINTS) % len(lengths)]
    runs: list[dict[str, Any]] = []
    for recipe in sorted(names_of("recipe")):
        artifact = folder / f"{seed}-{recipe}"
        paths = [f"checkpoint={checkpoint}", f"output={artifact}", f"cache={folder / 'cache'}"]
        settings = ["task=none", f"export.max_seq_len={length}", f"validation.seed={seed}"]
        # Outliers cost a program nearly all it knows, which is no alarm; float16 ends where they begin.
        folds = kind == "text-outliers" and (recipe.startswith("fp16") or seed % 2 == 0)
        settings += ["recipe.fold=[norms,up_down,v_o]"] * folds
        code, said = _quiet(["run", f"recipe={recipe}", *paths, *settings])
        run = {"seed": seed, "checkpoint": checkpoint.name, "positions": length, "recipe": recipe, "exit_code": code}
        figures, eager = {}, {}
        if code == 0:
            manifest = json.loads((artifact / MANIFEST_FILE).read_text())
            figures = {f["name"]: f["value"] for f in manifest["figures"] if f["name"] in FIGURES}
            eager = manifest["eager"]
        runs.append(run | {"says": said, "figures": figures, "eager": eager, "fold": folds})
        shutil.rmtree(artifact, ignore_errors=True)
    output.write_text(json.dumps(runs), encoding="utf-8")


def _checkpoint(seed: int, folder: Path) -> Path:
    """The trained one, one of the golden, or one of a shape that is drawn: random, or trained on English."""
    kind = CHECKPOINTS[seed % len(CHECKPOINTS)]
    if "/" in kind:
        return ROOT / kind
    draw = random.Random(seed)
    heads, kv_heads = draw.choice([(2, 1), (4, 4), (4, 2), (8, 1), (1, 1)])
    shape = replace(
        read_shape(SHAPE),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * draw.choice([32, 64]),
        intermediate_size=32 * draw.randint(1, 24),
        num_hidden_layers=draw.randint(1, 4),
        max_position_embeddings=max(*LENGTHS, *TEXT_LENGTHS),
        tie_word_embeddings=draw.random() < 0.5,
    )
    checkpoint = folder / f"{kind}-{seed}"
    if kind == "random":
        write_checkpoint(shape, checkpoint, seed)
        return checkpoint
    shape = replace(shape, vocab_size=draw.choice([320, 512, 1024]), tie_word_embeddings=kind == "text-tied")
    write_text_checkpoint(shape, checkpoint, seed, _outliers(shape) if kind == "text-outliers" else ())
    return checkpoint


def _outliers(sizes: DreamEdgeConfig) -> tuple[Fold, ...]:
    """All kinds that can be made without changing what the network computes."""
    return tuple(kind for kind in Fold if not (kind is Fold.norms and sizes.tie_word_embeddings))


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


def rates(caught: dict[str, dict[str, dict[str, Any]]], runs: list[dict[str, Any]]) -> str:
    """For docs/faults.md: caught of injected by group, alarms of right programs by recipe. caught: by `ON`."""
    lines = ["| faults | injected | caught by the check named | of those on text | of those with outliers |"]
    lines.append("|---|---|---|---|---|")
    for group in dict.fromkeys(fault.group for fault in FAULTS):
        mine = [fault for fault in FAULTS if fault.group == group]
        cells = []
        for on in ON:
            tried = [fault for fault in mine if fault.name in caught[on]]
            cells.append(f"{sum(is_caught(fault, caught[on][fault.name]) for fault in tried)} of {len(tried)}")
        lines.append(f"| {group} | {len(mine)} | {' | '.join('' if cell == '0 of 0' else cell for cell in cells)} |")
    lines += [
        "",
        "| right programs | built | that read text | alarms | lowest `fidelity_db` | lowest `fidelity_exact_db` |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for recipe in sorted({run["recipe"] for run in runs}):
        of_it = [run for run in runs if run["recipe"] == recipe]
        lowest = [min((r["figures"][name] for r in of_it if name in r["figures"]), default=None) for name in FIDELITY]
        cells = ["" if db is None else f"{db:.0f}" for db in lowest]
        n_text, n_alarms = sum("loss" in r["figures"] for r in of_it), sum(r["exit_code"] != 0 for r in of_it)
        lines.append(f"| {recipe} | {len(of_it)} | {n_text} | {n_alarms} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
