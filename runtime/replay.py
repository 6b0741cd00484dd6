"""Run recorded calls through a `.pte` in a process of its own: a crash there is a verdict here.

python -m runtime.replay MODEL.pte REFERENCE.safetensors OUTPUT.safetensors [--solve]
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.generate import Network, generate
from runtime.program import Program, ProgramError
from runtime.reference import Reference, ReferenceError, Task, load_reference


@dataclass(frozen=True)
class Replay:
    """logits[name of the sequence][i]: float32 [K, vocab]. answers: int64 [N, n_new] of the task, if any.

    peak_rss: bytes, of the process that ran the program. metadata: the program's constant methods.
    """

    logits: dict[str, list[Tensor]]
    answers: Tensor | None
    load_seconds: float
    run_seconds: float
    peak_rss: int
    metadata: dict[str, Any]


def replay(pte: Path, reference: Path, solve: bool = True) -> Replay:
    """solve: also answer the task's prompts. Raises `ProgramError` with the runtime's words, also when it crashed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.safetensors"
        command = [
            sys.executable,
            "-m",
            "runtime.replay",
            str(pte),
            str(reference),
            str(output),
            *(["--solve"] * solve),
        ]
        # Where this package was found, the child finds it.
        root = str(Path(__file__).resolve().parent.parent)
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=root, check=False)
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            raise ProgramError(f"{pte}: the runtime crashed ({name}) while running it")
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise ProgramError(f"{pte}: {lines[-1]}" if str(pte) not in lines[-1] else lines[-1])
        logits: dict[str, list[Tensor]] = {}
        with safe_open(output, framework="pt") as opened:
            header = json.loads(opened.metadata()["replay"])
            for name, n_calls in header["sequences"].items():
                logits[name] = [opened.get_tensor(f"{name}/{i}") for i in range(n_calls)]
            answers = opened.get_tensor("task/answers") if header["has_task"] else None
        measured = (header[key] for key in ("load_seconds", "run_seconds", "peak_rss", "metadata"))
        return Replay(logits, answers, *measured)


def _run(program: Program, reference: Reference, task: Task | None) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for sequence in reference.sequences:
        for i, call in enumerate(sequence.calls):
            logits = program.forward(call.tokens, call.start_pos, call.kv_len, call.rows)
            outputs[f"{sequence.name}/{i}"] = logits[0].contiguous().clone()
    if task is not None:
        outputs["task/answers"] = solve(program, task)
    return outputs


def solve(network: Network, task: Task) -> Tensor:
    """Answers int64 [N, n_new]: the program's, or in eager those to compare with."""
    solved = generate(network, task.prompts, max_new_tokens=task.n_new, alg="maskgit_plus", threshold=task.threshold)
    return torch.stack(solved.answers)


def main() -> None:
    pte, reference_file, output = (Path(arg) for arg in sys.argv[1:4])
    try:
        reference = load_reference(reference_file)
        task = reference.task if "--solve" in sys.argv[4:] else None
        started = time.perf_counter()
        program = Program.open(pte)
        loaded = time.perf_counter()
        outputs = _run(program, reference, task)
        ended = time.perf_counter()
    except (ProgramError, ReferenceError, ValueError, OSError) as error:
        sys.exit(str(error))
    header = {
        "sequences": {sequence.name: len(sequence.calls) for sequence in reference.sequences},
        "has_task": task is not None,
        "load_seconds": loaded - started,
        "run_seconds": ended - loaded,
        "metadata": asdict(program.metadata),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    save_file(outputs, output, metadata={"replay": json.dumps(header)})


if __name__ == "__main__":
    main()
