"""Measure every ratio that docs/performance.md claims, and hold it against what this kind of machine gave before.

    make bench                                   # exit code 1 if a ratio is worse than the baseline by more than MARGIN
    python -m scripts.bench WORKDIR --keep       # what is measured becomes the baseline of this kind of machine

A ratio is of two times of one run, lower is better: a noisy or slower machine moves both. What an artifact is measured
by is made once in WORKDIR: 15 GB. llama.cpp is measured beside if it is installed (`scripts/compare_llama_cpp.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from model import DreamEdgeConfig
from pipeline.config import ASSETS, BUNDLED, CONF, ROOT
from report.files import write_json
from report.terminal import table
from runtime.artifact import load_manifest
from runtime.generation import generate
from runtime.processor import features, machine
from runtime.program import Program, program_file
from runtime.sample import sample
from runtime.threads import thread_count, use_threads
from scripts.compare_decoding import BEST_BEFORE, NEW, SETTINGS, prompts_of
from scripts.compare_llama_cpp import in_turn
from scripts.fullsize import in_process, packed
from scripts.make_checkpoint import read_shape, write_checkpoint
from validation.speed import spread

BASELINE = ROOT / "docs" / "bench.json"
MARGIN = 1.15  # of medians of one run, two runs of one machine differ by a tenth
WIDE, SMALL, ENGLISH = "7B's four layers", "0.5B", "English"
RECIPES = ("int4_xnnpack", "int4_fast_xnnpack", "int8_xnnpack")
T, KV_LEN = 32, 512  # of a block step
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SEEN = (64, 128, 256, 512, 1024, 2048)
RULES = "window, EB 4"
KINDS = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--keep", action="store_true", help="as the baseline of this kind of machine")
    parser.add_argument("--output", type=Path, help="a JSON file for what was measured")
    args = parser.parse_args()
    use_threads()
    result = measured(made(args.workdir))
    if args.output is not None:
        write_json(args.output, result)
    baselines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    before = baselines.get(result["kind"], {}).get("ratios", {})
    worse = show(result["ratios"], before)
    if args.keep:
        write_json(BASELINE, baselines | {result["kind"]: result})
    elif worse:
        sys.exit(f"bench: worse than {result['kind']} was, by more than {MARGIN - 1:.0%}: {', '.join(worse)}")


def kind_of_machine() -> str:
    """What decides which code computes, and in how many threads."""
    known = [name for name in KINDS if name in features()]
    return " ".join([machine()["processor"], *known, f"{thread_count()} threads"])


def made(workdir: Path) -> dict[str, dict[str, Path]]:
    """Artifacts by shape and recipe, not validated: what their weights are does not change a time."""
    workdir.mkdir(parents=True, exist_ok=True)
    shapes = {WIDE: replace(read_shape(CONF / "shape" / "dream_7b.yaml"), num_hidden_layers=4)}
    shapes[SMALL] = read_shape(CONF / "shape" / "dream_0_5b.yaml")
    checkpoints = {name: workdir / f"{name}-checkpoint" for name in shapes}
    for name, config in shapes.items():
        if not (checkpoints[name] / "config.json").exists():  # which is written last
            shutil.rmtree(checkpoints[name], ignore_errors=True)
            write_checkpoint(config, checkpoints[name], seed=0)
    checkpoints[ENGLISH] = ASSETS / "dream_english"
    artifacts: dict[str, dict[str, Path]] = {}
    for name, checkpoint in checkpoints.items():
        for recipe in RECIPES if name != ENGLISH else RECIPES[:1]:
            folder = artifacts.setdefault(name, {})[recipe] = workdir / f"{name}-{recipe}"
            if not folder.exists():
                in_process(checkpoint, recipe, workdir)
                (workdir / "road").rename(folder)
    return artifacts


def measured(artifacts: dict[str, dict[str, Path]]) -> Result:
    parts: dict[str, Callable[[dict[str, dict[str, Path]]], Result]] = {
        "steps": steps,
        "lengths": lengths,
        "one_token": one_token,
        "choosing": choosing,
        "decoding": decoding,
        "opening": opening,
        "road": road,
    }
    result: Result = {"machine": machine(), "kind": kind_of_machine()}
    console = Console(stderr=True)
    for name, part in parts.items():
        started = time.time()
        result[name] = part(artifacts)
        console.print(f"{name}: {time.time() - started:.0f} s", highlight=False)
    return result | {"ratios": ratios(result)}


def steps(artifacts: dict[str, dict[str, Path]]) -> Result:
    """A block step of each recipe in turn, with llama.cpp's where it is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {}
    names = (WIDE, SMALL)
    return {name: in_turn(artifacts[name], config_of(artifacts[name]), T, KV_LEN, repeats=15) for name in names}


def config_of(artifacts: dict[str, Path]) -> DreamEdgeConfig:
    return DreamEdgeConfig.from_hf(load_manifest(next(iter(artifacts.values())))["model"])


def lengths(artifacts: dict[str, dict[str, Path]]) -> Result:
    """Seconds of a call by its tokens (all that it sees are its own), and of one and of 32 tokens by what they see."""
    program = Program.open(artifacts[WIDE]["int4_fast_xnnpack"])
    grid = {"own": [(n, n) for n in LENGTHS], "one": [(1, n) for n in SEEN], "block": [(T, n) for n in SEEN]}
    return {
        name: [{"tokens": t, "kv_len": n, **_call(program, t, n)} for t, n in calls] for name, calls in grid.items()
    }


def one_token(artifacts: dict[str, dict[str, Path]]) -> Result:
    """What bounds a call of one token: the bytes that it reads, and how fast this machine reads."""
    found: Result = {"bandwidth": read_bandwidth()}
    config = config_of(artifacts[WIDE])
    rows = config.vocab_size * config.hidden_size  # of the embedding, int8, of which one is read
    for recipe, artifact in artifacts[WIDE].items():
        taken = _call(Program.open(artifact), 1, 64)
        found[recipe] = taken | {"bytes": program_file(artifact).stat().st_size - rows}
    return found


def read_bandwidth() -> float:
    """Bytes a second, of as many threads as the runtime has: the best of ten."""
    block = torch.ones(2**28)
    threads = torch.get_num_threads()
    torch.set_num_threads(thread_count())
    taken = min(_seconds(block.sum) for _ in range(10))
    torch.set_num_threads(threads)
    return 4 * len(block) / taken


def choosing(artifacts: dict[str, dict[str, Path]]) -> Result:
    """Seconds to choose tokens for the rows of a block from a vocabulary of 152 thousand, and of the step before it."""
    program = Program.open(artifacts[SMALL]["int4_fast_xnnpack"])
    tokens = torch.arange(T)
    logits_TV = program.forward(tokens, KV_LEN - T, KV_LEN)[0].clone()
    step = spread([_seconds(lambda: program.forward(tokens, KV_LEN - T, KV_LEN)) for _ in range(11)])
    asked = (program.mask_id, "maskgit_plus", 0.0, None, None, None)
    return {"step": step, "choose": spread([_seconds(lambda: sample(logits_TV, *asked)) for _ in range(11)])}


def decoding(artifacts: dict[str, dict[str, Path]]) -> Result:
    """The calls of answers that a trained network writes, and what they take at the shape of 0.5B.

    Random weights are sure of nothing, so no rule would accept a token there: its calls are the English network's.
    """
    english = Program.open(artifacts[ENGLISH]["int4_xnnpack"])
    large = Program.open(artifacts[SMALL]["int4_fast_xnnpack"])
    prompts = prompts_of(ASSETS / "text" / "held_out.jsonl", ASSETS / "dream_english", 4)
    found: Result = {}
    for name in (BEST_BEFORE, RULES):
        calls = [call for prompt in prompts for call in _calls_of(english, prompt, SETTINGS[name])]
        found[name] = {"calls": len(calls), "seconds": _seconds(partial(_replayed, large, calls))}
    return found


def _calls_of(program: Program, prompt: torch.Tensor, options: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """(tokens, start_pos, kv_len, rows) of each call of an answer."""
    calls: list[tuple[int, int, int, int]] = []

    def noted(tokens: torch.Tensor, start: int, kv_len: int, rows: torch.Tensor) -> torch.Tensor:
        calls.append((tokens.numel(), start, kv_len, len(rows)))
        return Program.forward(program, tokens, start, kv_len, rows)

    with patch.object(program, "forward", noted):
        generate(program, prompt, max_new_tokens=NEW, alg="maskgit_plus", **options)
    return calls


def _replayed(program: Program, calls: list[tuple[int, int, int, int]]) -> None:
    for n, start, kv_len, n_rows in calls:
        logits_1KV = program.forward(torch.arange(n), start, kv_len, torch.arange(n_rows))
        sample(logits_1KV[0], program.mask_id, "maskgit_plus", 0.0, None, None, None)


def opening(artifacts: dict[str, dict[str, Path]]) -> Result:
    artifact = artifacts[WIDE]["int4_xnnpack"]
    plain = spread([_seconds(lambda: Program.open(artifact)) for _ in range(3)])
    kept = packed(artifact, artifact.parent)
    then = statistics.median(opened["seconds"] for opened in kept["then"])
    return {
        "plain": plain,
        "packed_first": kept["first"]["seconds"],
        "packed_then": then,
        "bytes": program_file(artifact).stat().st_size,
    }


def road(_: dict[str, dict[str, Path]]) -> Result:
    """The main job from nothing, and a fixed piece of Python to compare it with on a machine of another speed."""
    unit = [_seconds(_python) for _ in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"checkpoint={BUNDLED}", f"output={folder}/artifact", f"cache={folder}/cache"]
        command = [sys.executable, "-m", "pipeline", "run", "recipe=int4_xnnpack", *paths]
        whole = _seconds(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))
        stages = json.loads((Path(folder) / "artifact" / "report.json").read_text())["stages"]
    unit += [_seconds(_python) for _ in range(5)]
    return {"unit": statistics.median(unit), "whole": whole, "stages": {one["name"]: one["seconds"] for one in stages}}


def _python() -> None:
    """Half a second of what lowering does all the time: objects by name in a dictionary."""
    known: dict[tuple[int, str], list[int]] = {}
    for i in range(400_000):
        known.setdefault((i % 1000, f"{i % 7}"), []).append(i)


def ratios(result: Result) -> dict[str, float]:
    """By name; lower is better."""
    found: dict[str, float] = {}
    for shape, seconds in result["steps"].items():
        of = seconds["llama.cpp"]["median"]
        found |= {f"step of {r}, {shape}, to llama.cpp": seconds[r]["median"] / of for r in RECIPES}
    own = {call["tokens"]: call["median"] for call in result["lengths"]["own"]}
    found["512 tokens, to 16 times 32"] = own[512] / (16 * own[32])
    one = result["one_token"]
    for recipe in RECIPES:
        found[f"one token of {recipe}, to its bytes"] = one[recipe]["median"] * one["bandwidth"] / one[recipe]["bytes"]
    chosen, decoded, opened = result["choosing"], result["decoding"], result["opening"]
    found["choosing tokens, to the step"] = chosen["choose"]["median"] / chosen["step"]["median"]
    found[f"answer by {RULES}, to {BEST_BEFORE}"] = decoded[RULES]["seconds"] / decoded[BEST_BEFORE]["seconds"]
    read = opened["bytes"] / one["bandwidth"]
    found["opening, to its bytes"] = opened["plain"]["median"] / read
    found["opening what is packed, to its bytes"] = opened["packed_then"] / read
    job = result["road"]
    found["main job, to Python"] = job["whole"] / job["unit"]
    return found | {f"{s}, to Python": job["stages"][s] / job["unit"] for s in ("lower", "validate")}


def show(found: dict[str, float], before: dict[str, float]) -> list[str]:
    """Prints them; the names of those that are worse."""
    listing = table(None, "ratio", "now", "baseline", "")
    worse = []
    for name, ratio in found.items():
        is_worse = name in before and ratio > MARGIN * before[name]
        worse += [name] * is_worse
        listing.add_row(name, f"{ratio:.3f}", f"{before[name]:.3f}" if name in before else "", "worse" * is_worse)
    Console().print(listing)
    return worse


def _call(program: Program, t: int, kv_len: int) -> dict[str, float]:
    """Seconds of the last t of kv_len positions, with the logits of at most 32 of them."""
    rows = torch.arange(max(0, t - T), t)

    def call() -> None:
        program.forward(torch.arange(t), kv_len - t, kv_len, rows)

    first = _seconds(call)
    return spread([_seconds(call) for _ in range(3 if first > 0.5 else 15)])


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
