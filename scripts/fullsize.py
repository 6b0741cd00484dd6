"""Everything that is claimed for a full-size model, measured from nothing, in one JSON.

    python -m scripts.fullsize WORKDIR OUTPUT.json [--shape conf/shape/dream_7b.yaml]

It takes two hours, or more without AVX-512, and 60 GB of disk for Dream-7B's shape. Each measurement is a process of
its own; each road runs under a hard limit of memory where the machine lets a control group be made. What was made is
removed as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from model import DreamEdgeConfig
from pipeline.config import ASSETS, ROOT, load_recipe
from pipeline.display import Display
from pipeline.estimate import of_sizes
from pipeline.export import export, lengths
from pipeline.load import load
from pipeline.lower import lower
from pipeline.quantize import quantize
from pipeline.schema import ExportConfig
from report.files import write_json
from runtime.artifact import SCHEMA_VERSION
from runtime.processor import machine
from scripts.make_checkpoint import copy_tokenizer, read_shape, with_ids_of, write_checkpoint

MAX_SEQ_LEN = 2048
TOKENIZER = ASSETS / "dream_english"  # so that text is read, as with a real checkpoint
LIMIT = 12 * 2**30
RECIPES = ("int4_fast_xnnpack", "int8_xnnpack", "fp16_xnnpack")
TIMED = RECIPES[:2]
OPEN = """
import json, sys, time
from runtime.memory import memory
from runtime.program import Program, executorch_runtime
executorch_runtime()  # its import is not part of it
started = time.perf_counter()
program = Program.open(*sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - started, "memory": memory()}))
"""
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", type=Path, default=ROOT / "conf" / "shape" / "dream_7b.yaml")
    parser.add_argument("--main-job", action="store_true", help="only `run recipe=int4_xnnpack`, whole")
    parser.add_argument("--road", nargs=2, metavar=("CHECKPOINT", "RECIPE"), help="only load to lower, in this process")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.road:
        write_json(args.output, road(Path(args.road[0]), args.road[1], args.workdir))
        return
    started = time.time()
    config = read_shape(args.shape)
    result: dict[str, Any] = {"shape": asdict(config), "machine": machine(), "max_seq_len": MAX_SEQ_LEN}

    def note(name: str, value: Any) -> None:
        result[name] = value
        result["seconds"] = time.time() - started
        write_json(args.output, result)
        console.print(f"{result['seconds']:6.0f} s  {name}", highlight=False)

    checkpoint = args.workdir / "checkpoint"
    note("make_checkpoint", {"seconds": made(config, checkpoint)})
    artifact = args.workdir / "artifact"
    note("main_job", main_job(checkpoint, artifact, args.workdir))
    if args.main_job:
        return
    note("bench", bench(artifact, args.workdir))
    note("packed", packed(artifact, args.workdir))
    note("llama_cpp", {"int4_xnnpack": against_llama(artifact, args.workdir)})
    note("explain", explain(checkpoint, artifact, args.workdir))
    shutil.rmtree(artifact)
    note("recipes", {})
    for recipe in RECIPES:
        measured = in_process(checkpoint, recipe, args.workdir)
        if recipe in TIMED:
            measured["bench"] = bench(args.workdir / "road", args.workdir)
            note("llama_cpp", result["llama_cpp"] | {recipe: against_llama(args.workdir / "road", args.workdir)})
        note("recipes", result["recipes"] | {recipe: measured})
        for folder in ("road", "cache"):
            shutil.rmtree(args.workdir / folder)
    shutil.rmtree(checkpoint)
    note("growth", {})
    for name, changed in growth_shapes(config).items():
        made(changed, checkpoint)
        note("growth", result["growth"] | {name: in_process(checkpoint, "int4_xnnpack", args.workdir)})
        for folder in ("road", "cache", "checkpoint"):
            shutil.rmtree(args.workdir / folder)


def growth_shapes(config: DreamEdgeConfig) -> dict[str, DreamEdgeConfig]:
    L, V = config.num_hidden_layers, config.vocab_size
    return {
        f"{L // 4} layers": replace(config, num_hidden_layers=L // 4),
        f"{L // 2} layers": replace(config, num_hidden_layers=L // 2),
        f"{L // 4} layers, twice the vocabulary": replace(config, num_hidden_layers=L // 4, vocab_size=2 * V),
    }


def made(config: DreamEdgeConfig, checkpoint: Path) -> float:
    shutil.rmtree(checkpoint, ignore_errors=True)
    started = time.time()
    write_checkpoint(with_ids_of(config, TOKENIZER), checkpoint, seed=0)
    copy_tokenizer(TOKENIZER, checkpoint)
    return time.time() - started


def main_job(checkpoint: Path, artifact: Path, workdir: Path) -> dict[str, Any]:
    """`python -m pipeline run recipe=int4_xnnpack`, with its validation."""
    paths = [f"checkpoint={checkpoint}", f"output={artifact}", f"cache={workdir / 'cache'}", "overwrite=true"]
    command = ["-m", "pipeline", "run", "recipe=int4_xnnpack", "task=none", f"export.max_seq_len={MAX_SEQ_LEN}"]
    process = measured_process([*command, *paths])
    report, manifest = (json.loads((artifact / name).read_text()) for name in ("report.json", "manifest.json"))
    sizes = manifest["sizes"]
    return process | {
        "stages": report["stages"],
        "estimate": report["estimate"],
        "program": report["program"],
        "figures": report["figures"],
        "sizes": sizes | {"reference": (artifact / "reference.safetensors").stat().st_size},
        "of_ideal": sizes["program"] / sizes["ideal_program"],
        "of_file": {name: report["program"][name] / sizes["program"] for name in ("peak_rss", "anonymous")},
        "delegation": manifest["delegation"],
    }


def in_process(checkpoint: Path, recipe: str, workdir: Path) -> dict[str, Any]:
    """The road up to the `.pte`, in a process of its own."""
    output = workdir / "road.json"
    process = measured_process(["-m", "scripts.fullsize", str(workdir), str(output), "--road", str(checkpoint), recipe])
    return process | json.loads(output.read_text())


def road(checkpoint: Path, recipe_name: str, workdir: Path) -> dict[str, Any]:
    recipe, settings = load_recipe(recipe_name), ExportConfig(MAX_SEQ_LEN)
    pte = workdir / "road" / "model.pte"
    pte.parent.mkdir(exist_ok=True)
    display = Display(Console(stderr=True, quiet=True))
    with display.stage("load"):
        loaded = load(checkpoint)
    needs = of_sizes(loaded.config, loaded.weights, recipe, *lengths(loaded.config, settings))
    with display.stage("quantize") as report:
        quantized = quantize(loaded, recipe, workdir / "cache", report)
    with display.stage("export"):
        exported = export(quantized, settings)
    with display.stage("lower"):
        lower(exported, quantized, pte)
    (pte.parent / "manifest.json").write_text(
        json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "export": {"max_seq_len": MAX_SEQ_LEN},
                "model": loaded.config.to_hf(),
            }
        ),
        encoding="utf-8",
    )
    return {
        "stages": [asdict(stage) for stage in display.stages],
        "estimate": asdict(needs),
        "written_bytes": psutil.Process().io_counters().write_chars,
        "program_bytes": pte.stat().st_size,
        "of_ideal": pte.stat().st_size / needs.output,
    }


def bench(artifact: Path, workdir: Path) -> dict[str, Any]:
    """Single calls: T=1 and T=32 that see 512 positions, prefills of 512 and of all."""
    output = workdir / "bench.json"
    options = ["lengths=[1,32,512]", "kv_len=512", "new_tokens=0", "prompt_len=1", "repeats=1", f"output={output}"]
    measured_process(["-m", "pipeline", "bench", f"artifact={artifact}", *options])
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def packed(artifact: Path, workdir: Path) -> dict[str, Any]:
    """`Program.open` that keeps the packed weights: the first time, and then with what it kept."""
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        command = [sys.executable, "-c", OPEN, str(artifact), folder]
        opened = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(4)]
        (file,) = Path(folder).iterdir()
        return {"bytes": file.stat().st_size, "first": opened[0], "then": opened[1:]}


def against_llama(artifact: Path, workdir: Path) -> dict[str, Any]:
    """A block step, in turn with llama.cpp's. Both models are in memory, so no limit is set."""
    output = workdir / "llama.json"
    options = ["--repeats", "5", "--output", str(output)]
    measured_process(["-m", "scripts.compare_llama_cpp", str(artifact), *options], limited=False)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def explain(checkpoint: Path, artifact: Path, workdir: Path) -> dict[str, Any]:
    """`python -m pipeline explain`, with the weights that the main job left quantized."""
    output = workdir / "explain.json"
    paths = [f"artifact={artifact}", f"checkpoint={checkpoint}", f"cache={workdir / 'cache'}", f"output={output}"]
    process = measured_process(["-m", "pipeline", "explain", *paths])
    return process | json.loads(output.read_text())


def measured_process(arguments: list[str], limited: bool = True) -> dict[str, Any]:
    """Seconds, and the most memory that the kernel counted for the process; ends the measurement if it fails."""
    started = time.time()
    with hard_limit() if limited else nullcontext((None, None)) as (join, group):
        with tempfile.TemporaryFile("w+") as said:
            command = [sys.executable, *arguments]
            process = subprocess.Popen(command, cwd=ROOT, preexec_fn=join, stdout=said, stderr=said)
            _, status, usage = os.wait4(process.pid, 0)
            said.seek(0)
            if status:
                code = os.waitstatus_to_exitcode(status)
                sys.exit(f"fullsize: {' '.join(arguments)} ended with {code}:\n{said.read()[-2000:]}")
        limit = LIMIT if group is not None else None
    return {"hard_limit": limit, "seconds": time.time() - started, "peak_rss": usage.ru_maxrss * 1024}


@contextmanager
def hard_limit() -> Iterator[tuple[Any, Path | None]]:
    """A control group of `LIMIT` bytes, and what lets a new process join it; none where it cannot be made."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"dreamedge-{os.getpid()}"
        try:
            group.mkdir()
            with (group / limit).open("r+") as opened:  # the kernel's own file: a plain folder has none
                opened.write(str(LIMIT))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield lambda group=group: (group / "cgroup.procs").write_text(str(os.getpid())), group
        finally:
            group.rmdir()
        return
    yield None, None


if __name__ == "__main__":
    main()
