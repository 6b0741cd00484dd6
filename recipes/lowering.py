"""Lowering: an exported program to the bytes that a device loads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.export import ExportedProgram

from recipes.exporter import garbage_of_now_only, without_stack_traces  # first

# isort: split
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)

from recipes.equal_layers import LeftOut, tensors_of
from recipes.options import Backend
from recipes.partitions import partitions_kept
from recipes.retracing import decomposed_once, shapes_computed_once
from recipes.stored import Weights
from recipes.unrolling import unrolled
from recipes.xnnpack import adapted_lowering


@garbage_of_now_only()
def lower_program(
    exported: ExportedProgram,
    backend: Backend,
    constant_methods: dict[str, Any],
    weights: Weights | None = None,
    began: Callable[[str], None] = lambda _: None,
    left_out: LeftOut | None = None,
) -> ExecutorchProgramManager:
    """The program, ready to be written with `write_to_file`. weights: those on disk stay there until then.

    began: is told what is done now. left_out: layers that are not in `exported`. Raises `UnlikeError` if they cannot be
    put back.
    """
    # Without a partitioner the two decompositions are not the same as one: nodes would come in another order.
    once = decomposed_once() if backend is Backend.xnnpack else nullcontext()
    runs = left_out.runs if left_out is not None else []
    config = EdgeCompileConfig(_check_ir_validity=False)
    with warnings.catch_warnings(), without_stack_traces(), adapted_lowering(weights), shapes_computed_once(), once:
        warnings.simplefilter("ignore")  # hundreds of deprecations of torch and executorch among themselves
        began("delegates")
        kept: AbstractContextManager[list[ExportedProgram]] = partitions_kept() if runs else nullcontext([])
        with kept as partitions:
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=[XnnpackPartitioner()] if backend is Backend.xnnpack else None,
                constant_methods=constant_methods,
                # The verifier knows only core aten operators, not executorch's own cache and attention.
                compile_config=config,
            )
        if left_out is not None and runs:
            began("equal layers")
            whole = unrolled(edge.exported_program(), partitions, runs, tensors_of(left_out.program))
            edge = EdgeProgramManager(whole, constant_methods, config)
        began("memory plan")
        # Without the fusion a quantized embedding would be dequantized whole at each call.
        return edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
