"""What happens inside a `.pte`: the residual stream, keys and values of each layer, as ETDump records them.

The program runs in a process of its own: python -m runtime.trace MODEL.pte CALLS.json BUFFER_BYTES FOLDER
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
from torch import Tensor

from runtime.format import read_plan
from runtime.program import ProgramError, executorch_folder, executorch_runtime
from runtime.reference import Call, Sequence

BUFFER = 2**28  # bytes at most for what one run records; sequences that do not fit are left out
ALIGNED = 64  # each tensor of the record begins at a multiple of it
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16}
ETDUMP_FILE, TENSORS_FILE = "trace.etdp", "trace.bin"
# Operators that keep keys and values: which arguments are the cache and what is written to it.
CACHE_WRITES = {"llama::update_cache": (1, 0), "aten::index_put": (0, 2)}


class TraceError(ProgramError):
    """A program whose layers cannot be told apart, or that a recording did not come back from."""


@dataclass(frozen=True)
class Trace:
    """Of all N tokens of all calls, in order, by layer, in the program's own types.

    x_1ND: what goes into the layer, of layer 0 the embedding. k_1NGd, v_1NGd: what it writes to its cache, rotated.
    logits: of each call, float32 [K, vocab]. sequences: those that were run.
    """

    sequences: tuple[Sequence, ...]
    x_1ND: tuple[Tensor, ...]
    k_1NGd: tuple[Tensor, ...]
    v_1NGd: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class Places:
    """Where a run records what a `Trace` holds: (instruction, which of the tensors it records), by layer."""

    x: list[tuple[int, int]]
    k: list[tuple[int, int]]
    v: list[tuple[int, int]]
    logits: tuple[int, int]
    cache_shape: tuple[int, int]  # (kv heads, head_dim)
    plan: Any


def trace(pte: Path, sequences: tuple[Sequence, ...]) -> Trace:
    """Run sequences and record. Raises `TraceError`, `ProgramError`, also when the runtime crashed.

    As many sequences as fit `BUFFER`, the first always. A recording takes some 60 numbers of hidden_size for each
    token and layer: ask for short ones.
    """
    places = find_places(pte)
    sequences, n_bytes = _that_fit(places.plan, sequences)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _record(pte, sequences, n_bytes, folder)
        return _read(pte, sequences, places, folder)


def find_places(pte: Path) -> Places:
    """From the program's own instructions, never by what the numbers look like.

    The residual stream is the embedding, and after it each sum of its shape: no norm or product is one. Keys and
    values are what the cache is given; of the two caches of a layer the keys' is the first.
    """
    plan, graphs = read_plan(pte)
    stream: tuple[int, int] | None = None
    like: Any = None
    views: dict[int, int] = {}
    recorded: dict[int, tuple[int, int]] = {}
    writes: list[tuple[int, int, tuple[int, int] | None]] = []  # (cache, what is written to it, the stream before)
    for i, instruction in enumerate(plan.chains[0].instructions):
        call, kind = instruction.instr_args, type(instruction.instr_args).__name__
        if kind == "DelegateCall":
            for j, value in enumerate(call.args):
                recorded.setdefault(value, (i, j))
            for j in _sums(graphs.get(call.delegate_index)):
                if like is not None and _is_like(plan, call.args[j], like):
                    stream = (i, j)
        elif kind == "KernelCall":
            name, out = plan.operators[call.op_index].name, call.args[-1]
            recorded.setdefault(out, (i, 0))
            if name == "executorch_prim::et_view":
                views[out] = views.get(call.args[0], call.args[0])
            elif "::embedding" in name:
                stream, like = (i, 0), plan.values[out].val
            elif name == "aten::add" and like is not None and _is_like(plan, out, like):
                stream = (i, 0)
            elif name in CACHE_WRITES:
                cache, written = (call.args[at] for at in CACHE_WRITES[name])
                writes.append((cache, views.get(written, written), stream))
    n_layers, odd = divmod(len(writes), 2)
    layers = [sorted(writes[2 * i : 2 * i + 2]) for i in range(n_layers)]
    if odd or not layers or any(x is None or value not in recorded for _, value, x in writes):
        raise TraceError(f"{pte}: its layers cannot be told apart: it writes to {len(writes)} caches")
    output = plan.outputs[0]
    return Places(
        x=[keys[2] for keys, _ in layers if keys[2] is not None],
        k=[recorded[keys[1]] for keys, _ in layers],
        v=[recorded[values[1]] for _, values in layers],
        logits=recorded[views.get(output, output)],
        cache_shape=tuple(plan.values[layers[0][0][0]].val.sizes[2:]),
        plan=plan,
    )


def _sums(graph: dict[str, Any] | None) -> list[int]:
    """Which arguments of a delegate are written by an addition."""
    if graph is None:
        return []
    tensors = [value["xvalue_union"].get("tensor_value", value["xvalue_union"]) for value in graph["xvalues"]]
    external = {tensor["id_out"]: tensor["external_id"] for tensor in tensors if tensor["flags"] & 2}  # an output
    outputs = [node["xnode_union"]["output_id"] for node in graph["xnodes"] if node["xnode_union_type"] == "XNNAdd"]
    return [external[output] for output in outputs if output in external]


def _is_like(plan: Any, value: int, like: Any) -> bool:
    tensor = plan.values[value].val
    return list(tensor.sizes) == list(like.sizes) and tensor.scalar_type == like.scalar_type


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
    """At most, of a call in which no dynamic length is above `length`. Planned sizes are those of the longest call."""
    tokens, *_, rows = (plan.values[value].val for value in plan.inputs)
    bounds = (tokens.sizes[1], rows.sizes[0])
    values = [value for i in plan.chains[0].instructions for value in getattr(i.instr_args, "args", [])]
    total = 0
    for tensor in (plan.values[value].val for value in [*values, *plan.outputs]):
        if type(tensor).__name__ == "Tensor":
            n = math.prod(tensor.sizes)
            bound = next((bound for bound in bounds if bound in tensor.sizes), None)
            if bound is not None and tensor.shape_dynamism != 0:  # in one dimension
                n = n // bound * length
            total += n * (8 if tensor.scalar_type.name in ("LONG", "DOUBLE") else 4) + ALIGNED
    return total


def _record(pte: Path, sequences: tuple[Sequence, ...], n_bytes: int, folder: Path) -> None:
    calls = folder / "calls.json"
    calls.write_text(json.dumps([_plain(call) for sequence in sequences for call in sequence.calls]))
    command = [sys.executable, "-m", "runtime.trace", str(pte.resolve()), str(calls), str(n_bytes), str(folder)]
    # Where this package was found, the child finds it.
    root = str(Path(__file__).resolve().parent.parent)
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=root, check=False)
    if child.returncode < 0:
        raise TraceError(f"{pte}: the runtime crashed ({signal.Signals(-child.returncode).name}) while recording it")
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise TraceError(f"{pte}: cannot be recorded: {lines[-1]}")


def _plain(call: Call) -> dict[str, Any]:
    return vars(call) | {"tokens": call.tokens.tolist(), "rows": call.rows.tolist()}


def _read(pte: Path, sequences: tuple[Sequence, ...], places: Places, folder: Path) -> Trace:
    file = folder / TENSORS_FILE
    record = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    runs = [_tensors(run) for run in _etdump(folder)["run_data"] if run["name"] == "Execute"]
    n_calls = sum(len(sequence.calls) for sequence in sequences)
    if len(runs) != n_calls:
        raise TraceError(f"{pte}: recorded {len(runs)} calls of {n_calls}")

    def load(place: tuple[int, int], run: dict[int, list[dict[str, Any]]]) -> Tensor:
        instruction, position = place
        entry = run[instruction][position]
        dtype = DTYPES[entry["scalar_type"]]
        n_bytes = math.prod(entry["sizes"]) * dtype.itemsize
        return record[entry["offset"] : entry["offset"] + n_bytes].clone().view(dtype).view(entry["sizes"])

    def of_all(place: tuple[int, int], *shape: int) -> Tensor:
        return torch.cat([load(place, run).view(1, -1, *shape) for run in runs], dim=1)

    try:
        D = load(places.x[0], runs[0]).shape[-1]
        return Trace(
            sequences=sequences,
            x_1ND=tuple(of_all(place, D) for place in places.x),
            k_1NGd=tuple(of_all(place, *places.cache_shape) for place in places.k),
            v_1NGd=tuple(of_all(place, *places.cache_shape) for place in places.v),
            logits=tuple(load(places.logits, run)[0].float() for run in runs),
        )
    except (KeyError, IndexError, RuntimeError) as error:
        raise TraceError(f"{pte}: its record is not of its instructions: {type(error).__name__}: {error}") from error


def _tensors(run: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """What each instruction recorded, in order: of a kernel its output, of a delegate all its arguments."""
    found = defaultdict(list)
    for event in run["events"]:
        debug = event.get("debug_event")
        if debug is not None and debug["chain_index"] == 0 and "tensor" in debug["debug_entry"]:
            found[debug["instruction_id"]].append(debug["debug_entry"]["tensor"])
    return dict(found)


def _etdump(folder: Path) -> dict[str, Any]:
    """As executorch's schema decodes it; its own reader takes pandas and seconds."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    schema = executorch_folder() / "devtools" / "etdump" / "etdump_schema_flatcc.fbs"
    _flatc_decompile(str(folder), str(schema), str(folder / ETDUMP_FILE), ["--size-prefixed"])
    decoded: dict[str, Any] = json.loads((folder / ETDUMP_FILE).with_suffix(".json").read_text())
    return decoded


def main() -> None:
    pte, calls_file, n_bytes, folder = sys.argv[1:]
    try:
        program = executorch_runtime().load_program(Path(pte), enable_etdump=True, debug_buffer_size=int(n_bytes))
        forward = program.load_method("forward")
        for call in json.loads(Path(calls_file).read_text()):
            numbers = (call["tokens"], call["start_pos"], call["kv_len"], call["rows"])
            tokens, start_pos, kv_len, rows = (torch.tensor(number).view(-1) for number in numbers)
            forward.execute((tokens[None], start_pos, kv_len, rows))
        program.write_etdump_result_to_file(str(Path(folder, ETDUMP_FILE)), str(Path(folder, TENSORS_FILE)))
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
