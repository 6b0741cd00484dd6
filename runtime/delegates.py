"""The matrices that the XNNPACK delegates of a `.pte` multiply by, read from the file alone: no exporter is imported.

Numbers of fields, types and places are those of executorch's schema/program.fbs, and of schema.fbs and XNNHeader in
its backends/xnnpack/serialization.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.flatbuffer import Buffer, Table, number

BACKEND = "XnnpackBackend"
SEGMENT = 1  # of DataLocation
FULLY_CONNECTED, QUANTIZED = 2, 2  # of XNodeUnion and XValueUnion
# By XNNQuantParams: the fields of its numbers, and of the index of its scales.
NUMBERS, SCALES = {1: (1,), 2: (0, 1), 3: (0,), 4: (1, 2)}, {1: 2, 4: 4}


@dataclass(frozen=True)
class Constant:
    """same_as: equal for the same bytes. An unnamed one is in the delegate itself."""

    same_as: object
    is_named: bool


@dataclass(frozen=True)
class Delegate:
    """start, size: of all that the exporter made for it, in the file."""

    graph: Table
    start: int
    size: int
    constants: tuple[Constant, ...]


@dataclass(frozen=True)
class Matrix:
    """Named weights [out, in] of a fully connected node.

    name: by which the runtime keeps what it packed of them: that of the weights, with that of the bias.
    packed_by: all else that decides how they are packed: scales, types, shapes.
    """

    shape: tuple[int, ...]
    name: tuple[object, ...]
    packed_by: tuple[object, ...]


def named_data(data: Buffer) -> dict[str, int]:
    """The segment of each name. Two names of one segment have the same bytes."""
    return {entry.text(0): entry.number(1) for entry in Table.root(data, 0).tables(7)}


def segments(data: Buffer) -> list[tuple[int, int]]:
    """(start, bytes) of each in the file."""
    base = number(data, "Q", 24)
    return [(base + entry.number(0, "Q"), entry.number(1, "Q")) for entry in Table.root(data, 0).tables(4)]


def delegates(data: Buffer) -> Iterator[Delegate]:
    """Of all methods. These functions raise `ValueError` or `struct.error` for a file that is no such program."""
    names, places = named_data(data), segments(data)
    for plan in Table.root(data, 0).tables(1):
        for delegate in plan.tables(7):
            if delegate.text(0) != BACKEND:
                continue
            processed = delegate.table(1)
            if processed is None or processed.number(0, "b") != SEGMENT:
                raise ValueError("a delegate in no segment")
            yield _delegate(data, *places[processed.number(1)], names)


def _delegate(data: Buffer, start: int, size: int, names: dict[str, int]) -> Delegate:
    if data[start + 4 : start + 8] != b"XH00":
        raise ValueError("a delegate without an XNNPACK header")
    graph = Table.root(data, start + number(data, "I", start + 10))
    constants = []
    for entry in graph.tables(8):
        if name := entry.text(2):
            constants.append(Constant(names.get(name, name), True))
        else:
            place = start + number(data, "I", start + 18) + entry.number(0, "Q")
            constants.append(Constant(data[place : place + entry.number(1, "Q")], False))
    return Delegate(graph, start, size, tuple(constants))


def matrices(data: Buffer) -> Iterator[Matrix]:
    """As often as each is used. Those without a name are packed for each delegate, and never kept."""
    for delegate in delegates(data):
        values = {}
        for value in delegate.graph.tables(2):
            union = value.table(1)
            is_quantized = value.number(0, "B") == QUANTIZED
            tensor = union.table(0) if union is not None and is_quantized else union
            if tensor is not None:
                values[tensor.number(6)] = (tensor, union if is_quantized else None)
        for node in delegate.graph.tables(1):
            product = node.table(1)
            if node.number(0, "B") != FULLY_CONNECTED or product is None:
                continue
            input_id, weights_id, bias_id = map(product.number, (0, 1, 2))
            weights = values[weights_id][0]
            if not delegate.constants[weights.number(3)].is_named:
                continue
            name: list[object] = []
            packed_by: list[object] = [product.number(4), values[input_id][0].number(0, "h")]
            for tensor, quantized in (values[i] for i in (weights_id, bias_id) if i in values):
                constant = delegate.constants[tensor.number(3)]
                name += [constant.same_as] if constant.is_named else []
                packed_by += [tensor.number(0, "h"), tensor.content(2, 4), _quantization(delegate, quantized)]
            out_in = weights.content(2, 4)
            yield Matrix(struct.unpack(f"<{len(out_in) // 4}I", out_in), tuple(name), tuple(packed_by))


def _quantization(delegate: Delegate, quantized: Table | None) -> tuple[object, ...]:
    if quantized is None or (parameters := quantized.table(2)) is None:
        return ()
    kind = quantized.number(1, "B")
    numbers = [parameters.number(field) for field in NUMBERS[kind]]
    if kind not in SCALES:
        return (kind, *numbers)
    index = parameters.number(SCALES[kind])
    return (kind, *numbers, delegate.constants[index].same_as if index else parameters.content(0, 4))
