"""What executorch 1.5's XNNPACK lowering does not offer, each a small adaptation that holds only inside a `with`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import recipes.exporter  # noqa: F401 - first

# isort: split
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from executorch.backends.xnnpack.partition.config import xnnpack_config
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import ConstantDataOffset
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import CONSTANT_TENSOR_ALIGNMENT
from executorch.backends.xnnpack.utils.utils import get_param_tensor, is_param_node
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.nn import Parameter

from model.pages import release
from recipes import shapes  # noqa: F401 - its kernels make every pass faster
from recipes.regions import Region
from recipes.stored import Weights

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
def adapted_lowering(weights: Weights | None = None) -> Iterator[None]:
    """Delegates that take tensors as long as `kv_len`, and quantize an activation once; made in fewer passes.

    weights: of the model, if they are on disk. Then no copy of them is ever in memory.
    """
    with (
        # The partitioner leaves out lengths that are read from a tensor, for they might be 0: kv_len never is.
        patch.object(xnnpack_config, "has_free_unbacked_symbols", lambda _: False),
        patch.object(
            xnnpack_preprocess.XnnpackBackend, "copy_exported_program_for_preprocess", copy_without_duplicates
        ),
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", passes_for_dream),
        # Reads the sources of all its callers, to warn of a way to lower that is not ours.
        patch.object(XnnpackPartitioner, "_check_if_called_from_to_backend", lambda _: False),
        left_on_disk(weights) if weights is not None and weights.regions else nullcontext(),
    ):
        yield


@contextmanager
def left_on_disk(weights: Weights) -> Iterator[None]:
    """Linear weights go into the `.pte` straight from their files, and no weight is copied in memory.

    executorch copies all weights of all partitions before it packs the first, packs with several temporaries of a
    whole matrix, and keeps the packed bytes until the end: 14 GB for the 7B shape.
    """
    matrices = {name: region for name, region in weights.regions.items() if not name.endswith(".scale")}
    regions = {_address(weights.model.get_parameter(name).data): region for name, region in matrices.items()}
    scales = {
        matrices[name].sha256: parameter.data.scale  # type: ignore[attr-defined]
        for name, parameter in weights.model.named_parameters()
        if name in matrices and f"{name}.scale" in weights.regions
    }
    by_sha256 = {region.sha256: region for region in weights.regions.values()}
    kept = set().union(*(_addresses(parameter.data) for parameter in weights.model.parameters()))
    serialize, add_named_data = NodeVisitor.get_serialized_buffer_index, NamedDataStore.add_named_data

    asked: set[str] = set()

    def kept_or(copy_tensor: Callable[[Tensor, Any], Any]) -> Callable[[Tensor, Any], Any]:
        return lambda tensor, memo: tensor if _addresses(tensor) & kept else copy_tensor(tensor, memo)

    def serialize_region(
        visitor: NodeVisitor,
        tensor: Node,
        xnn_graph: Any,
        vals_to_ids: Any,
        convert_to_nhwc: bool,
        swap_in_out_for_weights: bool,
        quant_params: Any,
        *rest: Any,
        **options: Any,
    ) -> int:
        node = tensor if quant_params is None else quant_params.q_input
        program = visitor.exported_program
        value = get_param_tensor(program, node) if is_param_node(program, node) else None
        region = regions.get(_address(value)) if value is not None else None
        if region is None:
            arguments = (tensor, xnn_graph, vals_to_ids, convert_to_nhwc, swap_in_out_for_weights, quant_params)
            index: int = serialize(visitor, *arguments, *rest, **options)
            return index
        # What is on disk is a matrix [out, in] as XNNPACK's fully connected operator takes it.
        asked.add(region.sha256)
        if convert_to_nhwc or swap_in_out_for_weights:
            raise RuntimeError(f"{region.file}: the delegate wants {tensor} in another order than it was stored")
        xnn_graph.constant_data.append(
            ConstantDataOffset(offset=UINT64_MAX, size=region.n_bytes, named_key=region.sha256)
        )
        visitor._named_data_store.add_named_data(region.sha256, b"", alignment=CONSTANT_TENSOR_ALIGNMENT)
        if region.sha256 in scales:
            release(scales[region.sha256])  # executorch has read them, to name them
        return len(xnn_graph.constant_data) - 1

    def add_region(store: Any, key: str, data: Any, *rest: Any, **options: Any) -> None:
        """Scales are named by their sha256."""
        region = by_sha256.get(key.removeprefix("scale_"))
        add_named_data(store, key, RegionData(region) if region is not None else data, *rest, **options)

    with (
        patch.object(NamedDataStore, "add_named_data", add_region),
        patch.object(Tensor, "__deepcopy__", kept_or(Tensor.__deepcopy__)),
        patch.object(Parameter, "__deepcopy__", kept_or(Parameter.__deepcopy__)),
        patch.object(NodeVisitor, "get_serialized_buffer_index", serialize_region),
    ):
        yield
    # Integers that were never filled in must not have gone anywhere else.
    if missed := [name for name in weights.packed if weights.regions[name].sha256 not in asked]:
        raise RuntimeError(f"the delegate did not take {', '.join(missed[:4])}")


class RegionData(FileBackedData):  # type: ignore[misc]
    """A region of a file where executorch knows only whole files. Nothing of it is read before it is written."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __len__(self) -> int:
        return self._region.n_bytes

    def prefix(self, size: int) -> bytes:
        return next(self._region.chunks())[:size]

    def sha256(self) -> bytes:
        return bytes.fromhex(self._region.sha256)

    def to_bytes(self) -> bytes:
        return b"".join(self._region.chunks())

    def write_to_file(self, outfile: Any) -> None:
        for chunk in self._region.chunks():
            outfile.write(chunk)

    def close(self) -> None:
        """The region is not ours."""


def _addresses(tensor: Tensor) -> set[int]:
    """Of the memory of a tensor, or of torchao's parts of it; of fake ones nothing."""
    if hasattr(tensor, "tensor_data_names"):
        return {_address(getattr(tensor, name)) for name in tensor.tensor_data_names}
    return {_address(tensor)} if type(tensor) in (Tensor, Parameter) and not tensor.is_meta else set()


def _address(tensor: Tensor) -> int:
    tensor = getattr(tensor, "qdata", tensor)
    return tensor.data_ptr()


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
