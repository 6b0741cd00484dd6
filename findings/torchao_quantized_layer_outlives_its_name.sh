#!/usr/bin/env bash
# Expected: a layer that torchao quantized, and that nobody holds any more, gives its memory back at once, as a float one.
# Seen, torchao 0.18.0 with torch 2.13.0: `quantize_` hangs a bound method of the layer on the layer itself (its
# extra_repr), a cycle. So its weight stays until Python's collector comes by, and that one counts objects, not bytes:
#
#     float layers left behind: 0 MiB of 64; quantized ones: 64 MiB
#
# So: whoever quantizes a large matrix slice by slice, or layer by layer in a loop, holds what he thinks is gone (of one
# with half a billion weights we saw 1.6 GiB). `del layer.weight`, before the layer is dropped, frees it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy==2.4.6
cd "$folder"
cat > left.py << 'PY'
import gc
import weakref

import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_

MIB, N, SIZE = 2**20, 64, 1024
gc.collect()
gc.disable()  # as between two of its visits


def left(is_quantized: bool) -> int:
    seen = []
    for _ in range(N):
        layer = torch.nn.Linear(SIZE, SIZE, bias=False)
        if is_quantized:
            quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int8))
        held = layer.weight.qdata if is_quantized else layer.weight
        seen.append((weakref.ref(held), held.numel()))
        del layer, held
    return sum(n for ref, n in seen if ref() is not None) // MIB


print(left(False), left(True))
PY
read -r float quantized < <("$folder/venv/bin/python" left.py 2> /dev/null)
echo "float layers left behind: $float MiB of 64; quantized ones: $quantized MiB"
[ "$float" = 0 ] && [ "$quantized" = 64 ] || { echo "it was 0 and 64 with torchao 0.18.0" >&2; exit 1; }
