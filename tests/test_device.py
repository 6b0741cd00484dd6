"""What an artifact says that a device needs: each kernel is in the library that is named, and in no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from evidence.device import CUSTOM, KERNELS, QUANTIZED, RUNTIME, cmake_lines, select_ops
from runtime.artifact import read_manifest
from runtime.program import executorch_folder
from tests.checkpoints import RECIPES, ROOT, Build

Pipeline = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_kernel_is_in_the_library_that_is_named(recipe: str, build: Build, native: Callable[..., Path]) -> None:
    device = read_manifest(build("gqa2", recipe))["device"]
    assert device["operators"]
    assert device["delegates"] == ([] if recipe == "fp32_portable" else ["XnnpackBackend"])
    libraries = {name: executorch_folder() / "lib" / f"lib{name}.so" for name in (RUNTIME, KERNELS, QUANTIZED)}
    content = {name: file.read_bytes() for name, file in libraries.items()} | {CUSTOM: native().read_bytes()}
    for library, operators in device["operators"].items():
        for operator in operators:
            # aten's two of the runtime are registered there among its own.
            assert [name for name, held in content.items() if operator.encode() + b"\0" in held] == [library], operator


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_runtimes_are_those_that_gave_the_same_bits(recipe: str, build: Build) -> None:
    tried = json.loads((ROOT / "docs" / "runtimes.json").read_text())["runtimes"]
    same = [number for number, found in tried.items() if found[recipe] == {"calls": 77, "differ": 0}]
    assert read_manifest(build("gqa2", recipe))["device"]["runtimes"] == same
    assert version("executorch") in same


def test_the_program_is_what_it_says(build: Build) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    device = read_manifest(artifact)["device"]
    assert (device["file_identifier"], device["program_schema"]) == ("ET12", 0)
    manifest = read_manifest(artifact)
    planned = sum(manifest["memory_plan"])
    assert planned < manifest["run"]["program_memory"] < planned + 2**24


def test_the_lines_of_an_app(build: Build, pipeline: Pipeline) -> None:
    """By recipe: without quantized kernels, without the LLM extension's, without a delegate."""
    lines = {recipe: "\n".join(cmake_lines(read_manifest(build("gqa2", recipe))["device"])) for recipe in RECIPES}
    assert {recipe for recipe, said in lines.items() if "quantized_ops_lib" in said} == {
        "int8_xnnpack", "int4_xnnpack", "int4_fast_xnnpack",
    }  # fmt: skip
    assert {recipe for recipe, said in lines.items() if "xnnpack_backend" not in said} == {"fp32_portable"}
    assert {recipe for recipe, said in lines.items() if "custom_ops" not in said} == {"fp32_portable"}
    code, out, err = pipeline("inspect", f"artifact={build('gqa2', 'int4_xnnpack')}", "--device")
    assert (code, err) == (0, "")
    assert lines["int4_xnnpack"] in out
    device = read_manifest(build("gqa2", "int4_xnnpack"))["device"]
    assert f'set(EXECUTORCH_SELECT_OPS_LIST "{select_ops(device)}")' in out
    assert select_ops(device) == "aten::index.Tensor_out,aten::slice_copy.Tensor_out"
