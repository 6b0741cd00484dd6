"""The delegates of a program, made of its partitions when all else is known: of layers that were left out, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import recipes.exporter  # noqa: F401 - first

# isort: split
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.backend_details import CompileSpec, PreprocessResult
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram

NUMBERED = re.compile(r"\b(layers|caches)\.(\d+)\.")  # in the name of a tensor


class UnlikeError(Exception):
    """Equal layers became different."""


@dataclass(frozen=True)
class Delegate:
    """How to make one: a partition after XNNPACK's passes, where layers get other numbers (renumbered), and all nodes
    come `later` in the program, by executorch's debug handles."""

    partition: ExportedProgram
    renumbered: dict[int, int] = field(default_factory=dict)
    later: int = 0


@contextmanager
def partitions_kept() -> Iterator[list[ExportedProgram]]:
    """Yields what will be the delegates' partitions, in order, as XNNPACK's passes leave them.

    Delegates are left empty: `unrolled` makes them.
    """
    kept: list[ExportedProgram] = []
    manager = xnnpack_preprocess.XNNPACKPassManager

    def keeping(program: ExportedProgram, passes: Any = None) -> Any:
        def transform() -> ExportedProgram:
            kept.append(manager(program, passes).transform())
            return kept[-1]

        return SimpleNamespace(transform=transform)

    with (
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", keeping),
        patch.object(xnnpack_preprocess, "get_node_visitors", lambda *_: _Passers()),
    ):
        yield kept


class _Passers(dict[str, Any]):
    """In place of what writes the nodes of a delegate."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(define_node=lambda *_: None)


def lowered(delegate: Delegate, like: LoweredBackendModule, tensors: Mapping[str, Tensor]) -> LoweredBackendModule:
    specs = like.compile_specs
    result = processed(delegate, specs, tensors)
    made = LoweredBackendModule(
        like.original_module, like.backend_id, result.processed_bytes, specs, result.data_store_output
    )
    made.meta = like.meta
    return made


def processed(delegate: Delegate, specs: list[CompileSpec], tensors: Mapping[str, Tensor]) -> PreprocessResult:
    partition, state = delegate.partition, {}
    for name, tensor in partition.state_dict.items():
        target = of_layer(name, delegate.renumbered)
        if target not in tensors and target != name:
            raise UnlikeError(f"there is no {target} as there is {name}")
        state[name] = tensor if target == name else tensors[target]
    nodes = [node for node in partition.graph.nodes if "debug_handle" in node.meta]
    handles = [node.meta["debug_handle"] for node in nodes]
    program = ExportedProgram(
        root=partition.graph_module,
        graph=partition.graph,
        graph_signature=partition.graph_signature,
        state_dict=state,
        range_constraints=partition.range_constraints,
        module_call_graph=partition.module_call_graph,
        constants=partition.constants,
        verifiers=[partition.verifier],
    )
    try:
        for node, handle in zip(nodes, handles, strict=True):
            node.meta["debug_handle"] = handle + delegate.later
        with patch.object(xnnpack_preprocess, "XNNPACKPassManager", _none_left):
            return XnnpackBackend.preprocess(program, specs)
    finally:
        for node, handle in zip(nodes, handles, strict=True):
            node.meta["debug_handle"] = handle


def _none_left(program: ExportedProgram, **_: Any) -> Any:
    """In place of XNNPACK's passes."""
    return SimpleNamespace(transform=lambda: program)


def first_handle(partition: ExportedProgram) -> int:
    return min(node.meta["debug_handle"] for node in partition.graph.nodes if node.op == "call_function")


def of_layer(target: str | None, renumbered: dict[int, int]) -> str:
    return NUMBERED.sub(lambda found: f"{found[1]}.{renumbered.get(int(found[2]), found[2])}.", target or "")
