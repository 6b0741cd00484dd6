"""What happens inside a `.pte`: the residual stream, keys and values of each layer, as ETDump records them.

The program runs in a process of its own: python -m validation.trace MODEL.pte CALLS.json BUFFER PLANNED_MEMORY FOLDER
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.limits import end_if_call_hangs, end_if_loading_hangs, how_it_ended, restrict_to_program
from runtime.program import executorch_folder, executorch_runtime, without_exporter
from validation.child import run_child
from validation.format import read_plan
from validation.reference import Call, Sequence, calls_of
from validation.trace_places import Place, Places, TraceError, find_places, recorded_values, sizes_at

BUFFER = 2**28  # bytes at most for what one run records; sequences that do not fit are left out
MOST = 2**30  # bytes that any short sequence of a real network fits in
ALIGNED = 64  # each tensor of the record begins at a multiple of it
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "LONG": torch.int64, "BOOL": torch.bool, "INT": torch.int32}
ETDUMP_FILE, TENSORS_FILE, OUTPUTS_FILE = "trace.etdp", "trace.bin", "outputs.safetensors"
OUTPUT = -1  # in place of an instruction

# What a run recorded by instruction: each tensor's scalar_type, sizes and offset, as ETDump has them.
Run = dict[int, list[dict[str, Any]]]


@dataclass(frozen=True)
class Trace:
    """Of all N tokens of all calls, in order, by layer, in the program's own types.

    x_1ND: what goes into the layer, of layer 0 the embedding. k_1NGd, v_1NGd: what it writes to its cache, k rotated.
    logits: of each call, float32 [K, vocab]. sequences: those that were run.
    """

    sequences: tuple[Sequence, ...]
    x_1ND: tuple[Tensor, ...]
    k_1NGd: tuple[Tensor, ...]
    v_1NGd: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


def trace(pte: Path, sequences: tuple[Sequence, ...]) -> Trace:
    """Run sequences and record them. Raises `TraceError`, also when the runtime crashed, and `ProgramError`.

    As many sequences as `BUFFER` holds, the first always. A token takes some 60 * hidden_size bytes a layer: give
    short ones. Of a float16 program only those whose calls are whole: see `_laid_out`.
    """
    plan, graphs = read_plan(pte)
    try:
        places = find_places(pte, plan, graphs)
        if _has_half(plan):
            sequences = tuple(sequence for sequence in sequences if all(map(_is_whole, sequence.calls)))
        sequences, n_bytes = _that_fit(plan, sequences)
    except (AttributeError, IndexError, ValueError) as error:
        raise TraceError(f"{pte}: no program of DreamEdge: {type(error).__name__}: {error}") from error
    if not sequences:
        raise TraceError(f"{pte}: no sequence that can be recorded")
    if n_bytes > MOST:
        raise TraceError(f"{pte}: it says that the record of {sequences[0].name} would take {n_bytes >> 20} MiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _record(pte, sequences, n_bytes, sum(plan.non_const_buffer_sizes), folder)
        try:
            return _read(pte, sequences, plan, places, folder)
        except (SafetensorError, OSError, subprocess.CalledProcessError) as error:
            raise TraceError(f"{pte}: the process that recorded it ended early: {error}") from error


def _that_fit(plan: Any, sequences: tuple[Sequence, ...]) -> tuple[tuple[Sequence, ...], int]:
    """(those that `BUFFER` holds the record of, its bytes)."""
    chosen: list[Sequence] = []
    total = 2**20
    for sequence in sequences:
        n_bytes = sum(_recorded_bytes(plan, max(call.kv_len, len(call.rows))) for call in sequence.calls)
        if chosen and total + n_bytes > BUFFER:
            break
        chosen.append(sequence)
        total += n_bytes
    return tuple(chosen), total


def _recorded_bytes(plan: Any, length: int) -> int:
    """At most, of a call in which no dynamic length is above `length`."""
    values = [value for i in plan.chains[0].instructions for value in recorded_values(plan, i.instr_args)]
    tensors = [plan.values[value].val for value in [*values, *plan.outputs]]
    sizes = [sizes_at(plan, tensor, length) for tensor in tensors if type(tensor).__name__ == "Tensor"]
    return sum(8 * math.prod(size) + ALIGNED for size in sizes)


def _record(pte: Path, sequences: tuple[Sequence, ...], n_bytes: int, planned_memory: int, folder: Path) -> None:
    calls = folder / "calls.json"
    calls.write_text(json.dumps([_plain(call) for call in calls_of(sequences)]))
    numbers = (str(n_bytes), str(planned_memory))
    arguments = [str(pte.resolve()), str(calls), *numbers, str(folder)]
    child = run_child("validation.trace", arguments, lambda _: None)
    if child.returncode != 0:
        raise TraceError(f"{pte}: cannot be recorded: {how_it_ended(child, 'recording')}")


def _plain(call: Call) -> dict[str, Any]:
    return vars(call) | {"tokens": call.tokens.tolist(), "rows": call.rows.tolist()}


def _read(pte: Path, sequences: tuple[Sequence, ...], plan: Any, places: Places, folder: Path) -> Trace:
    file = folder / TENSORS_FILE
    record = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    outputs = load_file(folder / OUTPUTS_FILE)
    logits = [outputs[str(i)] for i in range(len(outputs))]
    runs = _laid_out(pte, plan, sequences, record, logits) if _has_half(plan) else _runs(folder)
    if len(runs) != len(logits):
        raise TraceError(f"{pte}: recorded {len(runs)} calls of {len(logits)}")

    def of_all(place: Place, *shape: int) -> Tensor:
        instruction, position = place
        return torch.cat([_load(record, run[instruction][position]).view(1, -1, *shape) for run in runs], dim=1)

    try:
        D = runs[0][places.x[0][0]][places.x[0][1]]["sizes"][-1]
        return Trace(
            sequences=sequences,
            x_1ND=tuple(of_all(place, D) for place in places.x),
            k_1NGd=tuple(of_all(place, *places.cache_shape) for place in places.k),
            v_1NGd=tuple(of_all(place, *places.cache_shape) for place in places.v),
            logits=tuple(logits),
        )
    except (KeyError, IndexError, RuntimeError) as error:
        raise TraceError(f"{pte}: its record is not of its instructions: {type(error).__name__}: {error}") from error


def _load(record: Tensor, entry: dict[str, Any]) -> Tensor:
    dtype = DTYPES[entry["scalar_type"]]
    n_bytes = math.prod(entry["sizes"]) * dtype.itemsize
    return record[entry["offset"] : entry["offset"] + n_bytes].clone().view(dtype).view(entry["sizes"])


def _runs(folder: Path) -> list[Run]:
    """As executorch's schema decodes the record; its own reader takes pandas and seconds."""
    schema = executorch_folder() / "devtools" / "etdump" / "etdump_schema_flatcc.fbs"
    with without_exporter():
        from executorch.exir._serialize._flatbuffer import _flatc_decompile

        _flatc_decompile(str(folder), str(schema), str(folder / ETDUMP_FILE), ["--size-prefixed"])
    decoded = json.loads((folder / ETDUMP_FILE).with_suffix(".json").read_text())
    runs = []
    for data in decoded["run_data"]:
        if data["name"] == "Execute":
            run: Run = defaultdict(list)
            for event in (event.get("debug_event") for event in data["events"]):
                if event is not None and event["chain_index"] == 0 and "tensor" in event["debug_entry"]:
                    run[event["instruction_id"]].append(event["debug_entry"]["tensor"])
            runs.append(run)
    return runs


def _has_half(plan: Any) -> bool:
    tensors = (value.val for value in plan.values)
    return any(type(tensor).__name__ == "Tensor" and tensor.scalar_type.name == "HALF" for tensor in tensors)


def _is_whole(call: Call) -> bool:
    return call.start_pos == 0 and call.kv_len == len(call.tokens) == len(call.rows)


def _laid_out(pte: Path, plan: Any, sequences: tuple[Sequence, ...], record: Tensor, logits: list[Tensor]) -> list[Run]:
    """The runs of a program with float16 in it: executorch 1.5 keeps the bytes of such tensors, but says of none where.

    They lie one after another in the order of the instructions. In whole calls all dynamic lengths are the same, so
    each size is known. The logits of all calls, which are the last of each, must be found where this leads to.
    """
    planned = [_planned(plan, len(call.tokens)) for call in calls_of(sequences)]
    for begin in range(0, ALIGNED, 16):  # where the record's memory begins
        at, runs = begin, []
        for entries in planned:
            run: Run = defaultdict(list)
            for instruction, entry in entries:
                run[instruction].append(entry | {"offset": at})
                n_bytes = math.prod(entry["sizes"]) * DTYPES[entry["scalar_type"]].itemsize
                at += -(-n_bytes // ALIGNED) * ALIGNED
            runs.append(run)
        outputs = (run[OUTPUT][0] for run in runs)
        if at <= len(record) and all(
            torch.equal(_load(record, output)[0], expected) for output, expected in zip(outputs, logits, strict=True)
        ):
            return runs
    raise TraceError(f"{pte}: its record is not laid out as its instructions are")


def _planned(plan: Any, length: int) -> list[tuple[int, dict[str, Any]]]:
    """(instruction, type and sizes) of all that a whole call records, in order; its output comes last."""
    values = [
        (i, v) for i, step in enumerate(plan.chains[0].instructions) for v in recorded_values(plan, step.instr_args)
    ]
    tensors = [(i, plan.values[value].val) for i, value in [*values, (OUTPUT, plan.outputs[0])]]
    return [(i, {"scalar_type": t.scalar_type.name, "sizes": sizes_at(plan, t, length)}) for i, t in tensors]


def main() -> None:
    pte, calls_file, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[5])
    buffer, planned_memory = int(sys.argv[3]), int(sys.argv[4])
    try:
        runtime, n_bytes = executorch_runtime(), pte.stat().st_size  # what the runtime imports is not the program's
        calls = json.loads(calls_file.read_text())
        restrict_to_program(n_bytes, planned_memory, max(call["kv_len"] for call in calls), 2 * buffer)
        end_if_loading_hangs(n_bytes)
        program = runtime.load_program(pte, enable_etdump=True, debug_buffer_size=buffer)
        forward = program.load_method("forward")
        outputs = {}
        for i, call in enumerate(calls):
            numbers = (call["tokens"], call["start_pos"], call["kv_len"], call["rows"])
            tokens, start_pos, kv_len, rows = (torch.tensor(number).view(-1) for number in numbers)
            end_if_call_hangs(len(tokens), n_bytes)
            outputs[str(i)] = forward.execute((tokens[None], start_pos, kv_len, rows))[0][0].contiguous()
        program.write_etdump_result_to_file(str(folder / ETDUMP_FILE), str(folder / TENSORS_FILE))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
        sys.exit("it takes more memory than such a program needs")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))
    save_file(outputs, folder / OUTPUTS_FILE)


if __name__ == "__main__":
    main()
