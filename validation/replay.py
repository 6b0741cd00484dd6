"""Run recorded calls through a `.pte` in a process of its own: a crash there is a verdict here.

python -m validation.replay MODEL.pte REFERENCE.safetensors OUTPUT.safetensors PLANNED_MEMORY [--solve] [--tokens N]
    [--threads N]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.generation import generate
from runtime.limits import end_if_call_hangs, end_if_loading_hangs, how_it_ended, restrict_to_program
from runtime.memory import give_back_from, memory, peak_rss
from runtime.network import ForwardAll, Network
from runtime.program import Program, ProgramError
from runtime.threads import use_threads
from validation.child import run_child
from validation.greedy import write_greedily
from validation.logits import Summary, digest, summarize
from validation.progress import Report, silent
from validation.reference import Call, Greedy, Reference, ReferenceError, Task, calls_of, load_reference, n_tokens

PHASES = ("loading", "calls", "prompts")  # of the process that runs the program
EACH_CALL = 4  # tokens that a call takes as long as, besides its own: it reads all weights


@dataclass(frozen=True)
class Answers:
    """To the N prompts of a task. tokens: int64 [N, n_new]. steps: int64 [N, n_new], from 0, that wrote each."""

    tokens: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Replay:
    """logits[name of the sequence][i]: what is kept of call i's. digests: sha256 of the bits of all of them.

    seconds: by sequence, what each call took. answers: to the task, if any. greedy: int64 [N, n_new], those of
    `Reference.greedy`. peak_rss, anonymous: bytes, of the process that ran the program, at its peak and at its end.
    grown: how many more of the latter than before it was opened. threads: that the runtime computed in. metadata: the
    program's constant methods.
    """

    logits: dict[str, list[Summary]]
    digests: dict[str, list[str]]
    seconds: dict[str, list[float]]
    answers: Answers | None
    greedy: Tensor | None
    load_seconds: float
    run_seconds: float
    peak_rss: int
    anonymous: int
    grown: int
    threads: int
    metadata: dict[str, Any]


def replay(
    pte: Path,
    reference: Path,
    solve: bool = True,
    planned_memory: float = 0,
    tokens: int | None = None,
    threads: int | None = None,
    report: Report = silent,
) -> Replay:
    """solve: also answer the task's prompts. planned_memory: bytes that the program may plan for.

    tokens: that the sequences may have in all, see `shortest`; None for all sequences. threads: as for
    `runtime.threads.use_threads`.

    Raises `ProgramError` with the runtime's words, also when it crashed, hung, or took more memory than such a program
    needs. report: of its calls, as it makes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.safetensors"
        arguments = [
            str(pte.resolve()),  # its folder is not ours
            str(reference.resolve()),
            str(output),
            str(planned_memory),
            *(["--solve"] * solve),
            *([] if tokens is None else ["--tokens", str(tokens)]),
            *([] if threads is None else ["--threads", str(threads)]),
        ]
        report("starting")
        child = run_child("validation.replay", arguments, partial(_hear, report))
        if child.returncode != 0:
            said = how_it_ended(child, "running")
            raise ProgramError(said if pte.name in said or reference.name in said else f"{pte}: {said}")
        try:
            return _read_output(output)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ProgramError(f"{pte}: the process that ran it ended early: {error}") from error


def _hear(report: Report, line: str) -> None:
    """What `_tell` wrote in the process of a program, which may have been anybody's."""
    try:
        phase, done, total, share = json.loads(line)
        if phase in PHASES and 0 <= done <= total and 0 <= share <= 1:
            report(str(phase), int(done), int(total), float(share))
    except (ValueError, TypeError, RecursionError):
        return


def _tell(what: str, done: int = 0, total: int = 0, share: float | None = None) -> None:
    part = share if share is not None else done / total if total else 0.0
    sys.stdout.write(json.dumps([what, done, total, part]) + "\n")
    sys.stdout.flush()


def _read_output(output: Path) -> Replay:
    logits: dict[str, list[Summary]] = {}
    with safe_open(output, framework="pt") as opened:
        header = json.loads(opened.metadata()["replay"])
        for name, n_calls in header["sequences"].items():
            logits[name] = [
                Summary(**{f.name: opened.get_tensor(f"{name}/{i}/{f.name}") for f in fields(Summary)})
                for i in range(n_calls)
            ]
        answers = None
        if header["has_task"]:
            answers = Answers(**{f.name: opened.get_tensor(f"task/{f.name}") for f in fields(Answers)})
        greedy = opened.get_tensor("greedy") if header["has_greedy"] else None
    costs = ("load_seconds", "run_seconds", "peak_rss", "anonymous", "grown", "threads")
    kept = ("digests", "seconds", *costs, "metadata")
    return Replay(logits=logits, answers=answers, greedy=greedy, **{key: header[key] for key in kept})


def _run(
    program: Program, reference: Reference, task: Task | None, greedy: Greedy | None
) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, list[float]]]:
    """(tensors of the summaries and answers, digests and seconds by sequence)."""
    outputs: dict[str, Tensor] = {}
    digests: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {}
    work = [EACH_CALL + len(call.tokens) for call in calls_of(reference.sequences)]
    n_done = 0
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        forward = program.start()
        for i, (call, asked) in enumerate(zip(sequence.calls, expected, strict=True)):
            _tell("calls", n_done, len(work), sum(work[:n_done]) / sum(work))
            n_done += 1
            started = time.perf_counter()
            try:
                logits_KV = forward(call.tokens, call.start_pos, call.kv_len, call.rows)[0]
            except (ProgramError, ValueError) as error:
                T, K = len(call.tokens), len(call.rows)
                asks = f"{T} tokens from {call.start_pos}, kv_len {call.kv_len}, {K} rows"
                raise ProgramError(f"{sequence.name}, call {i} ({asks}): {error}") from error
            seconds.setdefault(sequence.name, []).append(time.perf_counter() - started)
            summary = summarize(logits_KV, asked.columns)
            if summary.vector.shape != asked.eager.shape:
                shapes = [list(vector.shape) for vector in (summary.vector, asked.eager)]
                raise ProgramError(f"{sequence.name}, call {i}: logits of {shapes[0]}, recorded are {shapes[1]}")
            digests.setdefault(sequence.name, []).append(digest(logits_KV))
            for field, tensor in vars(summary).items():
                outputs[f"{sequence.name}/{i}/{field}"] = tensor.contiguous().clone()
    if task is not None:
        outputs |= {f"task/{name}": tensor for name, tensor in vars(solve(program, task, _tell)).items()}
    if greedy is not None:
        outputs["greedy"] = _greedy(program, greedy)
    return outputs, digests, seconds


def _greedy(program: Program, greedy: Greedy) -> Tensor:
    def run(calls: list[Call]) -> list[Tensor]:
        return [program.start()(c.tokens, c.start_pos, c.kv_len, c.rows)[0].clone() for c in calls]

    try:
        return write_greedily(run, greedy.prompts, greedy.tokens.shape[1], program.mask_id)
    except ValueError as error:  # longer than the program, or rows that it has no room for
        raise ProgramError(f"greedy answers: {error}") from error


def shortest(reference: Reference, tokens: int) -> Reference:
    """Of its sequences the shortest of each kind, then the shortest of all, while they have at most `tokens` in all; in
    their order.
    """
    lengths = [n_tokens((sequence,)) for sequence in reference.sequences]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    of_each_kind = {reference.sequences[i].kind: i for i in reversed(by_length)}
    chosen = []
    for i in sorted(by_length, key=lambda i: i not in of_each_kind.values()):
        if lengths[i] <= tokens:
            chosen.append(i)
            tokens -= lengths[i]
    chosen.sort()
    sequences, expected = reference.sequences, reference.expected
    parts = (tuple(sequences[i] for i in chosen), tuple(expected[i] for i in chosen))
    return Reference(*parts, reference.floor_db, reference.task)


def solve(network: Network, task: Task, report: Report = silent) -> Answers:
    """The program's."""
    found = []
    for i, prompt in enumerate(task.prompts):
        report("prompts", i, len(task.prompts))
        found.append(solve_prompts(network, [prompt], task))
    return Answers(torch.cat([answers.tokens for answers in found]), torch.cat([answers.steps for answers in found]))


def solve_prompts(
    network: Network, prompts: Sequence[Tensor], task: Task, together: ForwardAll | None = None
) -> Answers:
    """Each as if it were alone. together: as for `generate`."""
    rule: dict[str, Any] = {"alg": "maskgit_plus", "threshold": task.threshold}
    solved = generate(network, prompts, max_new_tokens=task.n_new, together=together, **rule)
    was_mask = solved.history[:, :, -task.n_new :] == network.mask_id
    return Answers(torch.stack(solved.answers), was_mask.sum(0) - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("pte", "reference", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("planned_memory", type=float)
    parser.add_argument("--solve", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    pte: Path = args.pte
    # What holds a call's logits goes back to the system at once: the allocator would keep it beside the program.
    give_back_from(2**20)
    try:
        reference = load_reference(args.reference)
        if args.tokens is not None:
            reference = shortest(reference, args.tokens)
        task, greedy = (reference.task, reference.greedy) if args.solve else (None, None)
        n_bytes = pte.stat().st_size
        longest = max((len(call.tokens) for call in calls_of(reference.sequences)), default=0)
        threads = use_threads(args.threads)  # what this imports is not the program's
        restrict_to_program(n_bytes, args.planned_memory, longest)
        end_if_loading_hangs(n_bytes)
        _tell("loading")
        before = memory()["anonymous"]
        started = time.perf_counter()
        program = Program.open(pte)
        loaded = time.perf_counter()
        program.before_call = lambda T: end_if_call_hangs(T, n_bytes)
        outputs, digests, seconds = _run(program, reference, task, greedy)
        signal.setitimer(signal.ITIMER_REAL, 0)
        ended = time.perf_counter()
    except (ProgramError, ReferenceError, ValueError, OSError) as error:
        sys.exit(str(error))
    header = {
        "sequences": {sequence.name: len(sequence.calls) for sequence in reference.sequences},
        "digests": digests,
        "seconds": seconds,
        "has_task": task is not None,
        "has_greedy": greedy is not None,
        "load_seconds": loaded - started,
        "run_seconds": ended - loaded,
        "metadata": asdict(program.metadata),
        "peak_rss": peak_rss(),
        "anonymous": (now := memory()["anonymous"]),
        "grown": now - before,
        "threads": threads,
    }
    save_file(outputs, args.output, metadata={"replay": json.dumps(header)})


if __name__ == "__main__":
    main()
