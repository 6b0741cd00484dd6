#!/usr/bin/env bash
# Expected: XNNPACK's cache of packed weights changes how much memory a program takes, and never what it computes.
# Seen, executorch 1.5.1: the cache tells two weights apart by their integers and bias, not by their scales. Of two int8
# layers, the second twice the first, the second gives the first one's output; without the cache both are right:
#
#     cache off: largest error 0.000001, second over first 2.000
#     cache on:  largest error 1.660612, second over first 1.000
#
# So: before the option weight_cache_enabled is switched on, the integers of all layers must be known to differ. Copied,
# rescaled or freshly duplicated layers have the same. (The option is C++'s; Python reaches the same function by its name.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 executorch==1.5.1 torchao==0.18.0
cd "$folder"
"$folder/venv/bin/python" - 2> log <<'PYTHON' || { tail -n 5 log >&2; exit 1; }
import ctypes
import importlib.util
import sys
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
        self.second.weight.data = 2 * self.first.weight.data

    def forward(self, x):
        return self.first(x), self.second(x)


class Option(ctypes.Structure):
    """runtime/backend/options.h: a key, and a variant of bool, int and text."""

    _fields_ = (("key", ctypes.c_char * 64), ("value", ctypes.c_int32 * 64), ("kind", ctypes.c_uint8))


class Options(ctypes.Structure):
    _fields_ = (("data", ctypes.POINTER(Option)), ("size", ctypes.c_size_t))


def measured(name):
    method = Runtime.get().load_program("two.pte").load_method("forward")
    found = [output.clone() for output in method.execute((x,))]
    error = max((a - b).abs().max().item() for a, b in zip(found, expected))
    ratio = (found[1] / found[0]).median().item()
    print(f"{name} largest error {error:.6f}, second over first {ratio:.3f}")
    return error, ratio


torch.manual_seed(0)
model, x = Two().eval(), torch.randn(4, 64)
quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)))
expected = model(x)
lowered = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
Path("two.pte").write_bytes(lowered.to_executorch().buffer)

off = measured("cache off:")
(package,) = importlib.util.find_spec("executorch").submodule_search_locations
library = ctypes.CDLL(str(Path(package) / "lib" / "libexecutorch.so"))
set_option = library._ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE
set_option.argtypes = (ctypes.c_char_p, Options)
option = Option(b"weight_cache_enabled")
option.value[0] = True
assert set_option(b"XnnpackBackend", Options(ctypes.pointer(option), 1)) == 0
on = measured("cache on: ")
if not (off[0] < 1e-5 and abs(off[1] - 2) < 1e-3 and on[0] > 0.1 and abs(on[1] - 1) < 1e-3):
    sys.exit("not as it was: the second layer no longer takes the first one's packed weights")
PYTHON
