#!/usr/bin/env bash
# Expected: a quantization that a backend cannot compute is refused, or left to other kernels.
# Seen, executorch 1.5.1 with torchao 0.18.0: a linear layer whose weights alone are quantized is taken by XNNPACK's
# partitioner, lowers, loads and runs without a word, its file is as large as the float one, and its numbers are garbage:
#
#     int4 in groups of 32:    largest output 1.87, largest error 238, 275,584 bytes (float32: 265,216)
#     int8 per channel:        largest output 1.88, largest error 3914, 266,624 bytes (float32: 265,216)
#
# So: for XNNPACK activations must be quantized too (Int8DynamicActivationIntxWeightConfig), and a program must be run
# against eager before it is believed: that lowering went through says nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 executorch==1.5.1 torchao==0.18.0
cd "$folder"
"$folder/venv/bin/python" - 2> log <<'PYTHON' || { tail -n 5 log >&2; exit 1; }
import sys
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

CONFIGS = {
    "int4 in groups of 32:": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "int8 per channel:": IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
}


def run(config):
    """(the layer's output, the program's, bytes of the program)"""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(256, 256)).eval(), torch.randn(4, 256)
    if config is not None:
        quantize_(model, config)
    lowered = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    content = lowered.to_executorch().buffer
    Path("layer.pte").write_bytes(content)
    (found,) = Runtime.get().load_program("layer.pte").load_method("forward").execute((x,))
    return model(x), found.clone(), len(content)


expected, found, plain = run(None)
assert (found - expected).abs().max() < 1e-4, "float32 is right"
for name, config in CONFIGS.items():
    expected, found, size = run(config)
    largest, error = expected.abs().max().item(), (found - expected).abs().max().item()
    print(f"{name:<24} largest output {largest:.2f}, largest error {error:.0f}, {size:,} bytes (float32: {plain:,})")
    if not (error > 10 * largest and size > 0.95 * plain):
        sys.exit(f"not as it was: {name} error {error:.3g} of outputs up to {largest:.3g}, {size:,} bytes")
PYTHON
