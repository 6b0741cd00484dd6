"""What is really inside a `.pte`, read back from its bytes: operators, delegates, weights, memory plan."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.limits import LimitError, limited
from runtime.program import ProgramError, without_exporter

T = TypeVar("T")

MEMORY = 2**29  # bytes that taking any program apart may take
PADDING = 15  # most zeros between two constants of a program: it aligns them to 16 bytes


@dataclass(frozen=True)
class LinearWeight:
    """Weight of one linear layer inside a delegate. datatype: XNNPACK's name; n_bytes: with its scales."""

    datatype: str
    shape: tuple[int, int]
    n_bytes: int
    input_datatype: str


@dataclass(frozen=True)
class ProgramFormat:
    """operators: calls outside delegates, by name. planned_memory: bytes of each planned arena.

    constants: size by the sha256 of each constant's bytes, in delegates and outside.
    """

    operators: dict[str, int]
    delegates: tuple[str, ...]
    delegated_ops: dict[str, int]
    linears: tuple[LinearWeight, ...]
    planned_memory: tuple[int, ...]
    constants: dict[str, int]


def read_format(pte: Path) -> ProgramFormat:
    """In a process of its own, as the file may hold anything. Raises `ProgramError` if it cannot be taken apart."""
    return _apart(pte, _format)


def read_plan(pte: Path) -> tuple[Any, dict[int, dict[str, Any]]]:
    """What `forward` does, in executorch's schema, and the graph inside each XNNPACK delegate by its index there.

    As `read_format`.
    """
    return _apart(pte, _plan)


def _apart(pte: Path, work: Callable[[Path], T]) -> T:
    try:
        with tempfile.TemporaryDirectory() as folder:
            size = pte.stat().st_size
            n_bytes = MEMORY + 8 * _program_size(pte) + 3 * size
            return limited(300 + size // 2**24, n_bytes, _take_apart, pte, folder, work)
    except LimitError as error:
        raise ProgramError(f"{pte}: cannot be taken apart: {error}") from error


def _program_size(pte: Path) -> int:
    """Bytes of the file's part that is read as a whole; the weights follow it."""
    with without_exporter():
        from executorch.exir._serialize._program import _get_extended_header

    header = _get_extended_header(_read(pte, 0, 64))
    return min(header.program_size, pte.stat().st_size) if header is not None and header.is_valid() else 0


def _take_apart(pte: Path, folder: str, work: Callable[[Path], T]) -> T:
    """folder: for what executorch writes meanwhile."""
    tempfile.tempdir = folder
    try:
        with without_exporter():
            return work(pte)
    except (ProgramError, MemoryError):
        raise
    except Exception as error:
        raise ProgramError(f"{pte}: cannot be taken apart: {type(error).__name__}: {error}") from error


def _plan(pte: Path) -> tuple[Any, dict[int, dict[str, Any]]]:
    program, segments, plan = _decoded(pte)
    return plan, _graphs(pte, program, segments, plan)


def _format(pte: Path) -> ProgramFormat:
    program, segments, plan = _decoded(pte)
    operators: Counter[str] = Counter()
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if type(call).__name__ == "KernelCall":
                operator = plan.operators[call.op_index]
                operators[f"{operator.name}.{operator.overload}".rstrip(".")] += 1
    graphs = list(_graphs(pte, program, segments, plan).values())
    constants = {hashlib.sha256(buffer.storage).hexdigest(): len(buffer.storage) for buffer in program.constant_buffer}
    if program.constant_segment and program.constant_segment.offsets:
        start, length = segments[program.constant_segment.segment_index]
        ends = [*program.constant_segment.offsets[1:], length]
        for begin, end in zip(program.constant_segment.offsets, ends, strict=True):
            constants |= _sha256(pte, start + begin, end - begin, PADDING)
    for data in program.named_data or []:
        constants |= _sha256(pte, *segments[data.segment_index])
    return ProgramFormat(
        operators=dict(sorted(operators.items())),
        delegates=tuple(delegate.id for delegate in plan.delegates),
        delegated_ops=dict(
            sorted(Counter(n["xnode_union_type"].removeprefix("XNN") for g in graphs for n in g["xnodes"]).items())
        ),
        linears=tuple(weight for graph in graphs for weight in _linear_weights(graph)),
        planned_memory=tuple(plan.non_const_buffer_sizes[1:]),  # the first is reserved and empty
        constants=constants,
    )


def _decoded(pte: Path) -> tuple[Any, list[tuple[int, int]], Any]:
    """(the program, offset and size of its segments in the file, the plan of `forward`)."""
    # The only private parts of executorch that we touch: it offers no public reader of a .pte.
    from executorch.exir._serialize._program import _flatbuffer_to_program, _get_extended_header

    size = pte.stat().st_size
    header = _get_extended_header(_read(pte, 0, min(size, 64)))
    if header is None or not header.is_valid():
        raise ProgramError(f"{pte}: not an ExecuTorch program")
    program = _flatbuffer_to_program(_read(pte, 0, min(size, header.program_size)))
    segments = [(header.segment_base_offset + s.offset, s.size) for s in program.segments]
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    return program, segments, plan


def _graphs(pte: Path, program: Any, segments: list[tuple[int, int]], plan: Any) -> dict[int, dict[str, Any]]:
    from executorch.exir.schema import DataLocation

    graphs = {}
    for index, delegate in enumerate(plan.delegates):
        if delegate.id == "XnnpackBackend":
            at = delegate.processed.index
            is_segment = delegate.processed.location == DataLocation.SEGMENT
            payload = _read(pte, *segments[at]) if is_segment else program.backend_delegate_data[at].data
            graphs[index] = _xnnpack_graph(bytes(payload))
    return graphs


def _read(file: Path, offset: int, n_bytes: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(n_bytes)


def _sha256(file: Path, offset: int, n_bytes: int, padding: int = 0) -> dict[str, int]:
    """With its size. In chunks: the weights of a large program do not fit the memory twice.

    padding: up to so many zeros at the end may not belong to it. The sha256 without each number of them is given too.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(offset)
        left = n_bytes - min(padding, n_bytes)
        while left > 0:
            chunk = opened.read(min(left, 2**22))
            if not chunk:
                raise ProgramError(f"{file}: ends early")
            digest.update(chunk)
            left -= len(chunk)
        end = opened.read(min(padding, n_bytes))
    found = {}
    for n in range(len(end.rstrip(b"\0")), len(end) + 1):
        ended = digest.copy()
        ended.update(end[:n])
        found[ended.hexdigest()] = n_bytes - len(end) + n
    return found


def _xnnpack_graph(payload: bytes) -> dict[str, Any]:
    """The delegate's own flatbuffer, as executorch's schema and compiler decode it."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(bytes(payload[: XNNHeader.EXPECTED_LENGTH]))
    if not header.is_valid():
        raise ProgramError("a delegate without an XNNPACK header")
    with tempfile.TemporaryDirectory() as folder:
        schema, graph = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(_get_schema_bytes())
        graph.write_bytes(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(graph), ["--raw-binary"])
        decoded: dict[str, Any] = json.loads(Path(folder, "graph.json").read_text())
    return decoded


def _linear_weights(graph: dict[str, Any]) -> list[LinearWeight]:
    values: dict[int, dict[str, Any]] = {}
    quants: dict[int, dict[str, Any]] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        values[tensor["id_out"]] = tensor
        quants[tensor["id_out"]] = union.get("quant_params", {})
    weights = []
    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        tensor, quant = (table[node["xnode_union"]["filter_id"]] for table in (values, quants))
        n_bytes = graph["constant_data"][tensor["constant_buffer_idx"]]["size"]
        if quant.get("scale_buffer_idx"):
            n_bytes += graph["constant_data"][quant["scale_buffer_idx"]]["size"]
        n_bytes += 4 * len(quant.get("scale") or [])
        out_features, in_features = tensor["dims"]
        weights.append(
            LinearWeight(
                datatype=tensor["datatype"].removeprefix("xnn_datatype_"),
                shape=(out_features, in_features),
                n_bytes=n_bytes,
                input_datatype=values[node["xnode_union"]["input1_id"]]["datatype"].removeprefix("xnn_datatype_"),
            )
        )
    return weights


@dataclass(frozen=True)
class ExpectedFormat:
    """What a recipe promises of its program for a model of these sizes.

    weight_types: XNNPACK datatypes of the linear weights, empty without a delegate. outside_ops: what may run
    outside the delegate, empty if anything may. linear_shapes: (out, in) of every linear layer. helper_shapes:
    of the float filters that the exported form adds. weights: by parameter, the sha256 that its bytes may have.
    planned_memory: bytes. metadata: the constant methods.
    """

    weight_types: tuple[str, ...]
    outside_ops: tuple[str, ...]
    linear_shapes: tuple[tuple[int, int], ...]
    helper_shapes: tuple[tuple[int, int], ...]
    weights: dict[str, list[str]]
    bytes_per_weight: float
    planned_memory: float
    metadata: dict[str, Any]
