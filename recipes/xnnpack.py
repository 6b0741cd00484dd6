"""What executorch 1.5's XNNPACK lowering does not offer, each a small adaptation that holds only inside a `with`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack.partition.config import xnnpack_config
from torch.export import ExportedProgram
from torch.fx import Graph, Node

# Rewrites of operators that Dream does not have. Each would trace every delegate anew, and change nothing.
PASSES_OF_OTHER_NETWORKS = (
    "ConvertToUpsampleBilinear2d",
    "ConvertToSDPAPass",
    "FuseBatchNormPass",
    "DecomposeBatchNorm",
    "FuseActivationPass",
    "DecomposeConcatenate",
    "InsertPadQDQPass",
    "Conv1dUnsqueezePass",
    "PReLUReshapePass",
    "ChannelsLastTaggedReshapePass",
)


@contextmanager
def adapted_lowering() -> Iterator[None]:
    """Delegates that take tensors as long as `kv_len`, and quantize an activation once; made in fewer passes."""
    with (
        # The partitioner leaves out lengths that are read from a tensor, for they might be 0: kv_len never is.
        patch.object(xnnpack_config, "has_free_unbacked_symbols", lambda _: False),
        patch.object(
            xnnpack_preprocess.XnnpackBackend, "copy_exported_program_for_preprocess", copy_without_duplicates
        ),
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", passes_for_dream),
    ):
        yield


def copy_without_duplicates(program: ExportedProgram, _compile_specs: Any) -> ExportedProgram:
    """The copy of a partition that the backend works on.

    torchao writes a quantization of its own for each linear layer, though q, k, v share their input, as do gate
    and up. Merged any earlier, what they share would be cut off into delegates of its own.
    """
    program = copy.deepcopy(program)
    merge_duplicates(program.graph)
    return program


def merge_duplicates(graph: Graph) -> None:
    """Nodes that compute the same, in a graph without side effects, as a delegate's is."""
    first: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            same = first.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def passes_for_dream(program: ExportedProgram, passes: Any = None) -> Any:
    manager = XNNPACKPassManager(program, passes)
    manager.passes = [p for p in manager.passes if p.__name__ not in PASSES_OF_OTHER_NETWORKS]
    return manager
