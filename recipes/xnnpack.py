"""What executorch 1.5's XNNPACK lowering does not offer, each a small adaptation that holds only inside a `with`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from executorch.backends.xnnpack.partition.config import xnnpack_config
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from torch.export import ExportedProgram
from torch.fx import Graph, Node


@contextmanager
def adapted_lowering() -> Iterator[None]:
    """One delegate quantizes an activation once, and takes tensors as long as `kv_len`."""
    with (
        patch.object(XnnpackBackend, "copy_exported_program_for_preprocess", _copy_without_duplicates),
        # The partitioner leaves out lengths that are read from a tensor, for they might be 0: kv_len never is.
        patch.object(xnnpack_config, "has_free_unbacked_symbols", lambda _: False),
    ):
        yield


def _copy_without_duplicates(program: ExportedProgram, _compile_specs: Any) -> ExportedProgram:
    """The copy that the backend gets of one partition.

    torchao writes a quantization of its own for each linear layer: q, k, v and gate, up share theirs. Merged any
    earlier, what they share would be cut off into delegates of its own.
    """
    program = copy.deepcopy(program)
    _merge_duplicates(program.graph)
    return program


def _merge_duplicates(graph: Graph) -> None:
    """Nodes that compute the same: an XNNPACK delegate holds no operator that has side effects."""
    first: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            same = first.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
