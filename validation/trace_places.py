"""Where in a program's own instructions each layer's stream, keys and values are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.program import ProgramError

# Operators that keep keys and values: which arguments are the cache and what is written to it.
CACHE_WRITES = {"llama::update_cache": (1, 0), "aten::index_put": (0, 2)}


# Operators that give numbers, or views: they record nothing.
UNRECORDED = ("aten::sym_size", "aten::_local_scalar_dense", "executorch_prim::")


# Where a run records a tensor: (instruction, which of the tensors that it records).
Place = tuple[int, int]


class TraceError(ProgramError):
    """A program whose layers cannot be told apart, or that cannot be recorded."""


@dataclass(frozen=True)
class Places:
    """Of what a `Trace` holds, by layer. cache_shape: (kv heads, head_dim)."""

    x: list[Place]
    k: list[Place]
    v: list[Place]
    cache_shape: tuple[int, int]


def find_places(pte: Path, plan: Any, graphs: dict[int, dict[str, Any]]) -> Places:
    """From the program's own instructions, never by what the numbers look like.

    The residual stream is the embedding, and after it each sum of its shape and type: no norm or product is one. Keys
    and values are what the caches are given; of the two caches of a layer the keys' is the first.
    """
    stream: Place | None = None
    like: Any = None
    views: dict[int, int] = {}
    recorded: dict[int, Place] = {}
    writes: list[tuple[int, int, Place | None]] = []  # (cache, what is written to it, the stream before)
    for i, instruction in enumerate(plan.chains[0].instructions):
        call = instruction.instr_args
        for j, value in enumerate(recorded_values(plan, call)):
            recorded.setdefault(value, (i, j))
        if is_delegate(call):
            for j in _sums(graphs.get(call.delegate_index)):
                stream = (i, j) if like is not None and _is_like(plan, call.args[j], like) else stream
        elif type(call).__name__ == "KernelCall":
            name, out = plan.operators[call.op_index].name, call.args[-1]
            if name == "executorch_prim::et_view":
                views[out] = views.get(call.args[0], call.args[0])
            elif "::embedding" in name:
                stream, like = (i, 0), plan.values[out].val
            elif name == "aten::add" and like is not None and _is_like(plan, out, like):
                stream = (i, 0)
            elif name in CACHE_WRITES:
                cache, written = (call.args[at] for at in CACHE_WRITES[name])
                writes.append((cache, views.get(written, written), stream))
    layers = [sorted(writes[i : i + 2], key=lambda write: write[0]) for i in range(0, len(writes), 2)]
    if not layers or len(writes) % 2 or any(x is None or value not in recorded for _, value, x in writes):
        raise TraceError(f"{pte}: its layers cannot be told apart: it writes to its caches {len(writes)} times")
    return Places(
        x=[stream for (_, _, stream), _ in layers if stream is not None],
        k=[recorded[value] for (_, value, _), _ in layers],
        v=[recorded[value] for _, (_, value, _) in layers],
        cache_shape=tuple(plan.values[writes[0][0]].val.sizes[2:]),
    )


def recorded_values(plan: Any, call: Any) -> list[int]:
    """The values that a run records of an instruction: of a delegate all arguments, of a kernel its output."""
    if is_delegate(call):
        return list(call.args)
    if type(call).__name__ != "KernelCall" or plan.operators[call.op_index].name.startswith(UNRECORDED):
        return []
    return [call.args[-1]]


def is_delegate(call: Any) -> bool:
    return type(call).__name__ == "DelegateCall"


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


def sizes_at(plan: Any, tensor: Any, length: int) -> list[int]:
    """Of a tensor whose one dynamic dimension, if it has one, is `length`: those planned are of the longest call."""
    tokens, *_, rows = (plan.values[value].val for value in plan.inputs)
    sizes = list(tensor.sizes)
    for bound in (tokens.sizes[1], rows.sizes[0]):
        if tensor.shape_dynamism != 0 and bound in sizes:
            sizes[sizes.index(bound)] = length
            break
    return sizes
