"""Measure a program in a process of its own: load time, memory, single calls, generation with each cache.

python -m validation.speed MODEL.pte SETTINGS (the JSON of `Settings`) writes one line of JSON for each thing that it
begins, and at last the result.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from runtime.errors import BadArtifactError
from runtime.generation import Generation, generate
from runtime.limits import died_of
from runtime.memory import memory, peak_rss
from runtime.program import Program, ProgramError
from runtime.threads import use_threads
from validation.child import run_child

LOADS = 3
CALLS = 10  # of a length, for each repeat
LONG = 30  # seconds of a call that says as much in one as in many


@dataclass(frozen=True)
class Settings:
    """lengths: tokens of single calls, which see at least kv_len positions.

    new_tokens: of each generation, 0 for none. repeats: of each generation. threshold: of the last generation.
    packed_cache: a folder that keeps the packed weights, or None. threads: as for `runtime.threads.use_threads`.
    """

    lengths: tuple[int, ...]
    kv_len: int
    prompt_len: int
    new_tokens: int
    block_length: int
    steps: int | None
    threshold: float
    repeats: int
    seed: int
    packed_cache: str | None = None
    threads: int | None = None


Mode = tuple[str, Literal["prefix", "dual"] | None, bool]  # (name, cache, with the threshold)
MODES: tuple[Mode, ...] = (
    ("no cache", None, False),
    ("prefix", "prefix", False),
    ("dual", "dual", False),
    ("dual, threshold", "dual", True),
)


def bench(pte: Path, settings: Settings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Times in seconds as {median, min, max}; memory in bytes."""
    threads = use_threads(settings.threads)  # what this imports is not part of a load
    before = memory()
    loads = []
    program = None
    for i in range(LOADS):
        tell(f"load {i + 1} of {LOADS}")
        program = None  # the one before gives its memory back
        started = time.perf_counter()
        program = Program.open(pte, settings.packed_cache)
        loads.append(time.perf_counter() - started)
    assert program is not None
    loaded = memory()
    calls = []
    for T in sorted({min(T, program.max_seq_len) for T in settings.lengths} | {program.max_seq_len}):
        tell(f"calls of {T} tokens")
        n_rows = min(T, settings.block_length, program.max_rows)
        calls.append(_call(program, T, n_rows, settings.kv_len, CALLS * settings.repeats))
    generations = _generations(program, settings, tell) if settings.new_tokens else []
    return {
        "threads": threads,
        "load_seconds": spread(loads),
        "memory": {"process": before, "loaded": loaded, "after": memory(), "peak": peak_rss()},
        "calls": calls,
        "generations": generations,
    }


def _call(program: Program, T: int, n_rows: int, kv_len: int, n_calls: int) -> dict[str, Any]:
    """T tokens at once with the logits of the last rows, as the last of the positions that they see."""
    kv_len = max(T, kv_len)
    tokens_T = torch.arange(T) % program.vocab_size
    rows_K = torch.arange(T - n_rows, T)

    def call() -> float:
        started = time.perf_counter()
        program.forward(tokens_T, kv_len - T, kv_len, rows_K)
        return time.perf_counter() - started

    first = call()  # touches memory for the first time
    seconds = [first] if first > LONG else []
    # In between, ten seconds a length are enough.
    while first <= LONG and len(seconds) < n_calls and (len(seconds) < 3 or sum(seconds) < 10):
        seconds.append(call())
    taken = spread(seconds)
    return {"tokens": T, "kv_len": kv_len, "rows": n_rows, "seconds": taken, "tokens_per_second": T / taken["median"]}


def _generations(program: Program, settings: Settings, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each mode in turn, `repeats` times, so that what disturbs the machine disturbs all of them."""
    random = torch.Generator().manual_seed(settings.seed)
    prompt = torch.randint(program.vocab_size - 1, (settings.prompt_len,), generator=random)
    prompt += prompt >= program.mask_id  # any token but the mask
    runs: dict[str, list[Generation]] = {name: [] for name, _, _ in MODES}
    for i in range(settings.repeats):
        for name, cache, has_threshold in MODES:
            tell(f"generation {i + 1} of {settings.repeats}: {name}")
            runs[name].append(
                generate(
                    program,
                    prompt,
                    max_new_tokens=settings.new_tokens,
                    steps=settings.steps,
                    block_length=settings.block_length,
                    cache=cache,
                    threshold=settings.threshold if has_threshold else None,
                )
            )
    uncached = runs[MODES[0][0]][0]
    return [
        {
            "mode": name,
            "seconds": spread([run.seconds for run in runs[name]]),
            "tokens_per_second": spread([run.tokens_per_second for run in runs[name]]),
            "forward_calls": runs[name][0].forward_calls,
            "positions": runs[name][0].positions,
            "same_tokens": float((runs[name][0].answers[0] == uncached.answers[0]).float().mean()),
        }
        for name, _, _ in MODES
    ]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    settings = Settings(**json.loads(sys.argv[2]))

    def tell(what: str) -> None:
        sys.stdout.write(json.dumps({"begins": what}) + "\n")
        sys.stdout.flush()

    try:
        result = bench(Path(sys.argv[1]), settings, tell)
    except (ProgramError, FloatingPointError, ValueError, OSError) as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps({"result": result | {"settings": asdict(settings)}}) + "\n")


if __name__ == "__main__":
    main()


def run_bench(pte: Path, settings: Settings, tell: Callable[[str], None]) -> dict[str, Any]:
    """What `validation.speed` found. Raises `BadArtifactError`."""
    result: dict[str, Any] | None = None

    def hear(line: str) -> None:
        nonlocal result
        said = json.loads(line)
        result = said.get("result", result)
        tell(said.get("begins", ""))

    child = run_child("validation.speed", [str(pte.resolve()), json.dumps(asdict(settings))], hear)
    complaint = child.stderr.strip().splitlines()
    if child.returncode < 0:
        raise BadArtifactError(f"{pte}: the runtime crashed ({died_of(child.returncode)}) while measuring it")
    if child.returncode != 0 or result is None:
        raise BadArtifactError(complaint[-1] if complaint else f"{pte}: the runtime ended with {child.returncode}")
    return result
