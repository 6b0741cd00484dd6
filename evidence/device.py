"""What a device needs to run a program: a runtime that reads it, delegates, kernels by library, and memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.delegates import BACKEND
from runtime.flatbuffer import Table

if TYPE_CHECKING:
    from validation.format import ProgramFormat

# Runtimes that gave the bits of this one on every recorded call (docs/runtimes.json), by whether a delegate multiplies:
# the kernels of 1.4.1 sum otherwise.
TRIED = {True: ("1.4.1", "1.5.0", "1.5.1"), False: ("1.5.0", "1.5.1")}

# Libraries of executorch's wheel, and where the custom operators of its LLM extension are: in no library of it.
RUNTIME, KERNELS, QUANTIZED = "executorch", "executorch_kernels_optimized", "executorch_kernels_quantized"
CUSTOM = "extension/llm/custom_ops"
BY_NAMESPACE = {"executorch_prim": RUNTIME, "quantized_decomposed": QUANTIZED, "llama": CUSTOM}
IN_THE_RUNTIME = ("aten::_local_scalar_dense", "aten::sym_size.int")
DELEGATES = {BACKEND: "executorch_backend_xnnpack"}


def device_needs(pte: Path, found: ProgramFormat) -> dict[str, Any]:
    """As the program says; how much memory it takes is measured, and so in the manifest's `run`."""
    operators: dict[str, list[str]] = {}
    for operator in found.operators:
        operators.setdefault(library_of(operator), []).append(operator)
    with pte.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        identifier, version = data[4:8].decode("ascii", "replace"), Table.root(data, 0).number(0)
    return {
        "file_identifier": identifier,
        "program_schema": version,
        "runtimes": list(TRIED[bool(found.delegates)]),
        "delegates": sorted(set(found.delegates)),
        "operators": dict(sorted(operators.items())),
    }


def library_of(operator: str) -> str:
    return RUNTIME if operator in IN_THE_RUNTIME else BY_NAMESPACE.get(operator.partition("::")[0], KERNELS)


def cmake_lines(needs: dict[str, Any]) -> list[str]:
    """Of a project that builds executorch's sources for a device, with no more kernels than this program calls."""
    operators = needs["operators"]
    modules = ("DATA_LOADER", "FLAT_TENSOR", "MODULE", "NAMED_DATA_MAP", "TENSOR")
    options = [f"EXECUTORCH_BUILD_EXTENSION_{name}" for name in modules]
    options.append("EXECUTORCH_BUILD_KERNELS_OPTIMIZED")
    libraries = ["executorch", "extension_module_static", "extension_tensor", "executorch_kernels"]
    if BACKEND in needs["delegates"]:
        options.append("EXECUTORCH_BUILD_XNNPACK")
        libraries.append("xnnpack_backend")
    if QUANTIZED in operators:
        options.append("EXECUTORCH_BUILD_KERNELS_QUANTIZED")
        libraries.append("quantized_ops_lib")
    if CUSTOM in operators:
        options.append("EXECUTORCH_BUILD_KERNELS_LLM")
        libraries.append("custom_ops")
    return [
        *(f"set({option} ON)" for option in sorted(options)),
        f'set(EXECUTORCH_SELECT_OPS_LIST "{select_ops(needs)}")',
        f"target_link_libraries(app PRIVATE {' '.join(libraries)})",
    ]


def select_ops(needs: dict[str, Any]) -> str:
    """For executorch's selective build: of the kernels that it selects from; custom and quantized ones come whole."""
    return ",".join(needs["operators"].get(KERNELS, ()))
